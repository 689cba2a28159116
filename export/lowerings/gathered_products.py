"""Products of rows that a gather took with the one vector of a batch of one.

The converter writes BATCH_MATMUL, of rows that are widened to float32 before. FULLY_CONNECTED takes computed rows too,
and rows of int8 beside an input of floats, which it rounds to int8 itself: the rounding of precision `dynamic`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from keras_efficient.export.graph import Builder, Graph, GraphLowering, Op, rebuild

__all__ = ["GATHERED_PRODUCTS", "ROUNDED_PRODUCTS", "gathered_products", "rounded_products"]


@dataclass(frozen=True)
class _Bytes:
    """Rows ``ADD(CAST(RESHAPE(GATHER(table, ids))), −zero)``: what they are made of."""

    gather: Op
    table: np.ndarray
    zero: int


def gathered_products(graph: Graph) -> Graph | None:
    """Every such product by a FULLY_CONNECTED; rows of bytes as int8, which takes their zero off."""
    return _rewritten(graph, rounding=False)


def rounded_products(graph: Graph) -> Graph | None:
    """The same, rows of bytes multiplied as they are, with inputs that are rounded."""
    return _rewritten(graph, rounding=True)


def _rewritten(graph: Graph, *, rounding: bool) -> Graph | None:
    def rule(builder: Builder, op: Op, values: Mapping[int, int]) -> int | None:
        if not _is_of_rows_and_a_vector(graph, op):
            return None
        found = _of_bytes(graph, op)
        if found is None and rounding:
            return None
        _, count, width = graph.tensor(op.inputs[0]).shape
        rows = values[op.inputs[0]] if found is None else _taken(graph, builder, values, found)
        rows = builder.reshape(rows, (count, width))
        if found is not None and not rounding:
            wide = builder.computed(op.inputs[0], (count, width), "float32")
            builder.emit("CAST", [rows], wide, builder.options("Cast"))
            rows = wide
        vector = builder.reshape(values[op.inputs[1]], (1, width))
        output = builder.like(op.output, (1, count))
        version = 3 if rounding else 1
        builder.emit("FULLY_CONNECTED", [vector, rows, -1], output, builder.options("FullyConnected"), version=version)
        return builder.reshape(output, graph.tensor(op.output).shape)

    rebuilt = rebuild(graph, rule)
    return None if rebuilt is None else rebuilt.without_unused()


def _taken(graph: Graph, builder: Builder, values: Mapping[int, int], found: _Bytes) -> int:
    """The rows, as int8."""
    codes = (found.table.astype(np.int16) - found.zero).astype(np.int8)
    table = builder.array(codes, [1.0], name="rows")
    shape = (*graph.tensor(found.gather.inputs[1]).shape, codes.shape[1])
    taken = builder.computed(found.gather.output, shape, "int8", [1.0])
    ids = values.get(found.gather.inputs[1])
    ids = builder.constant(found.gather.inputs[1]) if ids is None else ids
    builder.emit("GATHER", [table, ids], taken, builder.options("Gather", axis=0, batchDims=0), version=2)
    return taken


def _is_of_rows_and_a_vector(graph: Graph, op: Op) -> bool:
    if op.name != "BATCH_MATMUL" or op.options.adjX or op.options.adjY:
        return False
    rows, vector = (graph.tensor(index) for index in op.inputs)
    free = any(graph.is_free(index) for index in op.inputs)
    floats = rows.dtype == vector.dtype == "float32"
    return floats and not free and len(rows.shape) == 3 and rows.shape[0] == 1 and vector.shape == (1, rows.shape[2], 1)


def _of_bytes(graph: Graph, op: Op) -> _Bytes | None:
    steps = []
    index = op.inputs[0]
    for name in ("ADD", "CAST", "RESHAPE", "GATHER"):
        maker = graph.producers.get(index)
        if maker is None or maker.name != name:
            return None
        steps.append(maker)
        index = maker.inputs[0]
    add, _, _, gather = steps
    shift, table = graph.tensor(add.inputs[1]), graph.tensor(gather.inputs[0])
    plain = gather.options.axis == 0 and gather.options.batchDims == 0 and add.options.fusedActivationFunction == 0
    if not plain or shift.data is None or shift.data.size != 1 or table.data is None or table.dtype != "uint8":
        return None
    zero = -float(shift.data.reshape(()))
    if zero != round(zero) or table.data.min() - zero < -127 or table.data.max() - zero > 127:
        return None
    return _Bytes(gather, table.data, int(zero))


GATHERED_PRODUCTS = GraphLowering(
    name="gathered-products",
    function=gathered_products,
    summary="computed rows are multiplied with the vector of a batch of one by FULLY_CONNECTED",
)
ROUNDED_PRODUCTS = GraphLowering(
    name="rounded-products",
    function=rounded_products,
    summary="rows of bytes are multiplied as they are, with inputs that are rounded to int8",
)
