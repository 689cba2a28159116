"""Where in a frame a server finds something."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_efficient.errors import WrongArgument
from keras_efficient.macroblocks import BLOCK, grid
from keras_efficient.video.interpolation import reach, resized
from keras_efficient.video.servers import Detections

__all__ = ["boxes_of", "covered", "sureness"]


def boxes_of(found: Any) -> np.ndarray:
    """(n, 4): around what a server found in a frame.

    Raises:
        WrongArgument: it finds no boxes.
    """
    if isinstance(found, Detections):
        return found.boxes
    if np.ndim(found) != 3:
        raise WrongArgument("The server finds no boxes.", hint="Leave out the schemes boxes, vigil, eaar and dds.")
    people = np.asarray(found)[..., :2]
    return np.concatenate([people.min(axis=1), people.max(axis=1)], axis=1)


def covered(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """(rows, columns): macroblocks that some box touches."""
    return sureness(Detections(boxes, np.ones(len(boxes)), np.zeros(len(boxes), int)), height, width) > 0


def sureness(found: Any, height: int, width: int) -> np.ndarray:
    """How surely a server finds something in each macroblock: (rows, columns) float32 from 0 to 1.

    Of boxes the best score of those that touch it; of people with key points 1; of classes of pixels the share of it
    that is not of the first class, the background.
    """
    if np.ndim(found) == 2 and not isinstance(found, Detections):
        cells, size = grid(height, width), (height, width)
        mask = (np.asarray(found) != 0).astype(np.float32)
        areas: np.ndarray = resized(mask, cells, want=reach(size, cells))
        return areas
    boxes = boxes_of(found)
    scores = found.scores if isinstance(found, Detections) else np.ones(len(boxes))
    best = np.zeros(grid(height, width), np.float32)
    for (left, top, right, bottom), score in zip(np.asarray(boxes).clip(0).tolist(), scores, strict=True):
        part = best[int(top // BLOCK) : int(-(-bottom // BLOCK)), int(left // BLOCK) : int(-(-right // BLOCK))]
        np.maximum(part, score, out=part)
    return best
