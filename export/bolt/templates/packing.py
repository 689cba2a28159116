"""Weights in the order in which kernels read them, and numbers beside them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from keras_efficient.export.bolt.region import Activate, Layer

__all__ = ["Packed", "fragments", "fragments_by_tap", "rows_in_chunks", "table", "up"]


def up(number: int, unit: int) -> int:
    """The next multiple of a unit."""
    return -(-number // unit) * unit


def fragments(matrix: np.ndarray, block: int) -> bytes:
    """Float16 fragments of `multiply` (primitives.cuh), in the order block of filters, step of 16, tile of 8, lane.

    Args:
        matrix: (inner, filters), padded here with zeros.
        block: filters, a multiple of 8.
    """
    inner, filters = matrix.shape
    padded = np.zeros((up(inner, 16), up(filters, block)), np.float16)
    padded[:inner, :filters] = matrix
    # step, half, t, pair, block, tile, g
    split = padded.reshape(-1, 2, 4, 2, padded.shape[1] // block, block // 8, 8)
    return np.ascontiguousarray(split.transpose(4, 0, 5, 6, 2, 1, 3)).tobytes()


def fragments_by_tap(weights: np.ndarray) -> bytes:
    """The same of a convolution's (height, width, channels, filters): column of the kernel, step, row, tile, lane."""
    height, width, channels, filters = weights.shape
    padded = np.zeros((height, width, up(channels, 16), up(filters, 8)), np.float16)
    padded[:, :, :channels, :filters] = weights
    # dy, dx, step, half, t, pair, tile, g
    split = padded.reshape(height, width, -1, 2, 4, 2, padded.shape[3] // 8, 8)
    return np.ascontiguousarray(split.transpose(1, 2, 0, 6, 7, 4, 3, 5)).tobytes()


def rows_in_chunks(matrix: np.ndarray, part: int, block: int) -> bytes:
    """Float16 rows as products of warpgroups read them (primitives.cuh), in the order block of filters, part of the
    inner axis, filter, chunk of 8.

    Args:
        matrix: (inner, filters), padded here with zeros.
        part: numbers of the inner axis, 64.
        block: filters, a multiple of 8.
    """
    inner, filters = matrix.shape
    padded = np.zeros((up(inner, part), up(filters, block)), np.float16)
    padded[:inner, :filters] = matrix
    # part, chunk, number, block, filter
    split = padded.reshape(-1, part // 8, 8, padded.shape[1] // block, block).transpose(3, 0, 4, 1, 2)
    filter, chunk = np.arange(block)[:, None], np.arange(part // 8)
    return np.ascontiguousarray(split[:, :, filter, chunk ^ filter % 8]).tobytes()


def table(layer: Layer, columns: int) -> bytes:
    """A layer's bias, then the slopes of its activations, as floats for so many filters."""
    rows = [layer.bias, *(one.slopes for one in layer.steps if isinstance(one, Activate) and one.slopes is not None)]
    found = np.zeros((len(rows), columns), np.float32)
    for row, values in zip(found, rows, strict=True):
        row[: layer.filters] = values
    return found.tobytes()


class Packed:
    """What a kernel gets as one buffer: weights of all layers, then their tables.

    Attributes:
        data: all of it.
        weights, tables: where each layer's begin, in bytes.
        weight_bytes: of all layers' weights.
    """

    def __init__(self, weights: Sequence[bytes], tables: Sequence[bytes]):
        self.data = b"".join([*weights, *tables])
        places = np.cumsum([0, *(len(one) for one in (*weights, *tables))]).tolist()
        self.weights, self.tables = places[: len(weights)], places[len(weights) : -1]
        self.weight_bytes = sum(len(one) for one in weights)
