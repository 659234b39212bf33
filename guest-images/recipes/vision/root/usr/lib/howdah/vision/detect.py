"""Where in the picture are people? OpenCV's detector on histograms of oriented gradients."""

import json

import cv2

from framed import Refusal
from pictures import decoded

# The detector's window; nothing smaller can hold anybody.
WINDOW = (64, 128)
# Below this a box is a guess.
SUREST = 0.2


class People:
    """The detector that OpenCV brings."""

    def __init__(self) -> None:
        self._hog = cv2.HOGDescriptor()
        self._hog.setSVMDetector(cv2.HOGDescriptor_getDefaultPeopleDetector())

    def answer(self, request: bytes) -> bytes:
        """Boxes around people, the surest first."""
        grey = decoded(request)
        if grey.shape[1] < WINDOW[0] or grey.shape[0] < WINDOW[1]:
            raise Refusal(f"a picture of {grey.shape[1]}×{grey.shape[0]}: 64×128 at least")
        boxes, weights = self._hog.detectMultiScale(
            grey, winStride=(8, 8), padding=(8, 8), scale=1.1
        )
        weights = [float(weight) for weight in weights.ravel()] if len(boxes) else []
        people = [
            dict(zip("xywh", (int(part) for part in box)), weight=round(weight, 2))
            for box, weight in zip(boxes, weights)
            if weight >= SUREST
        ]
        # Threads find boxes in any order.
        people.sort(key=lambda one: (-one["weight"], one["x"], one["y"], one["w"]))
        return json.dumps({"people": people}).encode()
