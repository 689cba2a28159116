"""Linear interpolation as a product with a matrix, which has a gradient wherever it is used."""

from __future__ import annotations

import numpy as np

__all__ = ["linear", "resized"]


def linear(places: np.ndarray, size: int) -> np.ndarray:
    """(wanted, size): what each sample takes of each that there is."""
    places = places.clip(0, size - 1)
    below = np.minimum(np.floor(places), max(size - 2, 0)).astype(int)
    matrix = np.zeros((len(places), size), np.float32)
    rows = np.arange(len(places))
    matrix[rows, below] += 1 - (places - below)
    matrix[rows, np.minimum(below + 1, size - 1)] += places - below
    return matrix


def resized(arrays: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(n, h, w, c), or else (…, h, w), to another size; samples stand for areas, and lie in their middles."""
    channels = arrays.ndim == 4
    for axis, wanted in zip((-3, -2) if channels else (-2, -1), size, strict=True):
        have = arrays.shape[axis]
        if have != wanted:
            matrix = linear((np.arange(wanted) + 0.5) * have / wanted - 0.5, have)
            arrays = np.moveaxis(np.tensordot(matrix, arrays, (1, axis)), 0, axis)
    return arrays
