"""Gives every tensor of a `.tflite` with free axes its size, for compilers that take nothing else.

A quantised network of free height and width can be calibrated on small images and then fixed to a large one; the
calibrator would else run the float network at full size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_efficient.export import flatbuffer
from keras_efficient.export.graph import Builder, Graph, Op, rebuild

__all__ = ["fix_shapes"]


def fix_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Fixes the file's shapes in place for inputs of these shapes, by name.

    Returns:
        Whether it could be done. Not, where a shape depends on values, or is computed by operators not known here.
    """
    while True:
        sizes = _sizes(path, shapes)
        graph = Graph.from_bytes(path.read_bytes())
        if not graph.single:
            return False
        folded = rebuild(graph, _fold_rule(graph, sizes))
        if folded is None:
            break
        path.write_bytes(folded.to_bytes())
    if any(op.name == "SHAPE" for op in graph.ops):
        return False
    model = flatbuffer.unpack(path.read_bytes())
    for tensor, size in zip(model.subgraphs[0].tensors, sizes, strict=False):  # the runtime adds some of its own
        tensor.shape, tensor.shapeSignature = list(size), None
    path.write_bytes(flatbuffer.pack(model))
    return True


def _sizes(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    from keras_efficient.export.runtime import LiteRTModel

    return LiteRTModel(path, delegate=False).tensor_shapes(shapes)


def _fold_rule(
    graph: Graph, sizes: Sequence[tuple[int, ...]]
) -> Callable[[Builder, Op, Mapping[int, int]], int | None]:
    return lambda builder, op, values: _folded(builder, graph, op, sizes)


def _folded(builder: Builder, graph: Graph, op: Op, sizes: Sequence[tuple[int, ...]]) -> int | None:
    """The operator's result as a constant, where it is known before the network runs."""
    if op.name == "SHAPE" and _is_certain(graph, op.inputs[0]):
        return builder.array(np.array(sizes[op.inputs[0]], np.int32))
    if op.name not in _ARITHMETIC or len(op.outputs) != 1 or graph.tensor(op.output).dtype != "int32":
        return None
    values = [graph.tensor(index).data for index in op.inputs]
    if any(value is None for value in values):
        return None
    return builder.array(np.asarray(_ARITHMETIC[op.name](op.options, *values), np.int32))


def _is_certain(graph: Graph, index: int) -> bool:
    """Whether nothing that the tensor is made from has a computed shape: those are folded in an earlier round."""
    seen, stack = set(), [index]
    while stack:
        op = graph.producers.get(stack.pop())
        if op is None or op.output in seen:
            continue
        seen.add(op.output)
        if any(graph.tensor(operand).dtype == "int32" for operand in graph.operands(op)):
            return False
        stack.extend(graph.operands(op))
    return True


def _slice(options: Any, values: np.ndarray, begin: np.ndarray, end: np.ndarray, stride: np.ndarray) -> np.ndarray:
    """STRIDED_SLICE of a vector."""
    first = None if options.beginMask & 1 else int(begin[0])
    last = None if options.endMask & 1 else int(end[0])
    if options.shrinkAxisMask & 1:
        return values[int(begin[0])]
    return values[first : last : int(stride[0])]


_ARITHMETIC: Mapping[str, Callable[..., Any]] = {
    "STRIDED_SLICE": _slice,
    "PACK": lambda options, *values: np.stack(values, options.axis),
    "CONCATENATION": lambda options, *values: np.concatenate(values, options.axis),
    "RESHAPE": lambda options, values, *shape: values.reshape(shape[0] if shape else options.newShape),
    "ADD": lambda options, a, b: a + b,
    "SUB": lambda options, a, b: a - b,
    "MUL": lambda options, a, b: a * b,
    "REDUCE_PROD": lambda options, values, axes: np.prod(values, tuple(axes), keepdims=bool(options.keepDims)),
}
