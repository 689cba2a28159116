"""Tables of a few bits, as one layer whose integers the converter leaves alone.

A compressed embedding deploys such a table as a small model: an `Embedding` of bytes, the arithmetic that takes two,
four or eight numbers out of each, and a scale. Here the small model is asked for the values of every row, which are
integers times a scale, and a layer that gathers these integers is put in its place. Once they are in the file,
`embedding_lookup` packs them again, for an operator of LiteRT that unpacks and scales by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras.src.models.functional import Functional
from keras.src.ops import core, numpy

from keras_efficient.errors import UnsupportedLayer
from keras_efficient.export.lowerings import Lowering, operations
from keras_efficient.export.lowerings.plain_gather import is_plain_embedding
from keras_efficient.export.lowerings.table_layers import FloatTable, IntegerTable, SignTable, narrowest_bits

__all__ = ["INTEGER_TABLE", "WIDE_TABLE_AS_FLOATS", "integer_table", "wide_table_as_floats"]

TOLERANCE = 1e-6  # of a value: float32 products and sums of the same numbers differ by 1e-7
CHUNK = 65536  # rows that are asked for at once
MAX_PROBED = 256  # stored integers that show the grid: a byte has no more, and of 16 bits a part tells the step

_STORED = ("uint8", "int16")
_PLACE_BY_PLACE = (
    core.Cast,
    numpy.Add,
    numpy.Subtract,
    numpy.Multiply,
    numpy.TrueDivide,
    numpy.Divide,
    numpy.FloorDivide,
    numpy.Mod,
    numpy.Negative,
)


@dataclass(frozen=True)
class _Contents:
    """What a table holds: ``value = (codes + offset) · step · row scale``."""

    codes: np.ndarray
    step: float
    offset: float
    row_scales: np.ndarray | None

    @property
    def values(self) -> np.ndarray:
        rows = (self.codes.astype(np.float32) + np.float32(self.offset)) * np.float32(self.step)
        return rows if self.row_scales is None else rows * self.row_scales


def integer_table(model: keras.Model) -> keras.Model:
    """Every model inside this one that is a table of integers, as one layer that takes no more bytes in the file."""
    return _with_tables(model, _as_layer)


def wide_table_as_floats(model: keras.Model) -> keras.Model:
    """Tables of 8 bits and more as an `Embedding` of floats, which a calibrated precision rounds to its own integers.

    Raises:
        UnsupportedLayer: a table of fewer bits, which would grow.
    """
    return _with_tables(model, _as_floats)


def _with_tables(model: keras.Model, make: Any) -> keras.Model:
    """`model` with tables replaced by ``make(model of the table, contents, path)``, which may give `None`."""
    from keras_efficient.deploy import rebuild

    found = {id(op): _contents(op) for op in operations(model) if op is not model and isinstance(op, Functional)}
    found = {key: contents for key, contents in found.items() if contents is not None}

    replaced = set()

    def replace(operation: keras.Operation, path: str) -> keras.Operation | None:
        contents = found.get(id(operation))
        made = None if contents is None else make(operation, contents, path)
        if made is not None:
            replaced.add(path)
        return made

    rebuilt = rebuild(model, replace) if found else model
    return rebuilt if replaced else model


def _as_layer(operation: Functional, contents: _Contents, path: str) -> keras.layers.Layer | None:
    bits, codes = narrowest_bits(contents.codes), contents.codes
    rows, columns = codes.shape
    grid = (contents.step, contents.offset, contents.row_scales is not None)
    if contents.offset == 0.5 and codes.min() >= -1 and codes.max() <= 0:
        layer: Any = SignTable(rows, columns, *grid, name=operation.name)
    elif -(-codes.shape[1] * bits // 8) <= _row_bytes(operation):
        layer = IntegerTable(rows, columns, *grid, bits, name=operation.name)
    else:
        return None
    layer.build()
    layer.fill(codes, contents.row_scales)
    return layer


def _row_bytes(model: Functional) -> int:
    stored = _parts(model)[0].embeddings
    return stored.shape[1] * np.dtype(stored.dtype).itemsize


def _as_floats(operation: Functional, contents: _Contents, path: str) -> keras.layers.Layer:
    columns, row_bytes = contents.codes.shape[1], _row_bytes(operation)
    if row_bytes < columns:
        raise UnsupportedLayer(
            path,
            f"its table has {8 * row_bytes // columns}-bit numbers, which a calibrated precision would store in 8.",
            hint="Choose precision float32, which keeps the table's integers as they are.",
        )
    layer = FloatTable(*contents.codes.shape, dtype="float32", name=operation.name)
    layer.build()
    layer.set_weights([contents.values])
    return layer


def _parts(model: Functional) -> tuple[Any, Any]:
    """The `Embedding` of integers and that of row scales (or `None`) of a table; two `None` if it is none."""
    steps = [op for op in model.operations if not isinstance(op, keras.layers.InputLayer)]
    embeddings = [op for op in steps if is_plain_embedding(op)]
    stored = [op for op in embeddings if op.compute_dtype in _STORED]
    scales = [op for op in embeddings if op.compute_dtype == "float32" and op.output_dim == 1]
    fits = (
        len(model.inputs) == len(model.outputs) == len(stored) == 1
        and model.inputs[0].dtype in ("int32", "int64")
        and model.outputs[0].dtype == "float32"
        and len(scales) == len(embeddings) - 1 <= 1
        and all(op.input_dim == stored[0].input_dim for op in embeddings)
        and all(len(op._inbound_nodes) == 1 for op in steps)  # more are calls by other models, with other arguments
        and all(op.input is model.inputs[0] for op in embeddings)
        and all(op in embeddings or _keeps_rows(op) for op in steps)
    )
    return (stored[0], scales[0] if scales else None) if fits else (None, None)


def _keeps_rows(operation: keras.Operation) -> bool:
    """Whether an operation works on every row by itself, and leaves it in its place."""
    if isinstance(operation, numpy.Concatenate):
        return operation.axis in (-1, len(operation.output.shape) - 1)
    if isinstance(operation, numpy.GetItem):
        key = operation._inbound_nodes[0].arguments.args[-1]
        # A model that was read from a file has a list here.
        return isinstance(key, (tuple, list)) and len(key) == 2 and key[0] is Ellipsis and isinstance(key[1], slice)
    return isinstance(operation, _PLACE_BY_PLACE)


def _contents(model: Functional) -> _Contents | None:
    """What the table holds, or `None` where the model is no table or its values lie on no grid."""
    stored, scales = _parts(model)
    grid = None if stored is None else _grid(model, stored, scales)
    if grid is None:
        return None
    step, offset = grid
    row_scales = None if scales is None else np.asarray(scales.embeddings)
    parts = []
    for first in range(0, stored.input_dim, CHUNK):
        ids = np.arange(first, min(first + CHUNK, stored.input_dim), dtype=np.int32)
        part = _on_grid(_run(model, ids), step, offset, 1.0 if row_scales is None else row_scales[ids])
        if part is None:
            return None
        parts.append(part)
    codes = np.concatenate(parts)
    if row_scales is None:
        return _Contents(codes, step, offset, None)
    # Half precision cannot hold small row scales; a power of two (float16's least, or more) changes nothing but the
    # place of their bits.
    power = float(2.0 ** max(-24, np.round(np.log2(row_scales.max()))))
    return _Contents(codes, step * power, offset, row_scales / np.float32(power))


def _grid(model: Functional, stored: Any, scales: Any) -> tuple[float, float] | None:
    """Step and offset of the values that the table can have, found by giving it every integer in turn."""
    limits = np.iinfo(stored.compute_dtype)
    first = max(limits.min, -MAX_PROBED // 2)
    integers = np.arange(first, min(first + MAX_PROBED, limits.max + 1)).astype(stored.compute_dtype)
    rows = np.repeat(integers[:, None], stored.output_dim, 1)
    values = np.unique(_run(model, np.arange(len(rows)), {id(stored): rows, id(scales): np.ones((len(rows), 1))}))
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    step = float(np.diff(values.astype(np.float64)).min())
    for offset in (0.0, 0.5):
        places = values / step - offset
        if np.abs(places - np.round(places)).max() < 1e-3:
            # Differences have lost bits; the value next to zero has all of them.
            near = np.where(np.round(places) + offset > 0, values, np.inf).argmin()
            return float(values[near] / (np.round(places[near]) + offset)), offset
    return None


def _on_grid(values: np.ndarray, step: float, offset: float, row_scales: Any) -> np.ndarray | None:
    """The integers of values ``(rows, columns)``, or `None` where one is further off than rounding explains."""
    steps = np.broadcast_to(np.float64(step) * row_scales, (len(values), 1))
    if not (np.isfinite(steps).all() and (steps > 0).all()):
        return None
    codes = np.round(values / steps - offset)
    error = np.abs((codes + offset) * steps - values)
    if not (error <= TOLERANCE * np.maximum(np.abs(values), steps)).all() or np.abs(codes).max() >= 2**15:
        return None
    return codes.astype(np.int8 if np.abs(codes).max() < 2**7 else np.int16)


def _run(model: Functional, ids: np.ndarray, instead: Mapping[int, np.ndarray] | None = None) -> np.ndarray:
    """The model's values for ids, as rows.

    Args:
        model: a table.
        ids: one axis; here they get the axes that the model's input has.
        instead: what an operation gives, by its id, in the place of what it would compute.
    """
    shape = (len(ids), *[1] * (len(model.inputs[0].shape) - 1))

    def chosen(operation: keras.Operation) -> Any:
        given = None if instead is None else instead.get(id(operation))
        if given is None:
            return operation
        return lambda _: keras.ops.convert_to_tensor(given.reshape(*shape, -1), operation.compute_dtype)

    values = model._run_through_graph(keras.ops.convert_to_tensor(ids.reshape(shape)), operation_fn=chosen)
    return keras.ops.convert_to_numpy(values).reshape(len(ids), -1).astype(np.float64)


INTEGER_TABLE = Lowering(name="integer-table", function=integer_table)
WIDE_TABLE_AS_FLOATS = Lowering(name="wide-table-as-floats", function=wide_table_as_floats)
