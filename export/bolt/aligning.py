"""Channels inside of a network made a multiple of a unit: what reads numbers one by one reads 16 bytes at once then.

Layers get filters of zeros, and their readers zero weights for these, so that no number of the network changes. Inputs
and outputs of the file stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from keras_efficient.export.bolt.rewriting import Rewriter, constant, integer, source

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["aligned"]

LAYERS = ("Conv", "MatMul")
STEPS = (
    "Add",
    "Clip",
    "Gelu",
    "GeluTanh",
    "HardSwish",
    "LeakyRelu",
    "PRelu",
    "Relu",
    "Sigmoid",
    "Silu",
    "Softplus",
    "Tanh",
)


def aligned(model: ir.Model, unit: int) -> int:
    """Pads the channels of all values for which that is possible.

    Args:
        model: normalised; it is changed.
        unit: that channels are to be a multiple of.

    Returns:
        How many layers got more filters.
    """
    count = 0
    seen: set[ir.Value] = set()
    for node in list(model.graph):
        value = node.outputs[0]
        if not _is_layer(node) or value in seen:
            continue
        together = _together(value)
        seen |= together
        channels = _filters(node)
        more = -channels % unit
        if more and all(_can_grow(one, channels) for one in together):
            count += _grown(model, together, channels, more)
    return count


def _is_layer(node: ir.Node | None) -> bool:
    """Whether it is a layer of constant weights, whose filters are its own."""
    if node is None or node.domain or node.op_type not in LAYERS:
        return False
    weights = constant(node.inputs[1])
    return weights is not None and weights.ndim == (4 if node.op_type == "Conv" else 2)


def _is_depthwise(node: ir.Node) -> bool:
    weights = constant(node.inputs[1]) if node.op_type == "Conv" else None
    return weights is not None and weights.shape[1] == 1 and integer(node, "group", 1) == len(weights) > 1


def _filters(node: ir.Node) -> int:
    weights = constant(node.inputs[1])
    assert weights is not None
    return int(weights.shape[0 if node.op_type == "Conv" else 1])


def _passes(node: ir.Node | None) -> bool:
    """Whether a node's output has the channels of what it reads, number for number."""
    if node is None:
        return False
    return node.op_type in STEPS or (_is_layer(node) and _is_depthwise(node))


def _partners(value: ir.Value) -> Iterator[ir.Value]:
    """Values that must have as many channels."""
    nodes = [use.node for use in value.uses()] + [value.producer()]
    for node in nodes:
        if node is None or not _passes(node):
            continue
        given = node.inputs if node.op_type == "Add" else node.inputs[:1]
        yield from (one for one in given if one is not None and one.const_value is None)
        yield node.outputs[0]


def _together(value: ir.Value) -> set[ir.Value]:
    found, left = {value}, [value]
    while left:
        for one in _partners(left.pop()):
            if one not in found:
                found.add(one)
                left.append(one)
    return found


def _can_grow(value: ir.Value, channels: int) -> bool:
    node = value.producer()
    if node is None or value.is_graph_output():
        return False
    makes = _passes(node) or (_is_layer(node) and integer(node, "group", 1) == 1 and _filters(node) == channels)
    numbers = all(
        _axis(one, channels) is not None
        for one in node.inputs[(0 if node.op_type == "Add" else 1) :]
        if _passes(node) and not _is_layer(node) and one is not None and one.const_value is not None
    )
    return makes and numbers and all(_can_read(use.node, use.idx, value, channels) for use in value.uses())


def _can_read(node: ir.Node, place: int, value: ir.Value, channels: int) -> bool:
    made = value.producer()
    if made is None or node.graph is not made.graph:  # inside of a loop
        return False
    if _passes(node):
        return True
    if not _is_layer(node) or place != 0:
        return False
    weights = constant(node.inputs[1])
    axis = 1 if node.op_type == "Conv" else 0
    return weights is not None and integer(node, "group", 1) == 1 and weights.shape[axis] == channels


def _axis(value: ir.Value | None, channels: int) -> int | None:
    """Of a constant beside the channels: the one that has them, or -1, where one number is for all."""
    numbers = constant(value)
    if numbers is None or numbers.size == 1:
        return -1
    axes = [axis for axis, size in enumerate(numbers.shape) if size != 1]
    return axes[0] if len(axes) == 1 and numbers.shape[axes[0]] == channels else None


def _grown(model: ir.Model, together: set[ir.Value], channels: int, more: int) -> int:
    count = 0
    for node in list(model.graph):
        own = node.outputs[0] in together
        if not own and together.isdisjoint(node.inputs):
            continue
        if not _is_layer(node):
            for place in range(len(node.inputs)):
                axis = _axis(node.inputs[place], channels) if constant(node.inputs[place]) is not None else -1
                if axis is not None and axis >= 0:
                    _pad(model, node, place, axis, more)
            continue
        reads = node.inputs[0] in together
        is_conv, depthwise = node.op_type == "Conv", _is_depthwise(node)
        if depthwise:
            import onnx_ir as ir

            node.attributes["group"] = ir.AttrInt64("group", channels + more)
        if own:
            count += not depthwise
            _pad(model, node, 1, 0 if is_conv else 1, more)
            if len(node.inputs) > 2 and node.inputs[2] is not None:
                _pad(model, node, 2, 0, more)
        if reads and not depthwise:
            _pad(model, node, 1, 1 if is_conv else 0, more)
    for value in together:
        value.shape = None
    return count


def _pad(model: ir.Model, node: ir.Node, place: int, axis: int, more: int) -> None:
    """Zeros behind a constant, which gets a name of its own: others may have the same one."""
    numbers = constant(source(node, place))
    assert numbers is not None
    widths = [(0, more if one == axis else 0) for one in range(numbers.ndim)]
    node.replace_input_with(place, Rewriter(model, node).constant(np.pad(numbers, widths), node.inputs[place]))
