"""Transposed convolutions as convolutions that make all places of a block, before a depth to space."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from keras_efficient.export.bolt.rewriting import (
    Rewriter,
    attributes_of,
    constant,
    integer,
    integers,
    nodes_of,
    producer,
    text,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from keras_efficient.export.bolt.shapes import Shapes

__all__ = [
    "as_phases",
    "cut_transposed",
    "why_not_phases",
]


def cut_transposed(model: ir.Model, shapes: Shapes) -> None:
    """Transposed convolutions that are cut to a multiple of their input, whatever its size, get padding instead."""
    for node in nodes_of(model, "Slice"):
        before = producer(node.inputs[0], "ConvTranspose")
        others = {use.node.op_type for use in node.inputs[0].uses() if use.node is not node} - {"Shape"}
        if before is None or others or node.inputs[0].is_graph_output():
            continue
        last = node
        users = [use.node for use in node.outputs[0].uses()]
        if len(users) == 1 and users[0].op_type == "Pad":
            last = users[0]
        weights, x = constant(before.inputs[1]), shapes[before.inputs[0]]
        stride = integers(before, "strides", (1, 1))
        plain = not any(integers(before, "pads", (0,))) and text(before, "auto_pad", "NOTSET") == "NOTSET"
        if weights is None or weights.ndim != 4 or not x or not plain or "output_shape" in before.attributes:
            continue
        cut = [size - step for size, step in zip(weights.shape[2:], stride, strict=True)]
        if min(cut) < 0:
            continue
        start = [one // 2 for one in cut]
        wanted = [(s[0], weights.shape[1], s[2] * stride[0], s[3] * stride[1]) for s in x]
        starts, axes = shapes.constants(node.outputs[0], 1), shapes.constants(node.outputs[0], 3)
        pads = shapes.constants(last.outputs[0], 1) if last is not node else [np.zeros(8)] * len(x)
        right = all(
            one is not None and axis is not None and one.tolist() == start and axis.tolist() == [2, 3]
            for one, axis in zip(starts, axes, strict=True)
        )
        if (
            right
            and all(one is not None and not one.any() for one in pads)
            and shapes[last.outputs[0]] == tuple(wanted)
        ):
            rewriter = Rewriter(model, node)
            padding = (*start, *(one - first for one, first in zip(cut, start, strict=True)))
            made = rewriter.op(
                "ConvTranspose", before.inputs, name=before.name, **attributes_of(before) | {"pads": padding}
            )
            rewriter.replace(last.outputs[0], made)


def why_not_phases(node: ir.Node) -> str | None:
    """Why a transposed convolution is no convolution before a depth to space; `None` if it is one."""
    weights = constant(node.inputs[1])
    if weights is None or (len(node.inputs) > 2 and node.inputs[2] is not None and constant(node.inputs[2]) is None):
        return "its weights are not constant"
    if weights.ndim != 4:
        return f"a convolution over {weights.ndim - 2} axes"
    if integer(node, "group", 1) != 1:
        return "a transposed convolution of groups"
    if set(integers(node, "dilations", (1, 1))) != {1}:
        return "a transposed convolution with dilation"
    stride = integers(node, "strides", (1, 1))
    if stride[0] != stride[1]:
        return "a transposed convolution with two strides"
    if "output_shape" in node.attributes:
        return "a transposed convolution with a size of its output"
    if not text(node, "auto_pad", "NOTSET").startswith("SAME"):
        more = integers(node, "output_padding", (0, 0))
        pads = integers(node, "pads", (0, 0, 0, 0))
        wanted = [size - stride[0] + one for size, one in zip(weights.shape[2:], more, strict=True)]
        if [pads[0] + pads[2], pads[1] + pads[3]] != wanted:
            return "a transposed convolution whose output is no multiple of its input"
    elif min(weights.shape[2:]) < stride[0]:
        return "a transposed convolution with gaps"
    return None


def as_phases(rewriter: Rewriter, node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """A transposed convolution as a convolution that makes all places of a block, and a depth to space.

    With ``t = r + begin - d·stride`` the weight of place `r` of a block for the pixel at distance `d` is ``w[t]``.
    """
    if why_not_phases(node) is not None:
        return None
    weights = constant(node.inputs[1])
    assert weights is not None
    channels, filters, *sizes = weights.shape
    stride = integers(node, "strides", (1, 1))[0]
    begins = list(integers(node, "pads", (0, 0, 0, 0))[:2])
    mode = text(node, "auto_pad", "NOTSET")
    if mode.startswith("SAME"):
        totals = [size - stride for size in sizes]
        begins = [one - one // 2 if mode == "SAME_LOWER" else one // 2 for one in totals]
    first = [-((size - 1 - begin) // stride) for size, begin in zip(sizes, begins, strict=True)]
    last = [(stride - 1 + begin) // stride for begin in begins]
    first = [min(one, 0) for one in first]
    phases = np.zeros((stride, stride, filters, channels, *(b - a + 1 for a, b in zip(first, last, strict=True))))
    for row, column, down, right in np.ndindex(stride, stride, *phases.shape[4:]):
        y = row + begins[0] - (down + first[0]) * stride
        x = column + begins[1] - (right + first[1]) * stride
        if 0 <= y < sizes[0] and 0 <= x < sizes[1]:
            phases[row, column, :, :, down, right] = weights[:, :, y, x].T
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    bias = np.zeros(filters, np.float32) if bias is None else bias
    given = [phases.reshape(-1, channels, *phases.shape[4:]).astype(np.float32), np.tile(bias, stride**2)]
    names = [f"{node.outputs[0].name}__{name}" for name in ("phases", "bias")]
    values = [rewriter.constant(one, name) for one, name in zip(given, names, strict=True)]
    pads = (-first[0], -first[1], *last)
    made = rewriter.op("Conv", [node.inputs[0], *values], name=node.name, pads=pads, strides=(1, 1))
    return made if stride == 1 else rewriter.op("DepthToSpace", [made], blocksize=stride, mode="DCR")
