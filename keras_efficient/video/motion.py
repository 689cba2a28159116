"""Where macroblocks came from since a frame that was looked at; only frames that are over are needed."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_efficient.macroblocks import BLOCK, grid
from keras_efficient.video.frames import packages

__all__ = ["carried", "small_luma"]

SHRINK = 8  # pixels of a frame's side, for one of those that are compared
PER_BLOCK = BLOCK // SHRINK
REACH = 4  # of such pixels, in each direction
STILLNESS = 2.0  # grey levels by which a place must be better for each step that it lies farther away


def small_luma(frame: Any) -> np.ndarray:
    """The luma of an `av.VideoFrame`, an eighth as wide and high: (2 · rows, 2 · columns) float32 of macroblocks."""
    rows, columns = (PER_BLOCK * count for count in grid(frame.height, frame.width))
    height, width = (max(1, -(-size // SHRINK)) for size in (frame.height, frame.width))
    area = packages().video.reformatter.Interpolation.AREA
    luma = frame.reformat(width, height, "gray", interpolation=area).to_ndarray().astype(np.float32)
    return np.pad(luma, [(0, rows - height), (0, columns - width)], mode="edge")


def carried(scores: np.ndarray, then: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Scores of the macroblocks of an earlier frame at the places where they are now.

    ```
    d_B = argmin_{|d| ≤ 32 pixels, in steps of 8}  Σ_{B and its neighbours} |now(p) − then(p − d)| + stillness · |d|₁
    score_now(B) = score_then(B − d_B), linear between macroblocks
    ```

    Args:
        scores: (rows, columns).
        then, now: `small_luma` of both frames.
    """
    rows, columns = scores.shape
    height, width = now.shape
    wide = np.pad(then, REACH, mode="edge")
    steps = [(y, x) for y in range(-REACH, REACH + 1) for x in range(-REACH, REACH + 1)]
    costs = np.empty((len(steps), rows, columns), np.float32)
    for cost, (y, x) in zip(costs, steps, strict=True):
        apart = np.abs(now - wide[REACH - y : REACH - y + height, REACH - x : REACH - x + width])
        cost[:] = apart.reshape(rows, PER_BLOCK, columns, PER_BLOCK).sum(axis=(1, 3))
    costs = np.pad(costs, [(0, 0), (1, 1), (1, 1)], mode="edge")
    costs = costs[:, :-2] + costs[:, 1:-1] + costs[:, 2:]
    costs = costs[..., :-2] + costs[..., 1:-1] + costs[..., 2:]
    costs += 9 * STILLNESS * np.abs(steps).sum(axis=1, dtype=np.float32)[:, None, None]
    down, across = np.moveaxis(np.array(steps, np.float32)[costs.argmin(axis=0)], -1, 0) / PER_BLOCK
    y = (np.arange(rows)[:, None] - down).clip(0, rows - 1)
    x = (np.arange(columns) - across).clip(0, columns - 1)
    top, left = y.astype(int), x.astype(int)
    low, right = np.minimum(top + 1, rows - 1), np.minimum(left + 1, columns - 1)
    y, x = y - top, x - left
    found: np.ndarray = (1 - y) * ((1 - x) * scores[top, left] + x * scores[top, right]) + y * (
        (1 - x) * scores[low, left] + x * scores[low, right]
    )
    return found
