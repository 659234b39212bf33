"""Whose face is it? OpenCV's cascade finds faces, eigenfaces tell them apart."""

import json
import os

import cv2
import numpy as np

from framed import Refusal
from pictures import decoded, gallery

GALLERY = "/usr/share/howdah/faces"
# Where Debian's opencv-data has it.
CASCADE = "/usr/share/opencv4/haarcascades/haarcascade_frontalface_alt.xml"
# Every face is brought to this size before it is compared.
EDGE = 96
COMPONENTS = 40
# The smallest face, as a part of the picture's height.
SMALLEST = 0.3


class Faces:
    """Who is known, and how a picture is looked at."""

    def __init__(self, directory: str = GALLERY, cascade: str = CASCADE):
        if not os.path.isfile(cascade):
            raise SystemExit(f"{cascade} is missing: install the package opencv-data")
        self._cascade = cv2.CascadeClassifier(cascade)
        faces = []
        self.names = []
        for name, grey in gallery(directory):
            boxes = self._boxes(grey)
            if boxes:
                # The largest is the one that the picture was taken of.
                faces.append(_normal(grey, max(boxes, key=lambda box: box[2])))
                # ada-3.jpg is the picture number 3 of ada.
                self.names.append(name.rsplit("-", 1)[0])
        if not faces:
            raise SystemExit(f"{directory} has no face that the cascade finds")
        rows = np.array(faces, np.float32)
        self._mean, self._vectors = cv2.PCACompute(rows, mean=None, maxComponents=COMPONENTS)
        self._known = cv2.PCAProject(rows, self._mean, self._vectors)

    def _boxes(self, grey: np.ndarray) -> list[tuple[int, int, int, int]]:
        smallest = int(SMALLEST * grey.shape[0])
        found = self._cascade.detectMultiScale(
            cv2.equalizeHist(grey), 1.1, 3, minSize=(smallest, smallest)
        )
        return sorted(tuple(int(part) for part in box) for box in found)

    def answer(self, request: bytes) -> bytes:
        """Boxes around the faces of a picture, with the name of who comes closest."""
        grey = decoded(request)
        if min(grey.shape) < 32:
            raise Refusal(f"a picture of {grey.shape[1]}×{grey.shape[0]}: 32×32 at least")
        faces = []
        for box in self._boxes(grey):
            row = _normal(grey, box).reshape(1, -1)
            place = cv2.PCAProject(row, self._mean, self._vectors)
            apart = np.linalg.norm(self._known - place, axis=1)
            closest = int(apart.argmin())
            who, distance = self.names[closest], round(float(apart[closest]), 1)
            faces.append(dict(zip("xywh", box), who=who, distance=distance))
        return json.dumps({"faces": faces}).encode()


def _normal(grey: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """A face as a row of numbers, whatever its size and light."""
    x, y, w, h = box
    face = cv2.resize(grey[y : y + h, x : x + w], (EDGE, EDGE), interpolation=cv2.INTER_AREA)
    return cv2.equalizeHist(face).astype(np.float32).ravel()
