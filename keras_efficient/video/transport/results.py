"""What servers' networks find, as values that JSON can hold, of bounded size."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["plain"]

MOST_FOUND = 300  # boxes or people in a frame
MOST_RUNS = 4096  # of equal classes in a map


def plain(found: Any) -> dict[str, Any]:
    """One frame's result.

    - `Detections`: `boxes` (left, top, right, bottom in pixels), `scores`, `classes`, the best 300.
    - A map of classes (rows, columns): `shares` of the picture by class, `shape`, and `runs`, pairs of a class and how
      many pixels in reading order have it; without `runs` where those would be more than 4096.
    - Points (people, points, 3): `people`, each a list of x, y and probability.
    """
    from keras_efficient.video.servers import Detections  # imports Keras, which a camera does without

    if isinstance(found, Detections):
        best = np.argsort(-found.scores, kind="stable")[:MOST_FOUND]
        return {
            "boxes": _rounded(found.boxes[best], 1),
            "scores": _rounded(found.scores[best], 3),
            "classes": found.classes[best].tolist(),
        }
    array = np.asarray(found)
    if array.ndim == 3:
        return {"people": _rounded(array[:MOST_FOUND], 2)}
    flat = array.ravel()
    classes, counts = np.unique(flat, return_counts=True)
    shares = {
        str(kind): round(count / flat.size, 4) for kind, count in zip(classes.tolist(), counts.tolist(), strict=True)
    }
    starts = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1])
    if len(starts) > MOST_RUNS:
        return {"shares": shares, "shape": list(array.shape)}
    lengths = np.diff([*starts, flat.size])
    runs = np.stack([flat[starts], lengths], axis=1).tolist()
    return {"shares": shares, "shape": list(array.shape), "runs": runs}


def _rounded(values: np.ndarray, digits: int) -> list[Any]:
    rounded: list[Any] = np.round(values.astype(np.float64), digits).tolist()
    return rounded
