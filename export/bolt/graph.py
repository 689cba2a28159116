"""An ONNX file in the form that `partition` reads: what a region can compute stands in one spelling only.

    constants     folded; scales and shifts of channels (batch normalisation) are in weights and biases
    PReLU, GELU   and SiLU, hard-swish, clip, which converters write as several nodes, are one node each
    convolutions  have explicit padding; transposed ones are convolutions of phases before a depth to space
    depth to space is behind everything that works on single numbers
    transposes    between layouts cancel each other wherever only such work lies between them

The file still runs everywhere: operators that ONNX does not have in this opset are functions of the domain `DOMAIN`.

Sizes that are free in the file are tried: at several sizes of the inputs all shapes are computed, and what holds for
each of them counts as known. Two values that are added have one size anyway, or one of them is repeated along an axis
of size 1; trials tell these cases apart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_efficient.errors import ConversionError
from keras_efficient.export.bolt.standard import DOMAIN, function

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = [
    "NCHW",
    "NHWC",
    "Rewriter",
    "Shapes",
    "bounds",
    "constant",
    "integer",
    "integers",
    "normalised",
    "normalised_ir",
    "per_channel",
    "sink_transposes",
    "text",
    "tidied",
    "why_not_phases",
]

OLDEST_OPSET, NEWEST_OPSET = 13, 19  # between them the operators that are read here mean the same
UNARY = frozenset(
    ("Clip", "Erf", "Exp", "HardSwish", "LeakyRelu", "Neg", "Relu", "Sigmoid", "Softplus", "Sqrt", "Tanh")
)
BINARY = frozenset(("Add", "Div", "Max", "Min", "Mul", "PRelu", "Pow", "Sub"))
OURS = frozenset(("Gelu", "GeluTanh", "Silu"))
NHWC, NCHW = (0, 2, 3, 1), (0, 3, 1, 2)


def normalised(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same function in one spelling, as this file's head tells; normal models come back as they are.

    Raises:
        ConversionError: an opset that is not read, or no valid model.
    """
    import onnx_ir as ir

    return ir.serde.serialize_model(normalised_ir(model))


def normalised_ir(proto: onnx.ModelProto) -> ir.Model:
    """`normalised` for those who go on rewriting."""
    import onnx_ir as ir

    opsets = {one.domain or "": one.version for one in proto.opset_import}
    if not OLDEST_OPSET <= opsets.get("", 0) <= NEWEST_OPSET:
        raise ConversionError(
            f"The file has opset {opsets.get('')}; {OLDEST_OPSET} to {NEWEST_OPSET} are read.",
            hint="Export it again: keras_efficient.export.save writes opset 18.",
        )
    try:
        model = ir.serde.deserialize_model(proto)
        cleaned(model)
    except Exception as err:  # onnx_ir raises ValueError, TypeError, KeyError, … for what is no model
        raise ConversionError(f"The file is no valid ONNX model: {str(err).splitlines()[0][:300]}") from err
    shapes = Shapes(model)
    _plain_scalars(model, shapes)
    _reshapes(model, shapes)
    _products_of_rows(model, shapes)
    _cut_transposed(model, shapes)
    tidied(model)
    sink_transposes(model)
    _recognised(model)
    shapes = Shapes(model)
    _padding_explicit(model, shapes)
    _to_fixed_point(model, shapes)
    sink_transposes(model)
    tidied(model)
    return model


