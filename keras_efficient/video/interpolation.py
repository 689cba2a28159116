"""Linear interpolation as a product with a matrix, which has a gradient wherever it is used."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from keras_efficient.macroblocks import BLOCK

__all__ = ["linear", "reach", "resized"]


def linear(places: np.ndarray, size: int) -> np.ndarray:
    """(wanted, size): what each sample takes of each that there is."""
    places = places.clip(0, size - 1)
    below = np.minimum(np.floor(places), max(size - 2, 0)).astype(int)
    matrix = np.zeros((len(places), size), np.float32)
    rows = np.arange(len(places))
    matrix[rows, below] += 1 - (places - below)
    matrix[rows, np.minimum(below + 1, size - 1)] += places - below
    return matrix


def reach(size: Sequence[int], cells: Sequence[int]) -> tuple[float, float]:
    """How far the cells of a frame reach down and across: 1.0 to its edge, more where the last one lies partly outside.

    Args:
        size: (height, width) of the frame.
        cells: rows and columns, of macroblocks of 16 pixels or, where the frame was shrunk, of 8, 4, 2 or 1. Any other
            number of cells covers just the frame.
    """
    for side in (BLOCK, 8, 4, 2, 1):
        if tuple(-(-pixels // side) for pixels in size) == tuple(cells):
            return cells[0] * side / size[0], cells[1] * side / size[1]
    return 1.0, 1.0


def resized(
    arrays: np.ndarray,
    size: tuple[int, int],
    *,
    have: tuple[float, float] = (1.0, 1.0),
    want: tuple[float, float] = (1.0, 1.0),
    start: tuple[float, float] = (0.0, 0.0),
) -> np.ndarray:
    """Rows and columns in another number; samples stand for areas, and lie in their middles.

    Args:
        arrays: (n, h, w, c), or else (…, h, w).
        size: rows and columns that are wanted.
        have: how far those that there are reach, see `reach`.
        want: how far the wanted ones reach.
        start: where the wanted ones begin.
    """
    axes = (-3, -2) if arrays.ndim == 4 else (-2, -1)
    for axis, wanted, covered, length, begin in zip(axes, size, have, want, start, strict=True):
        count = arrays.shape[axis]
        places = (begin + (np.arange(wanted) + 0.5) / wanted * length) / covered * count - 0.5
        if count != wanted or not np.allclose(places, np.arange(count)):
            arrays = np.moveaxis(np.tensordot(linear(places, count), arrays, (1, axis)), 0, axis)
    return arrays
