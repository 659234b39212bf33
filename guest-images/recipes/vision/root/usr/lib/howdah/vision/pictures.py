"""Pictures as they come from clients and from the disk."""

import os

import cv2
import numpy as np

from framed import Refusal

# No camera that sends to these applications has more; a small file can claim to be huge.
MAX_PIXELS = 4_000_000


def decoded(data: bytes) -> np.ndarray:
    """The grey picture in a file's bytes."""
    if not data:
        raise Refusal("no picture: the request is empty")
    grey = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    if grey is None:
        raise Refusal(f"no picture: {len(data)} bytes that OpenCV cannot decode")
    if grey.size > MAX_PIXELS:
        raise Refusal(f"a picture of {grey.size} pixels: {MAX_PIXELS} at most")
    return grey


def gallery(directory: str) -> list[tuple[str, np.ndarray]]:
    """Names, without suffix, and pictures of a directory, in the order of their names."""
    found = []
    for name in sorted(os.listdir(directory)):
        if name.endswith(".jpg"):
            with open(os.path.join(directory, name), "rb") as file:
                found.append((name.removesuffix(".jpg"), decoded(file.read())))
    if not found:
        raise SystemExit(f"{directory} has no pictures (*.jpg): `howdah-app inputs` makes them")
    return found
