"""Where in the picture is which marker? ORB features are matched against those of known markers."""

import json

import cv2
import numpy as np

from pictures import decoded, gallery

GALLERY = "/usr/share/howdah/markers"
FEATURES = 600
# A match counts if the second best is so much worse (Lowe's ratio).
RATIO = 0.8
# Fewer matches than this on one plane are chance.
FEWEST = 15
REPROJECTION_PIXELS = 4.0


class Markers:
    """What is known, and how a picture is annotated."""

    def __init__(self, directory: str = GALLERY):
        self._orb = cv2.ORB_create(nfeatures=FEATURES)
        self._matcher = cv2.BFMatcher(cv2.NORM_HAMMING)
        self._known = []
        for name, grey in gallery(directory):
            points, features = self._orb.detectAndCompute(grey, None)
            if features is None or len(points) < FEWEST:
                raise SystemExit(f"{directory}/{name}.jpg has too few features to be a marker")
            places = np.float32([point.pt for point in points])
            self._known.append((name, grey.shape, places, features))

    def answer(self, request: bytes) -> bytes:
        """The markers in a picture: name, corners, and on how many matches that rests."""
        points, features = self._orb.detectAndCompute(decoded(request), None)
        markers = []
        if features is not None and len(points) >= FEWEST:
            places = np.float32([point.pt for point in points])
            for known in self._known:
                markers.extend(self._find(known, places, features))
        return json.dumps({"markers": markers}).encode()

    def _find(self, known: tuple, places: np.ndarray, features: np.ndarray) -> list[dict]:
        name, (height, width), known_places, known_features = known
        pairs = self._matcher.knnMatch(known_features, features, k=2)
        good = [
            pair[0] for pair in pairs if len(pair) == 2 and pair[0].distance < RATIO * pair[1].distance
        ]
        if len(good) < FEWEST:
            return []
        there = known_places[[match.queryIdx for match in good]]
        here = places[[match.trainIdx for match in good]]
        plane, inside = cv2.findHomography(there, here, cv2.RANSAC, REPROJECTION_PIXELS)
        if plane is None or int(inside.sum()) < FEWEST:
            return []
        square = np.float32([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]])
        corners = cv2.perspectiveTransform(square.reshape(-1, 1, 2), plane).reshape(-1, 2)
        if not np.isfinite(corners).all() or not cv2.isContourConvex(corners):
            return []
        corners = [[round(float(x), 1), round(float(y), 1)] for x, y in corners]
        return [{"name": name, "corners": corners, "matches": int(inside.sum())}]
