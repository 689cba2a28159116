"""Products with rows that a gather of bytes took, in integers.

The converter widens such rows to float32 before it multiplies them with the one vector of a batch of one. LiteRT's
FULLY_CONNECTED takes rows of int8 beside an input of floats, which it rounds to int8 itself; the rows may be computed.
At 32 blocks of 64 rows of 128 numbers that is a quarter of the time, and the rounding is that of precision `dynamic`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from keras_efficient.export.graph import Builder, Graph, GraphLowering, Op, rebuild

__all__ = ["GATHERED_PRODUCTS", "gathered_products"]


@dataclass(frozen=True)
class _Product:
    """``BATCH_MATMUL(ADD(CAST(RESHAPE(GATHER(table, ids))), −zero), vector)``: what it is made of."""

    gather: Op
    table: np.ndarray
    zero: int
    rows: int
    width: int
    vector: int


def gathered_products(graph: Graph) -> Graph | None:
    """Every such product of a batch of one, by a gather of int8 and a FULLY_CONNECTED."""

    def rule(builder: Builder, op: Op, values: Mapping[int, int]) -> int | None:
        found = _product(graph, op)
        if found is None:
            return None
        codes = (found.table.astype(np.int16) - found.zero).astype(np.int8)
        table = builder.array(codes, [1.0], name="rows")
        shape = (*graph.tensor(found.gather.inputs[1]).shape, codes.shape[1])
        taken = builder.computed(found.gather.output, shape, "int8", [1.0])
        ids = values.get(found.gather.inputs[1])
        ids = builder.constant(found.gather.inputs[1]) if ids is None else ids
        builder.emit("GATHER", [table, ids], taken, builder.options("Gather", axis=0, batchDims=0), version=2)
        weights = builder.reshape(taken, (found.rows, found.width))
        vector = builder.reshape(values[found.vector], (1, found.width))
        output = builder.like(op.output, (1, found.rows))
        builder.emit("FULLY_CONNECTED", [vector, weights, -1], output, builder.options("FullyConnected"), version=3)
        return builder.reshape(output, graph.tensor(op.output).shape)

    rebuilt = rebuild(graph, rule)
    return None if rebuilt is None else rebuilt.without_unused()


def _product(graph: Graph, op: Op) -> _Product | None:
    if op.name != "BATCH_MATMUL" or op.options.adjX or op.options.adjY:
        return None
    rows, vector = (graph.tensor(index) for index in op.inputs)
    free = any(graph.is_free(index) for index in op.inputs)
    if free or len(rows.shape) != 3 or rows.shape[0] != 1 or vector.shape != (1, rows.shape[2], 1):
        return None
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
    return _Product(gather, table.data, int(zero), rows.shape[1], rows.shape[2], op.inputs[1])


GATHERED_PRODUCTS = GraphLowering(
    name="gathered-products",
    function=gathered_products,
    summary="rows of bytes are multiplied as they are, with inputs that are rounded to int8",
)