def cleaned(model: ir.Model) -> None:
    """Constants folded into initializers, identities gone."""
    import onnx_ir.passes.common as common

    common.RemoveInitializersFromInputsPass()(model)
    _folded(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.IdentityEliminationPass()(model)
    tidied(model)


def _folded(model: ir.Model, **options: Any) -> None:
    """Constants folded by the library, which prints a line on each node that it cannot fold."""
    from onnxscript.optimizer import fold_constants

    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        fold_constants(model, **options)
    finally:
        logger.setLevel(level)


def _splits_folded(model: ir.Model) -> bool:
    """Splits of constants into single numbers, which the library leaves; whether there were any."""
    found = False
    for node in _nodes(model, "Split"):
        numbers = constant(node.inputs[0])
        if numbers is not None and numbers.shape == (len(node.outputs),) and any(one.uses() for one in node.outputs):
            rewriter, found = Rewriter(model, node), True
            for index, value in enumerate(node.outputs):
                rewriter.replace(value, rewriter.constant(numbers[index : index + 1], f"{value.name}__part"))
    return found


def tidied(model: ir.Model) -> None:
    """What nobody reads is gone, nodes are in order, and shapes inside are forgotten."""
    import onnx_ir.passes.common as common

    for one in (
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.TopologicalSortPass(),
    ):
        one(model)
    for node in model.graph:  # what was known of a value may have been another's
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None


# ---------------------------------------------------------------------------------------------------- reading a graph


def constant(value: ir.Value | None) -> np.ndarray | None:
    """A constant's numbers; `None` for what is computed, or missing."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def integers(node: ir.Node, name: str, default: Sequence[int]) -> tuple[int, ...]:
    """An attribute of integers."""
    return tuple(node.attributes[name].as_ints()) if name in node.attributes else tuple(default)


def integer(node: ir.Node, name: str, default: int = 0) -> int:
    """An attribute that is one integer."""
    return int(node.attributes[name].as_int()) if name in node.attributes else default


def text(node: ir.Node, name: str, default: str) -> str:
    """An attribute of text."""
    return node.attributes[name].as_string() if name in node.attributes else default


def _producer(value: ir.Value | None, *kinds: str) -> ir.Node | None:
    """The node that makes `value`, if it is one of these operators."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type in kinds else None


def _made_by(value: ir.Value | None, *kinds: str) -> ir.Node | None:
    """The same, if `value` is made for one reader only."""
    alone = value is not None and len(value.uses()) == 1 and not value.is_graph_output()
    return _producer(value, *kinds) if alone else None


class Shapes:
    """Shapes of all values of a model, at several sizes of its free axes.

    ``shapes[value]``: a tuple with a shape for each trial; empty where one is not known.
    """

    TRIALS = ((2, 64, 128, 192), (3, 128, 192, 64), (2, 67, 94, 75), (1, 45, 38, 57))

    def __init__(self, model: ir.Model):
        self.graphs: list[dict[str, ir.Node]] = []
        self._shapes: list[dict[str, tuple[int, ...]]] = []
        for sizes in self.TRIALS:
            if (found := _tried(model, sizes)) is not None:
                self.graphs.append({value.name: node for node in found.graph for value in node.outputs})
                self._shapes.append(_known_shapes(found.graph))
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

    model, named = model.clone(), {}
    for value in model.graph.inputs:
        if value.shape is not None:
            for axis, size in enumerate(value.shape):
                if not isinstance(size, int):
                    named.setdefault(str(size), sizes[min(axis, 3)])
            value.shape = ir.Shape([s if isinstance(s, int) else named[str(s)] for s in value.shape])
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type in OURS:  # unknown to ONNX; the sizes are those of any activation
            node.domain, node.op_type = "", "Relu"
        for value in node.outputs:
            value.shape = None
    try:
        _folded(model, onnx_shape_inference=True)
        while _splits_folded(model):
            _folded(model, onnx_shape_inference=True)
    except Exception:  # of a network that cannot have these sizes
        return None
    return model


def _known_shapes(graph: ir.Graph) -> dict[str, tuple[int, ...]]:
    found = {}
    for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
        if value.shape is not None and all(isinstance(size, int) for size in value.shape):
            found[value.name] = tuple(value.shape)
    return found


# --------------------------------------------------------------------------------------------------- changing a graph


class Rewriter:
    """Makes nodes before `node`, and puts a value in the place of another."""

    def __init__(self, model: ir.Model, node: ir.Node):
        self.graph, self.node = model.graph, node

    def constant(self, numbers: np.ndarray, name: str) -> ir.Value:
        """A new initializer; names are made different from all others."""
        import onnx_ir as ir

        taken, free = self.graph.initializers, name
        while free in taken:
            name_and_number = free.rsplit("~", 1)
            free = f"{name_and_number[0]}~{int(name_and_number[1]) + 1 if len(name_and_number) > 1 else 1}"
        value = ir.Value(name=free, const_value=ir.tensor(np.array(numbers, order="C"), name=free))
        value.shape, value.type = ir.Shape(numbers.shape), ir.TensorType(ir.DataType.from_numpy(numbers.dtype))
        self.graph.register_initializer(value)
        return value

    def op(self, kind: str, inputs: Sequence[ir.Value | None], *, domain: str = "", **attributes: Any) -> ir.Value:
        import onnx_ir as ir

        made = ir.node(kind, inputs, attributes, domain=domain)
        self.graph.insert_before(self.node, made)
        return made.outputs[0]

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Everything that reads `old` reads `new`; an output of the file keeps its name."""
        if old.is_graph_output():
            if new.is_graph_output() or new.is_graph_input() or new.const_value is not None:
                new = self.op("Identity", [new])
            name, old.name = old.name, f"{old.name}__before"
            new.name, new.shape, new.type = name, old.shape, old.type
        old.replace_all_uses_with(new, replace_graph_outputs=True)


def _nodes(model: ir.Model, *kinds: str) -> Iterator[ir.Node]:
    """Nodes of the main graph, as it is now, of these operators."""
    for node in list(model.graph):
        if node.graph is not None and node.domain == "" and (not kinds or node.op_type in kinds):
            yield node


def _plain_scalars(model: ir.Model, shapes: Shapes) -> None:
    """Constants with one number have no axes where that changes nothing."""
    for node in _nodes(model, *BINARY - {"PRelu"}):
        for index, value in enumerate(node.inputs):
            numbers, other = constant(value), node.inputs[1 - index] if len(node.inputs) == 2 else None
            if numbers is not None and numbers.size == 1 and numbers.ndim and other is not None:
                if (shapes.rank(other) or 0) >= numbers.ndim:
                    node.replace_input_with(index, Rewriter(model, node).constant(numbers.reshape(()), value.name))


def _reshapes(model: ir.Model, shapes: Shapes) -> None:
    """Reshapes that change nothing are left out; those that move one channel to another place are transposes."""
    kinds = ("Reshape", "Squeeze", "Unsqueeze")
    for node in _nodes(model, *kinds):
        wanted, source, best = shapes[node.outputs[0]], node.inputs[0], None
        while wanted and source is not None:
            found = shapes[source]
            if found == wanted:
                best = (source, None)
            elif found and len(found[0]) == 4 and all(one[3] == 1 for one in found):
                if wanted == tuple(tuple(one[axis] for axis in NCHW) for one in found):
                    best = (source, NCHW)
            elif found and len(found[0]) == 4 and all(one[1] == 1 for one in found):
                if wanted == tuple(tuple(one[axis] for axis in NHWC) for one in found):
                    best = (source, NHWC)
            before = source.producer()
            source = before.inputs[0] if before is not None and before.op_type in kinds else None
        if best is not None:
            rewriter = Rewriter(model, node)
            value, perm = best
            rewriter.replace(node.outputs[0], value if perm is None else rewriter.op("Transpose", [value], perm=perm))


def _products_of_rows(model: ir.Model, shapes: Shapes) -> None:
    """A product of a matrix of rows, made from more axes and given more axes behind it, is one of more axes."""
    for node in _nodes(model, "Reshape"):
        product = _made_by(node.inputs[0], "MatMul")
        rows = None if product is None else _producer(product.inputs[0], "Reshape")
        matrix = None if product is None else constant(product.inputs[1])
        if product is None or rows is None or matrix is None or matrix.ndim != 2:
            continue
        source = rows.inputs[0]
        found, inner, wanted = shapes[source], shapes[product.inputs[0]], shapes[node.outputs[0]]
        if not found or not inner or len(inner[0]) != 2 or any(one[-1] != len(matrix) for one in found):
            continue
        if wanted == tuple((*one[:-1], matrix.shape[1]) for one in found):
            rewriter = Rewriter(model, node)
            rewriter.replace(node.outputs[0], rewriter.op("MatMul", [source, product.inputs[1]]))


def _cut_transposed(model: ir.Model, shapes: Shapes) -> None:
    """Transposed convolutions that are cut to a multiple of their input, whatever its size, get padding instead."""
    for node in _nodes(model, "Slice"):
        before = _producer(node.inputs[0], "ConvTranspose")
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
            made = rewriter.op("ConvTranspose", before.inputs, **_attributes(before) | {"pads": padding})
            rewriter.replace(last.outputs[0], made)


def _attributes(node: ir.Node) -> dict[str, Any]:
    """Attributes of a convolution, with those left out that the weights tell."""
    found = {name: one.value for name, one in node.attributes.items() if name not in ("kernel_shape", "auto_pad")}
    return {name: tuple(one) if isinstance(one, list | tuple) else one for name, one in found.items()}


def sink_transposes(model: ir.Model) -> None:
    """Transposes go behind whatever works on single numbers, until they meet their opposite or anything else."""
    import onnx_ir.passes.common as common

    changed = True
    while changed:
        changed = False
        for node in list(model.graph):
            if node.graph is not None and (_cancelled(model, node) or _sunk(model, node)):
                changed = True
        common.RemoveUnusedNodesPass()(model)
    common.CommonSubexpressionEliminationPass(size_limit=0)(model)


def _perm(value: ir.Value | None) -> tuple[int, ...] | None:
    node = None if value is None else value.producer()
    return integers(node, "perm", ()) or None if node is not None and node.op_type == "Transpose" else None


def _cancelled(model: ir.Model, node: ir.Node) -> bool:
    """Two transposes as one, or as none."""
    if node.op_type != "Transpose":
        return False
    second, first = _perm(node.outputs[0]), _perm(node.inputs[0])
    if second is not None and second == tuple(range(len(second))):
        Rewriter(model, node).replace(node.outputs[0], node.inputs[0])
        model.graph.remove(node, safe=True)
        return True
    if first is None or second is None:
        return False
    both = tuple(first[axis] for axis in second)
    source, rewriter = node.inputs[0].producer().inputs[0], Rewriter(model, node)
    idle = both == tuple(range(len(both)))
    rewriter.replace(node.outputs[0], source if idle else rewriter.op("Transpose", [source], perm=both))
    model.graph.remove(node, safe=True)
    return True


def _sunk(model: ir.Model, node: ir.Node) -> bool:
    """``op(Transpose(x))`` as ``Transpose(op(x))``."""
    unary = node.op_type in (UNARY if node.domain == "" else OURS) and node.domain in ("", DOMAIN)
    if not unary and not (node.domain == "" and node.op_type in BINARY):
        return False
    count = 1 if unary else len(node.inputs)
    moving = [value for value in node.inputs[:count] if constant(value) is None]
    perms = {_perm(value) for value in moving}
    if len(perms) != 1 or None in perms:
        return False
    (perm,) = perms
    rewriter, inputs = Rewriter(model, node), []
    for value in node.inputs[:count]:
        numbers = constant(value)
        if numbers is None:
            inputs.append(value.producer().inputs[0])
        elif numbers.size == 1:
            inputs.append(value if numbers.ndim == 0 else rewriter.constant(numbers.reshape(()), value.name))
        elif numbers.ndim > len(perm):
            return False
        else:
            full = numbers.reshape((1,) * (len(perm) - numbers.ndim) + numbers.shape)
            inputs.append(rewriter.constant(full.transpose(np.argsort(perm)), value.name))
    made = rewriter.op(node.op_type, [*inputs, *node.inputs[count:]], domain=node.domain, **_attributes(node))
    rewriter.replace(node.outputs[0], rewriter.op("Transpose", [made], perm=perm))
    model.graph.remove(node, safe=True)
    return True


# ------------------------------------------------------------------------------------------- activations in one node


def _recognised(model: ir.Model) -> None:
    """Activations that converters write as several nodes, as one."""
    import onnx_ir as ir
    from onnxscript.rewriter import pattern

    def rule(shape: Callable[..., Any], made: Callable[..., Any], check: Callable[..., bool] | None = None) -> Any:
        given = [shape, made] if check is None else [shape, made, check]
        return pattern.RewriteRule(*given)

    def gelu(op: Any, x: Any) -> Any:
        return (0.5 * x) * (1.0 - op.Erf(op.Neg(x) * 0.70710678))

    def gelu_by_sum(op: Any, x: Any) -> Any:
        return (0.5 * x) * (1.0 + op.Erf(x * 0.70710678))

    def gelu_by_root(op: Any, x: Any) -> Any:
        return (x * (op.Erf(x / 1.41421356) + 1.0)) * 0.5

    def gelu_tanh(op: Any, x: Any) -> Any:
        return (0.5 * x) * (1.0 + op.Tanh(0.79788456 * (x + 0.044715 * op.Pow(x, 3.0))))

    def silu(op: Any, x: Any) -> Any:
        return x * op.Sigmoid(x)

    def hard_swish(op: Any, x: Any) -> Any:
        return x * (op.Clip(x + 3.0, 0.0, 6.0) * 0.16666667)

    def hard_swish_by_sigmoid(op: Any, x: Any) -> Any:
        return x * op.HardSigmoid(x, alpha=0.16666667, beta=0.5)

    def prelu(op: Any, x: Any, slopes: Any) -> Any:
        return op.Relu(x) + op.Relu(op.Neg(x)) * slopes

    def has_slopes(context: Any, slopes: ir.Value, **_: Any) -> bool:
        return constant(slopes) is not None

    def to_prelu(op: Any, x: Any, slopes: ir.Value, **_: Any) -> Any:
        numbers = -constant(slopes)
        numbers = numbers[0] if numbers.ndim == 4 and len(numbers) == 1 else numbers
        return op.PRelu(x, op.initializer(ir.tensor(numbers), name=f"{slopes.name}__{x.name}__slopes"))

    ours = [(gelu, "Gelu"), (gelu_by_sum, "Gelu"), (gelu_by_root, "Gelu"), (gelu_tanh, "GeluTanh"), (silu, "Silu")]
    rules = [rule(one, lambda op, x, _kind=kind, **_: getattr(op, _kind)(x, _domain=DOMAIN)) for one, kind in ours]
    rules += [rule(one, lambda op, x, **_: op.HardSwish(x)) for one in (hard_swish, hard_swish_by_sigmoid)]
    rules.append(rule(prelu, to_prelu, has_slopes))
    pattern.RewriteRuleSet(rules, commute=True).apply_to_model(model)
    for kind in {node.op_type for node in model.graph if node.domain == DOMAIN} & OURS:
        made = function(kind)
        model.functions[made.identifier()] = made
        model.graph.opset_imports[DOMAIN] = 1


# ---------------------------------------------------------------------------------- folding into weights, to the end


def _padding_explicit(model: ir.Model, shapes: Shapes) -> None:
    """``pads`` instead of ``auto_pad``, where they do not hang on sizes that are free."""
    for node in _nodes(model, "Conv"):
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
        rewriter.replace(node.outputs[0], rewriter.op("Conv", node.inputs, **_attributes(node) | {"pads": pads}))
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


def _to_fixed_point(model: ir.Model, shapes: Shapes) -> None:
    """Rules that look at one node and what makes its input, over and over until none applies."""
    import onnx_ir.passes.common as common

    rules: dict[str, tuple[Callable[..., ir.Value | None], ...]] = {
        "Add": (_shift_folded,),
        "BatchNormalization": (_scale_and_shift,),
        "Clip": (_clips_merged,),
        "Conv": (_pad_folded,),
        "ConvTranspose": (_as_phases,),
        "Div": (_as_product,),
        "Gemm": (_as_matmul,),
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
    node = _made_by(value, "Conv")
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
    names = [node.inputs[1].name, f"{node.outputs[0].name}__bias"]
    made = [rewriter.constant(one, name) for one, name in zip((weights, bias), names, strict=True)]
    return rewriter.op("Conv", [node.inputs[0], *made], **_attributes(node) | _automatic(node))


def _automatic(node: ir.Node) -> dict[str, str]:
    mode = text(node, "auto_pad", "NOTSET")
    return {} if mode == "NOTSET" else {"auto_pad": mode}


def _product(value: ir.Value) -> tuple[ir.Node, np.ndarray] | None:
    """A product by a constant matrix, made for one reader."""
    node = _made_by(value, "MatMul")
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
    if (sum_node := _made_by(other, "Add")) is not None and (inner := _constant_and_other(sum_node)) is not None:
        shift, summed = inner
    if (product := _product(summed)) is None:
        return None
    before, matrix = product
    scale = per_channel(numbers, matrix.shape[1], rows=True)
    shift = None if shift is None else per_channel(shift, matrix.shape[1], rows=True)
    if scale is None or (shift is None) != (summed is other):
        return None
    made = rewriter.op("MatMul", [before.inputs[0], rewriter.constant(matrix * scale, before.inputs[1].name)])
    return (
        made if shift is None else rewriter.op("Add", [made, rewriter.constant(shift * scale, f"{other.name}__bias")])
    )


def _shift_folded(rewriter: Rewriter, node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """A summand of each channel goes into the bias before it."""
    if (operands := _constant_and_other(node)) is None:
        return None
    numbers, other = operands
    if (found := _convolution(other)) is not None:
        before, weights, bias = found
        shift = per_channel(numbers, len(weights), rows=False)
        return None if shift is None else _convolution_with(rewriter, before, weights, bias + shift)
    sum_node = _made_by(other, "Add")
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
    return rewriter.op("Mul", [node.inputs[0], rewriter.constant(1 / numbers, f"{node.inputs[1].name}__inverse")])


def _as_sum(rewriter: Rewriter, node: ir.Node, shapes: Shapes) -> ir.Value | None:
    numbers = constant(node.inputs[1])
    if numbers is None or numbers.dtype != np.float32:
        return None
    return rewriter.op("Add", [node.inputs[0], rewriter.constant(-numbers, f"{node.inputs[1].name}__negative")])


def _scale_and_shift(rewriter: Rewriter, node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """Batch normalisation as it is at inference, behind something that it can be folded into."""
    found = [constant(value) for value in node.inputs[1:]]
    images = _made_by(node.inputs[0], "Conv", "ConvTranspose", "DepthToSpace") is not None
    rows = _made_by(node.inputs[0], "Gemm") is not None or shapes.rank(node.inputs[0]) == 2
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
    made = rewriter.op("MatMul", [node.inputs[0], rewriter.constant(matrix, node.inputs[1].name)])
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
        if any(value is not None and (one is None or one.size != 1) for value, one in zip(given, numbers, strict=True)):
            return None
        low, high = (None if one is None else float(one.item()) for one in numbers)
        return float("-inf") if low is None else low, float("inf") if high is None else high
    if node.op_type in ("Min", "Max") and len(node.inputs) == 2 and (operands := _constant_and_other(node)) is not None:
        if operands[0].size == 1 and operands[0].ndim == 0:
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
    source = _clipped(node)
    before = _made_by(source, "Relu", "Clip", "Min", "Max")
    first = bounds(before)
    if first is None or before is None:
        if node.op_type not in ("Min", "Max"):
            return None
        low, high = second
    else:
        source = _clipped(before)
        low, high = (min(max(one, second[0]), second[1]) for one in first)
    if (low, high) == (0.0, float("inf")):
        return rewriter.op("Relu", [source])
    limits = [
        None if np.isinf(one) else rewriter.constant(np.float32(one).reshape(()), f"{node.outputs[0].name}__{name}")
        for one, name in ((low, "low"), (high, "high"))
    ]
    return rewriter.op("Clip", [source, *limits])


def _pad_folded(rewriter: Rewriter, node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """Zeros around an image that a convolution reads are its padding."""
    pad = _made_by(node.inputs[0], "Pad")
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
    return rewriter.op("Conv", [pad.inputs[0], *node.inputs[1:]], **_attributes(node) | {"pads": pads})


def _before_shuffle(rewriter: Rewriter, node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """What works on single numbers behind a depth to space works as well before it."""
    unary = node.op_type in UNARY if node.domain == "" else node.domain == DOMAIN and node.op_type in OURS
    if not unary and not (node.domain == "" and node.op_type in BINARY and len(node.inputs) == 2):
        return None
    inputs = list(node.inputs)
    place = 0 if unary or constant(inputs[0]) is None else 1
    shuffle = _made_by(inputs[place], "DepthToSpace")
    if shuffle is None or text(shuffle, "mode", "DCR") != "DCR":
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
            inputs[1 - place] = rewriter.constant(tiled, inputs[1 - place].name)
    inputs[place] = shuffle.inputs[0]
    made = rewriter.op(node.op_type, inputs, domain=node.domain, **_attributes(node))
    return rewriter.op("DepthToSpace", [made], **_attributes(shuffle))


# --------------------------------------------------------------------------------------------- transposed convolution


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


def _as_phases(rewriter: Rewriter, node: ir.Node, shapes: Shapes) -> ir.Value | None:
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
    values = [rewriter.constant(one, f"{node.outputs[0].name}__{name}") for one, name in zip(given, ("phases", "bias"))]
    made = rewriter.op("Conv", [node.inputs[0], *values], pads=(-first[0], -first[1], *last), strides=(1, 1))
    return made if stride == 1 else rewriter.op("DepthToSpace", [made], blocksize=stride, mode="DCR")
