"""Scales, shifts, padding and clips as parts of what stands before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from keras_efficient.export.bolt.phases import as_phases
from keras_efficient.export.bolt.rewriting import (
    Rewriter,
    attributes_of,
    constant,
    integer,
    integers,
    nodes_of,
    producer,
    sole_producer,
    source,
    text,
)
from keras_efficient.export.bolt.standard import BINARY, DOMAIN, OURS, UNARY

if TYPE_CHECKING:
    import onnx_ir as ir

    from keras_efficient.export.bolt.shapes import Shapes

__all__ = [
    "bounds",
    "padding_explicit",
    "per_channel",
    "to_fixed_point",
]

OUTSIDE = ("Abs", "Cast", "Ceil", "Div", "Erf", "Exp", "Floor", "Neg", "Pow", "Round", "Sqrt", "Sub")  # of regions
LEAST_WEIGHT = 2.0**-13  # largest of a layer: float16's finest step, 2⁻²⁴, is as fine for it as for any larger one
MOST_WEIGHT = float(np.finfo(np.float16).max)
FEW_CHANNELS = 16  # whose product by a diagonal matrix costs nothing, since their numbers are read and written anyway


def padding_explicit(model: ir.Model, shapes: Shapes) -> None:
    """``pads`` instead of ``auto_pad``, where they do not hang on sizes that are free."""
    for node in nodes_of(model, "Conv"):
        mode, weights = text(node, "auto_pad", "NOTSET"), constant(node.inputs[1])
        if mode == "NOTSET" or weights is None or weights.ndim != 4:
            continue
        totals = [0, 0]
        if mode.startswith("SAME"):
            stride, dilation = integers(node, "strides", (1, 1)), integers(node, "dilations", (1, 1))
            found = [_same_padding(node, axis, weights, stride, dilation, shapes) for axis in (0, 1)]
            if None in found:
                continue
            totals = [one or 0 for one in found]
        less, more = [one // 2 for one in totals], [one - one // 2 for one in totals]
        pads = (*more, *less) if mode == "SAME_LOWER" else (*less, *more)
        rewriter = Rewriter(model, node)
        made = rewriter.op("Conv", node.inputs, name=node.name, **attributes_of(node) | {"pads": pads})
        shapes.learn(made, node.outputs[0])
        rewriter.replace(node.outputs[0], made)
        model.graph.remove(node, safe=True)


def _same_padding(
    node: ir.Node, axis: int, weights: np.ndarray, stride: tuple[int, ...], dilation: tuple[int, ...], shapes: Shapes
) -> int | None:
    """Zeros on both sides together; `None` where they hang on a free size."""
    reach = (weights.shape[2 + axis] - 1) * dilation[axis] + 1
    if stride[axis] == 1 or reach == 1:
        return reach - 1
    sizes = {one[2 + axis] for one in shapes[node.inputs[0]]}
    if len(sizes) != 1:
        return None
    (size,) = sizes
    return max(0, (-(-size // stride[axis]) - 1) * stride[axis] + reach - size)


def to_fixed_point(model: ir.Model, shapes: Shapes) -> None:
    """Rules that look at one node and what makes its input, over and over until none applies."""
    import onnx_ir.passes.common as common

    rules: dict[str, tuple[Callable[..., ir.Value | None], ...]] = {
        "Add": (_shift_folded,),
        "BatchNormalization": (_scale_and_shift,),
        "Clip": (_clips_merged,),
        "Conv": (_pad_folded, _turned_first, _input_factor, _input_shift),
        "ConvTranspose": (as_phases,),
        "Div": (_as_product,),
        "Gemm": (_as_matmul,),
        "MatMul": (_input_absorbed,),
        "Max": (_clips_merged,),
        "Min": (_clips_merged,),
        "Mul": (_scale_folded,),
        "Relu": (_clips_merged,),
        "Sub": (_as_sum,),
    }
    changed = True
    while changed:
        changed = False
        for node in list(model.graph):
            if node.graph is None or not any(value.uses() or value.is_graph_output() for value in node.outputs):
                continue
            for rule in (*(rules.get(node.op_type, ()) if node.domain == "" else ()), _before_shuffle):
                rewriter = Rewriter(model, node)
                made = rule(rewriter, node, shapes)
                if made is not None:
                    rewriter.replace(node.outputs[0], made)
                    changed = True
                    break
        common.RemoveUnusedNodesPass()(model)


def _constant_and_other(node: ir.Node) -> tuple[np.ndarray, ir.Value] | None:
    """The operands of a sum or product with one constant in float32."""
    for value, other in (node.inputs, node.inputs[::-1]):
        numbers = constant(value)
        if numbers is not None and numbers.dtype == np.float32 and constant(other) is None and other is not None:
            return numbers, other
    return None


def per_channel(numbers: np.ndarray, channels: int, *, rows: bool) -> np.ndarray | None:
    """(channels,) of a constant that is broadcast to N×C×H×W, or to rows; `None` if it is more than that."""
    if numbers.size == 1 and numbers.ndim <= (1 if rows else 4):
        return np.full(channels, numbers.item(), np.float32)
    wanted = (channels,) if rows else (channels, 1, 1)
    full = numbers.ndim <= (3 if rows else 4) and numbers.shape[-len(wanted) :] == wanted
    return numbers.reshape(channels) if full and numbers.size == channels else None


def _convolution(value: ir.Value) -> tuple[ir.Node, np.ndarray, np.ndarray] | None:
    """A convolution made for one reader, its constant weights and bias."""
    node = sole_producer(value, "Conv")
    weights = None if node is None else constant(node.inputs[1])
    if node is None or weights is None or weights.dtype != np.float32:
        return None
    bias = np.zeros(len(weights), np.float32)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        found = constant(node.inputs[2])
        if found is None:
            return None
        bias = found
    return node, weights, bias


def _convolution_with(rewriter: Rewriter, node: ir.Node, weights: np.ndarray, bias: np.ndarray) -> ir.Value:
    names = [source(node, 1).name, f"{node.outputs[0].name}__bias"]
    made = [rewriter.constant(one, name) for one, name in zip((weights, bias), names, strict=True)]
    return rewriter.op("Conv", [node.inputs[0], *made], name=node.name, **attributes_of(node) | _automatic(node))


def _automatic(node: ir.Node) -> dict[str, str]:
    mode = text(node, "auto_pad", "NOTSET")
    return {} if mode == "NOTSET" else {"auto_pad": mode}


def _turned_first(rewriter: Rewriter, node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """A factor or a summand before the transpose that a convolution reads goes between the two."""
    turned = sole_producer(node.inputs[0], "Transpose")
    before = None if turned is None else sole_producer(turned.inputs[0], "Add", "Mul")
    operands = None if before is None else _constant_and_other(before)
    if turned is None or before is None or operands is None or producer(operands[1], "MatMul") is not None:
        return None
    perm, (numbers, other) = integers(turned, "perm", ()), operands
    if numbers.ndim > len(perm):
        return None
    if numbers.ndim:
        numbers = numbers.reshape((1,) * (len(perm) - numbers.ndim) + numbers.shape).transpose(perm)
    first = rewriter.op("Transpose", [other], perm=perm)
    made = rewriter.op(before.op_type, [first, rewriter.constant(numbers, before.outputs[0])], name=before.name)
    return rewriter.op("Conv", [made, *node.inputs[1:]], name=node.name, **attributes_of(node) | _automatic(node))


def _input_factor(rewriter: Rewriter, node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """A factor of each channel before a convolution goes into its weights: pictures of 0 to 255 are scaled so.

    Weights that float16 would then hold more coarsely than others stay.
    """
    if (found := _summed_or_scaled(node, "Mul")) is None:
        return None
    weights, numbers, read = found
    scaled = weights * (numbers[:, None, None, None] if weights.shape[1] == 1 else numbers[:, None, None])
    if not LEAST_WEIGHT <= np.abs(scaled).max(initial=0) <= MOST_WEIGHT:
        return None
    given = [read, rewriter.constant(scaled, node.inputs[1]), *node.inputs[2:]]
    return rewriter.op("Conv", given, name=node.name, **attributes_of(node) | _automatic(node))


def _input_shift(rewriter: Rewriter, node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """A summand of each channel before a convolution goes into its bias, or is a 1×1 convolution.

    Beyond the image's border are zeros, without the summand: only what has no padding can take it.
    """
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1, np.float32)
    if (found := _summed_or_scaled(node, "Add")) is None or bias is None:
        return None
    weights, numbers, read = found
    padded = any(integers(node, "pads", (0, 0, 0, 0))) or text(node, "auto_pad", "NOTSET").startswith("SAME")
    name = f"{node.outputs[0].name}__shift"
    if not padded and weights.shape[1] == len(numbers):
        shift = rewriter.constant(bias + np.einsum("oihw,i->o", weights, numbers), name)
        return rewriter.op("Conv", [read, node.inputs[1], shift], name=node.name, **attributes_of(node))
    if len(numbers) > FEW_CHANNELS or np.abs(numbers).max() > MOST_WEIGHT:
        return None
    factor, scaled = np.ones(len(numbers), np.float32), sole_producer(read, "Mul")
    operands = None if scaled is None else _constant_and_other(scaled)
    given = None if operands is None else per_channel(operands[0], len(numbers), rows=False)
    if operands is not None and given is not None and np.abs(given).max() <= MOST_WEIGHT:
        factor, read = given, operands[1]
    made = [rewriter.constant(one, name) for one in (np.diag(factor)[:, :, None, None], numbers)]
    shifted = rewriter.op("Conv", [read, *made], name=f"before {node.name}", strides=(1, 1), pads=(0, 0, 0, 0))
    return rewriter.op("Conv", [shifted, *node.inputs[1:]], name=node.name, **attributes_of(node) | _automatic(node))


def _summed_or_scaled(node: ir.Node, kind: str) -> tuple[np.ndarray, np.ndarray, ir.Value] | None:
    """Of a convolution: its weights, and each input channel's summand or factor before it, and of what.

    What a convolution made takes them itself.
    """
    before, weights = sole_producer(node.inputs[0], kind), constant(node.inputs[1])
    operands = None if before is None else _constant_and_other(before)
    if operands is None or weights is None or weights.dtype != np.float32 or weights.ndim != 4:
        return None
    group = integer(node, "group", 1)
    numbers = per_channel(operands[0], weights.shape[1] * group, rows=False)
    if numbers is None or _convolution(operands[1]) is not None or (group > 1 and len(weights) != group):
        return None
    return (weights, numbers, operands[1]) if group == 1 or weights.shape[1] == 1 else None


def _product(value: ir.Value) -> tuple[ir.Node, np.ndarray] | None:
    """A product by a constant matrix, made for one reader."""
    node = sole_producer(value, "MatMul")
    matrix = None if node is None else constant(node.inputs[1])
    return (node, matrix) if node is not None and matrix is not None and matrix.ndim == 2 else None


def _scale_folded(rewriter: Rewriter, node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """A factor of each channel goes into the weights before it."""
    if (operands := _constant_and_other(node)) is None:
        return None
    numbers, other = operands
    if (found := _convolution(other)) is not None:
        before, weights, bias = found
        scale = per_channel(numbers, len(weights), rows=False)
        if scale is None:
            return None
        return _convolution_with(rewriter, before, weights * scale[:, None, None, None], bias * scale)
    shift, summed = None, other
    if (sum_node := sole_producer(other, "Add")) is not None and (inner := _constant_and_other(sum_node)) is not None:
        shift, summed = inner
    if (product := _product(summed)) is None:
        return None
    before, matrix = product
    scale = per_channel(numbers, matrix.shape[1], rows=True)
    shift = None if shift is None else per_channel(shift, matrix.shape[1], rows=True)
    if scale is None or (shift is None) != (summed is other):
        return None
    scaled = rewriter.constant(matrix * scale, before.inputs[1])
    made = rewriter.op("MatMul", [before.inputs[0], scaled], name=before.name)
    if shift is None:
        return made
    return rewriter.op("Add", [made, rewriter.constant(shift * scale, f"{other.name}__bias")])


def _input_absorbed(rewriter: Rewriter, node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """A factor and a summand of each column before a product go into its matrix and its bias.

    They could not go into a layer before it: an activation is between.
    """
    before, matrix = sole_producer(node.inputs[0], "Mul", "Add"), constant(node.inputs[1])
    operands = None if before is None else _constant_and_other(before)
    if before is None or operands is None or matrix is None or matrix.ndim != 2 or matrix.dtype != np.float32:
        return None
    numbers = per_channel(operands[0], len(matrix), rows=True)
    if numbers is None or _product(operands[1]) is not None:
        return None
    if before.op_type == "Mul":
        weights = rewriter.constant(matrix * numbers[:, None], node.inputs[1])
        return rewriter.op("MatMul", [operands[1], weights], name=node.name)
    made = rewriter.op("MatMul", [operands[1], node.inputs[1]], name=node.name)
    return rewriter.op("Add", [made, rewriter.constant(numbers @ matrix, f"{node.outputs[0].name}__bias")])


def _shift_folded(rewriter: Rewriter, node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """A summand of each channel goes into the bias before it."""
    if (operands := _constant_and_other(node)) is None:
        return None
    numbers, other = operands
    if numbers.ndim == 0 and not numbers:
        return other
    if (found := _convolution(other)) is not None:
        before, weights, bias = found
        shift = per_channel(numbers, len(weights), rows=False)
        return None if shift is None else _convolution_with(rewriter, before, weights, bias + shift)
    sum_node = sole_producer(other, "Add")
    inner = None if sum_node is None else _constant_and_other(sum_node)
    product = None if inner is None else _product(inner[1])
    if inner is None or product is None:
        return None
    shifts = [per_channel(one, product[1].shape[1], rows=True) for one in (numbers, inner[0])]
    if shifts[0] is None or shifts[1] is None:
        return None
    return rewriter.op("Add", [inner[1], rewriter.constant(shifts[0] + shifts[1], f"{other.name}__bias")])


def _as_product(rewriter: Rewriter, node: ir.Node, shapes: Shapes) -> ir.Value | None:
    numbers = constant(node.inputs[1])
    if numbers is None or numbers.dtype != np.float32 or not numbers.all():
        return None
    return rewriter.op("Mul", [node.inputs[0], rewriter.constant(1 / numbers, f"{source(node, 1).name}__inverse")])


def _as_sum(rewriter: Rewriter, node: ir.Node, shapes: Shapes) -> ir.Value | None:
    numbers = constant(node.inputs[1])
    if numbers is None or numbers.dtype != np.float32:
        return None
    return rewriter.op("Add", [node.inputs[0], rewriter.constant(-numbers, f"{source(node, 1).name}__negative")])


def _is_matrix(value: ir.Value, shapes: Shapes) -> bool:
    """Whether a product of a matrix of rows, with or without a bias, made `value`."""
    summed = sole_producer(value, "Add")
    inner = None if summed is None else _constant_and_other(summed)
    product = _product(value if inner is None else inner[1])
    return product is not None and shapes.rank(product[0].inputs[0]) == 2


def _scale_and_shift(rewriter: Rewriter, node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """Batch normalisation as it is at inference, behind something that it can be folded into."""
    found = [constant(value) for value in node.inputs[1:]]
    images = sole_producer(node.inputs[0], "Conv", "ConvTranspose", "DepthToSpace") is not None
    rows = _is_matrix(source(node), shapes)
    if None in [None if one is None else 0 for one in found] or not (images or rows) or len(node.outputs) > 1:
        return None
    scale, shift, mean, variance = (one.astype(np.float64) for one in found if one is not None)
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    factor = scale / np.sqrt(variance + epsilon)
    made = node.inputs[0]
    for kind, numbers in (("Mul", factor), ("Add", shift - mean * factor)):
        numbers = numbers.astype(np.float32)
        numbers = numbers[:, None, None] if images else numbers
        made = rewriter.op(kind, [made, rewriter.constant(numbers, f"{node.outputs[0].name}__{kind.lower()}")])
    return made


def _as_matmul(rewriter: Rewriter, node: ir.Node, shapes: Shapes) -> ir.Value | None:
    matrix = constant(node.inputs[1])
    given = [node.attributes[name].as_float() if name in node.attributes else 1.0 for name in ("alpha", "beta")]
    turned = [integer(node, name) for name in ("transA", "transB")]
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1, np.float32)
    if matrix is None or matrix.dtype != np.float32 or turned[0] or bias is None:
        return None
    matrix = (matrix.T if turned[1] else matrix) * np.float32(given[0])
    made = rewriter.op("MatMul", [node.inputs[0], rewriter.constant(matrix, node.inputs[1])], name=node.name)
    shift = per_channel(bias * np.float32(given[1]), matrix.shape[1], rows=True)
    if shift is None:
        return None
    return rewriter.op("Add", [made, rewriter.constant(shift, f"{node.outputs[0].name}__bias")])


def bounds(node: ir.Node | None) -> tuple[float, float] | None:
    """Of a node that clips by constants: from where to where."""
    if node is None or node.domain != "":
        return None
    if node.op_type == "Relu":
        return 0.0, float("inf")
    if node.op_type == "Clip":
        given = [node.inputs[i] if i < len(node.inputs) else None for i in (1, 2)]
        numbers = [constant(value) for value in given]
        if any(
            value is not None and (one is None or one.size != 1 or one.dtype != np.float32)
            for value, one in zip(given, numbers, strict=True)
        ):
            return None
        low, high = (None if one is None else float(one.item()) for one in numbers)
        return float("-inf") if low is None else low, float("inf") if high is None else high
    operands = _constant_and_other(node) if node.op_type in ("Min", "Max") and len(node.inputs) == 2 else None
    if operands is not None and operands[0].ndim == 0:
        number = float(operands[0])
        return (float("-inf"), number) if node.op_type == "Min" else (number, float("inf"))
    return None


def _clipped(node: ir.Node) -> ir.Value:
    """What a node that clips reads."""
    return next(value for value in node.inputs if value is not None and constant(value) is None)


def _clips_merged(rewriter: Rewriter, node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """Clips behind each other are one; minima and maxima with a number are clips."""
    if (second := bounds(node)) is None:
        return None
    read = _clipped(node)
    before = sole_producer(read, "Relu", "Clip", "Min", "Max")
    first = bounds(before)
    if first is None or before is None:
        if node.op_type not in ("Min", "Max"):
            return None
        low, high = second
    else:
        read = _clipped(before)
        low, high = (min(max(one, second[0]), second[1]) for one in first)
    if (low, high) == (0.0, float("inf")):
        return rewriter.op("Relu", [read], name=node.name)
    limits = [
        None if np.isinf(one) else rewriter.constant(np.float32(one).reshape(()), f"{node.outputs[0].name}__{name}")
        for one, name in ((low, "low"), (high, "high"))
    ]
    return rewriter.op("Clip", [read, *limits], name=node.name)


def _pad_folded(rewriter: Rewriter, node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """Zeros around an image that a convolution reads are its padding."""
    pad = sole_producer(node.inputs[0], "Pad")
    if pad is None or text(pad, "mode", "constant") != "constant" or _automatic(node):
        return None
    sizes, fill = constant(pad.inputs[1]), constant(pad.inputs[2]) if len(pad.inputs) > 2 else None
    if len(pad.inputs) > 3 and pad.inputs[3] is not None:
        return None
    if len(pad.inputs) > 2 and pad.inputs[2] is not None and (fill is None or fill.any()):
        return None
    if sizes is None or sizes.shape != (8,) or sizes.min() < 0 or sizes[[0, 1, 4, 5]].any():
        return None
    old = integers(node, "pads", (0, 0, 0, 0))
    pads = [a + int(b) for a, b in zip(old, sizes[[2, 3, 6, 7]], strict=True)]
    made = [pad.inputs[0], *node.inputs[1:]]
    return rewriter.op("Conv", made, name=node.name, **attributes_of(node) | {"pads": pads})


def _before_shuffle(rewriter: Rewriter, node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """What a region takes, or a convolution, behind a depth to space works as well before it.

    All else would part it from its layer.
    """
    unary = node.op_type in UNARY if node.domain == "" else node.domain == DOMAIN and node.op_type in OURS
    if not unary and not (node.domain == "" and node.op_type in BINARY and len(node.inputs) == 2):
        return None
    inputs = list(node.inputs)
    place = 0 if unary or constant(inputs[0]) is None else 1
    shuffle = sole_producer(inputs[place], "DepthToSpace")
    if shuffle is None or text(shuffle, "mode", "DCR") != "DCR":
        return None
    if node.op_type in ("Add", "Mul", *OUTSIDE) and (unary or producer(shuffle.inputs[0], "Conv") is None):
        return None
    block = integer(shuffle, "blocksize")
    if not unary:
        numbers = constant(inputs[1 - place])
        if numbers is None:
            return None
        if numbers.size > 1:
            if numbers.ndim not in (3, 4) or numbers.shape[-2:] != (1, 1) or numbers.size != numbers.shape[-3]:
                return None
            tiled = np.tile(numbers.reshape(-1), block**2)[:, None, None]
            inputs[1 - place] = rewriter.constant(tiled, inputs[1 - place])
    inputs[place] = shuffle.inputs[0]
    made = rewriter.op(node.op_type, inputs, domain=node.domain, name=node.name, **attributes_of(node))
    return rewriter.op("DepthToSpace", [made], name=shuffle.name, **attributes_of(shuffle))
