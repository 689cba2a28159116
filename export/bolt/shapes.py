"""Shapes of everything in a network whose sizes may be free, found by trials.

At several sizes of the inputs all shapes are computed, and what holds for each of them counts as known. Two values that
are added have one size anyway, or one of them is repeated along an axis of size 1; trials tell these cases apart.
"""

from __future__ import annotations

from collections.abc import Set
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from keras_efficient.export.bolt.rewriting import Rewriter, constant, folded, nodes_of
from keras_efficient.export.bolt.standard import DOMAIN, OURS

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "Shapes",
]


class Shapes:
    """Shapes of all values of a model, at several sizes of its free axes.

    ``shapes[value]``: a tuple with a shape for each trial; empty where one is not known.
    """

    TRIALS = ((2, 64, 128, 192), (3, 128, 192, 64), (2, 67, 94, 75), (1, 45, 38, 57))

    def __init__(self, model: ir.Model):
        self.graphs: list[dict[str, ir.Node]] = []
        self._shapes: list[dict[str, tuple[int, ...]]] = []
        names = {value.name for node in model.graph for value in node.outputs} | {v.name for v in model.graph.inputs}
        for sizes in self.TRIALS:
            if (found := _tried(model, sizes)) is not None:
                self.graphs.append({value.name: node for node in found.graph for value in node.outputs})
                self._shapes.append(_known_shapes(found.graph, names))
            if found is not None and not _has_free_axes(model):
                break
        if _has_free_axes(model) and len(self._shapes) < 2:  # of one trial nobody knows what hangs on the sizes
            self.graphs, self._shapes = [], []

    def __getitem__(self, value: ir.Value | None) -> tuple[tuple[int, ...], ...]:
        if value is None:
            return ()
        if (numbers := constant(value)) is not None:
            return tuple(numbers.shape for _ in self._shapes)
        found = tuple(one[value.name] for one in self._shapes if value.name in one)
        return found if len(found) == len(self._shapes) else ()

    def learn(self, new: ir.Value, old: ir.Value) -> None:
        """A value that was made since has the shapes of another."""
        for one in self._shapes:
            if old.name in one:
                one[new.name] = one[old.name]

    def rank(self, value: ir.Value | None) -> int | None:
        found = self[value]
        return len(found[0]) if found else None

    def elements(self, value: ir.Value | None) -> int:
        """Numbers in `value`, free axes counted as 1."""
        found = self[value]
        return prod(sizes[0] for sizes in zip(*found, strict=True) if len(set(sizes)) == 1) if found else 0

    def constants(self, value: ir.Value, index: int) -> list[np.ndarray | None]:
        """In each trial, the numbers of an input of the node that makes `value`."""
        found = []
        for graph in self.graphs:
            node = graph.get(value.name)
            found.append(None if node is None or index >= len(node.inputs) else constant(node.inputs[index]))
        return found


def _has_free_axes(model: ir.Model) -> bool:
    return any(not isinstance(size, int) for value in model.graph.inputs for size in value.shape or ())


def _tried(model: ir.Model, sizes: tuple[int, ...]) -> ir.Model | None:
    """A copy whose free axes have these sizes, computed through; `None` where that is impossible."""
    import onnx_ir as ir

    model = model.clone()
    named: dict[str, int] = {}
    for value in model.graph.inputs:
        found = list(value.shape or ())
        for axis, size in enumerate(found):
            if not isinstance(size, int):
                name = size.value or f"{value.name}.{axis}"
                found[axis] = named.setdefault(name, sizes[min(axis, 3)])
        value.shape = ir.Shape(found) if value.shape is not None else None
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type in OURS:  # unknown to ONNX; the sizes are those of any activation
            node.domain, node.op_type = "", "Relu"
        for value in node.outputs:
            value.shape = None
    try:
        folded(model, onnx_shape_inference=True)
        while _splits_folded(model):
            folded(model, onnx_shape_inference=True)
    except Exception:  # of a network that cannot have these sizes
        return None
    return model


def _splits_folded(model: ir.Model) -> bool:
    """Splits of constants into single numbers, which the library leaves; whether there were any."""
    found = False
    for node in nodes_of(model, "Split"):
        numbers = constant(node.inputs[0])
        if numbers is not None and numbers.shape == (len(node.outputs),) and any(one.uses() for one in node.outputs):
            rewriter, found = Rewriter(model, node), True
            for index, value in enumerate(node.outputs):
                rewriter.replace(value, rewriter.constant(numbers[index : index + 1], f"{value.name}__part"))
    return found


def _known_shapes(graph: ir.Graph, names: Set[str | None]) -> dict[str, tuple[int, ...]]:
    found = {}
    for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
        if value.name in names and value.shape is not None and all(isinstance(size, int) for size in value.shape):
            found[value.name] = tuple(value.shape)
    return found
