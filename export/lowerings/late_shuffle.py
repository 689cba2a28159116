"""Elementwise operators before a depth-to-space instead of after it, where they join the convolution's own passes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from keras_efficient.export.graph import Builder, Graph, GraphLowering, Op, rebuild
from keras_efficient.export.lowerings.row_phases import ELEMENTWISE, find_shuffle

__all__ = ["LATE_SHUFFLE", "shuffle_last"]


def shuffle_last(graph: Graph) -> Graph | None:
    """``f(shuffle(x))`` becomes ``shuffle(f(x))`` for every operator that treats all numbers alike."""
    moved = _one_step(graph)
    while moved is not None and (again := _one_step(moved)) is not None:
        moved = again
    return moved


def _one_step(graph: Graph) -> Graph | None:
    def rule(builder: Builder, op: Op, values: Mapping[int, int]) -> int | None:
        operands = graph.operands(op)
        if op.name not in ELEMENTWISE or len(operands) != 1:
            return None
        constants = [graph.tensor(index) for index in op.inputs if index not in operands and index >= 0]
        producer = graph.producers.get(operands[0])
        if producer is None or any(np.prod(constant.shape, dtype=int) != 1 for constant in constants):
            return None
        shuffle = find_shuffle(graph, producer)
        if shuffle is None or len(graph.consumers(operands[0])) != 1 or operands[0] in graph.outputs:
            return None
        early = builder.copy(op, {operands[0]: values[shuffle.source]}, graph.tensor(shuffle.source).shape)
        result = builder.like(op.output, graph.tensor(op.output).shape)
        options = builder.options("DepthToSpace", blockSize=shuffle.block)
        return builder.emit("DEPTH_TO_SPACE", [early], result, options, version=2)

    moved = rebuild(graph, rule)
    return None if moved is None else moved.without_unused()


LATE_SHUFFLE = GraphLowering(
    name="shuffle-last",
    function=shuffle_last,
    summary="elementwise operators after a depth-to-space are done before it",
)
