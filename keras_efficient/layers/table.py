"""One array of a layer: its size in bytes, how it is rounded in training, how it is stored after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

__all__ = ["BITS", "Table", "dequantize", "fake_quantize", "pack", "quantize", "scales", "unpack"]

BITS = (32, 16, 8, 4, 2, 1)

CHUNK = 65536  # rows that are rounded at once

# Width of a uniform quantiser's step in standard deviations of a normal variable, for the least squared error.
STEP = {1: 1.596, 2: 0.996, 4: 0.335}


@dataclass(frozen=True)
class Table:
    """An array of `rows` × `columns`, of which lookups take rows.

    Attributes:
        rows, columns: its shape.
        bits: 32 (floats), or the width of its integers: 16, 8, 4, 2, 1. Columns of less than 8 are packed into bytes.
        scale: of integers: ``"row"``, a float32 for every row, or ``"table"``, one in all.
        initial: what it is filled with before training: ``"embeddings"``, the layer's initializer;
            ``"around_one"``, that plus one; ``"ones"``; ``"zeros"``; a number, normal values of that deviation.
        scale_rows: so many rows, the first ones, set the scale of the table. 0: all of them.
        choices: where it is not 0, the numbers are places, from 0 to choices − 1, in another table: bytes without a
            scale, which are not trained. They begin as hashes of the row's number.
    """

    rows: int
    columns: int
    bits: int = 32
    scale: str = "row"
    initial: str | float = "embeddings"
    scale_rows: int = 0
    choices: int = 0

    @property
    def packed_columns(self) -> int:
        """Columns of the stored array."""
        return -(-self.columns * self.bits // 8) if self.bits < 8 else self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of the stored array and of its scales."""
        scales = 4 * (self.rows if self.scale == "row" else 1) if self.has_scale else 0
        return self.rows * self.packed_columns * max(self.bits, 8) // 8 + scales

    @property
    def has_scale(self) -> bool:
        """Whether its integers stand for values."""
        return self.bits < 32 and not self.choices

    @property
    def stored_dtype(self) -> str:
        """Of the stored array."""
        # Not int8, which Keras takes for the name of a quantised policy.
        return {32: "float32", 16: "int16"}.get(self.bits, "uint8")

    @property
    def offset(self) -> float:
        """Added to an integer before it is scaled: two bits are −1.5, −0.5, 0.5, 1.5, one bit is −0.5, 0.5."""
        return 0.5 if self.bits <= 2 else 0.0

    @property
    def least(self) -> int:
        """The smallest integer; more bits than two leave out their lowest, to be symmetric about zero."""
        return -(2 ** (self.bits - 1)) + (self.bits > 2)

    @property
    def most(self) -> int:
        """The largest integer."""
        return 2 ** (self.bits - 1) - 1


def scales(table: Table, values: Any) -> Any:
    """The scale of every row ``(…, 1)``, or of the whole table ``()``, as the values are now.

    ``max|values| / most``; and where there are too few levels for that, the step that is best for normal values, which
    clips some of them: four bits for a whole table, two and one bits for rows as well.
    """
    by_row = table.scale == "row"
    values = ops.cast(values, "float32")  # what is divided by must not be zero, as the least scale is in float16
    if table.scale_rows and not by_row:
        values = values[: table.scale_rows]
    over = {"axis": -1, "keepdims": True} if by_row else {}
    if table.bits >= (4 if by_row else 8):
        scale = ops.max(ops.abs(values), **over) / table.most
    else:
        scale = STEP[table.bits] * ops.sqrt(ops.mean(ops.square(values), **over))
    # A constant to the gradient: it is taken from the values again when they are stored.
    return ops.stop_gradient(ops.maximum(scale, 1e-12))


def fake_quantize(table: Table, rows: Any, scale: Any) -> Any:
    """Rows as they will be read from the stored table, with a gradient as if nothing were rounded.

    ``value = (clip(round(row / scale − offset), least, most) + offset) · scale``

    Args:
        table: says how many bits.
        rows: ``(…, columns)``, floats.
        scale: from `scales`.
    """
    rows = ops.cast(rows, "float32")
    codes = ops.clip(ops.round(rows / scale - table.offset), table.least, table.most)
    # Values that are clipped get their gradient too, or they could never come back.
    return rows + ops.stop_gradient((codes + table.offset) * scale - rows)


def quantize(table: Table, values: Any) -> tuple[np.ndarray, np.ndarray]:
    """The integers of a whole table, packed, and its scales: shape ``(rows, 1)`` or ``()``."""
    values = np.asarray(ops.convert_to_numpy(values), np.float32)
    if table.scale == "row" and len(values) > CHUNK:  # rows know nothing of one another, and a copy may be large
        parts = [quantize(table, values[start : start + CHUNK]) for start in range(0, len(values), CHUNK)]
        stored, scale = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return stored, scale
    scale = np.asarray(ops.convert_to_numpy(scales(table, ops.convert_to_tensor(values))), np.float32)
    codes = np.clip(np.round(values / scale - np.float32(table.offset)), table.least, table.most)
    return pack(table, codes.astype(np.int16)), scale


def pack(table: Table, codes: np.ndarray) -> np.ndarray:
    """Integers as they are stored: two, four or eight to a byte, each plus ``−least``.

    The byte at column p holds the columns p, p + P, p + 2P, … of P stored ones, from its lowest bits on: `unpack` then
    needs no reshape, which several free axes would forbid.
    """
    if table.bits == 16:
        return codes.astype("int16")
    each, width = 8 // table.bits, table.packed_columns
    padded = np.zeros((len(codes), width * each), np.uint8)
    padded[:, : table.columns] = codes - table.least
    return np.bitwise_or.reduce([padded[:, k * width : (k + 1) * width] << (table.bits * k) for k in range(each)])


def unpack(table: Table, stored: Any) -> Any:
    """Stored rows to integers as floats, by arithmetic that every exported format has."""
    if table.bits == 16:
        return ops.cast(stored, "float32")
    if table.bits < 8:
        whole, levels = ops.cast(stored, "int32"), 2**table.bits
        parts = [ops.mod(ops.floor_divide(whole, levels**k), levels) for k in range(8 // table.bits)]
        stored = ops.concatenate(parts, axis=-1)
        if stored.shape[-1] != table.columns:  # the last bytes are not full
            stored = stored[..., : table.columns]
    return ops.cast(stored, "float32") + float(table.least)


def dequantize(table: Table, stored: Any, scale: Any) -> Any:
    """Stored rows to values."""
    codes = unpack(table, stored)
    return (codes + table.offset if table.offset else codes) * scale
