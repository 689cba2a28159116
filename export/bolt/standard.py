"""What our operators mean in ONNX's standard ones: regions (`Fused`), and activations that the opset does not have.

ONNX Runtime 1.32 tells functions of one name apart by their overload, whatever the file's IR version, and takes nodes
with attributes that the body does not use; a custom operator `Fused` with any number of inputs stands for all of them,
whatever their overloads, and other functions of the domain still run beside it.
"""

from __future__ import annotations

from math import isinf, pi, sqrt
from typing import TYPE_CHECKING

from keras_efficient.export.bolt import spec
from keras_efficient.export.bolt.region import Add, Layer, Region

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "BINARY",
    "DOMAIN",
    "FUSED",
    "LAYER_NAMES",
    "OPSET",
    "OURS",
    "UNARY",
    "activation",
    "function",
    "region_function",
]

DOMAIN = "keras_efficient.bolt"
OPSET = 18
FUSED = "Fused"
LAYER_NAMES = "keras_efficient.layers"  # of a region's node: metadata with a JSON list, for reports
# Operators that work on single numbers: of one tensor, of two, and those of one that are functions of our domain.
# fmt: off
UNARY = frozenset((
    "Abs", "Cast", "Ceil", "Clip", "Erf", "Exp", "Floor", "HardSwish", "LeakyRelu", "Neg", "Relu", "Round", "Sigmoid",
    "Softplus", "Sqrt", "Tanh",
))
# fmt: on
BINARY = frozenset(("Add", "Div", "Max", "Min", "Mul", "PRelu", "Pow", "Sub"))
OURS = frozenset(("Gelu", "GeluTanh", "Silu"))
ATTRIBUTES = ("spec", "region")
KINDS = {"Gelu": "gelu", "GeluTanh": "gelu_tanh", "Silu": "silu"}
PLAIN = {"relu": "Relu", "hard_swish": "HardSwish", "softplus": "Softplus", "sigmoid": "Sigmoid", "tanh": "Tanh"}


def number(tape: ir.tape.Tape, value: float, like: ir.Value) -> ir.Value:
    """A constant of the type of `like`: bodies serve float32 and float16."""
    return tape.op("CastLike", [tape.op("Constant", [], {"value_float": value}), like])


def activation(
    tape: ir.tape.Tape, kind: str, x: ir.Value, *, low: float = 0, high: float = 0, slopes: ir.Value | None = None
) -> ir.Value:
    """One of `region.ACTIVATIONS` of `x`, written onto `tape`."""
    if kind in PLAIN:
        return tape.op(PLAIN[kind], [x])
    if kind == "prelu":
        return tape.op("PRelu", [x, slopes])
    if kind == "clip":
        return tape.op("Clip", [x, *(None if isinf(one) else number(tape, one, x) for one in (low, high))])
    if kind == "silu":
        return tape.op("Mul", [x, tape.op("Sigmoid", [x])])
    half = tape.op("Mul", [x, number(tape, 0.5, x)])
    if kind == "gelu":
        inner = tape.op("Erf", [tape.op("Mul", [x, number(tape, sqrt(0.5), x)])])
    else:
        cube = tape.op("Mul", [tape.op("Mul", [x, x]), x])
        summed = tape.op("Add", [x, tape.op("Mul", [cube, number(tape, 0.044715, x)])])
        inner = tape.op("Tanh", [tape.op("Mul", [summed, number(tape, sqrt(2 / pi), x)])])
    return tape.op("Mul", [half, tape.op("Add", [inner, number(tape, 1.0, x)])])


def region_function(region: Region, *, ranges: bool = False) -> ir.Function:
    """What `Fused` means for regions of this structure: inputs, then arrays as of `spec.arrays`, N×H×W×C (rows: …×C).

    Told apart from other structures by its overload, `spec.structure_hash`. With `ranges` the largest magnitudes of the
    inputs and of what each layer makes, behind its last step, are outputs besides.
    """
    import onnx_ir as ir

    structure, tape = spec.spec(region), ir.tape.Tape()
    given = [ir.Value(name=f"x{index}") for index in range(len(region.channels))]
    weights = [ir.Value(name=f"w{index}") for index in range(len(spec.shapes(structure)))]
    left = iter(weights)
    values = list(given) if region.rows else [tape.op("Transpose", [one], {"perm": (0, 3, 1, 2)}) for one in given]
    for layer in region.layers:
        y = _layer(tape, layer, values[layer.value], next(left), next(left), rows=region.rows)
        for step in layer.steps:
            if isinstance(step, Add):
                y = tape.op("Add", [y, values[step.value]])
            else:
                slopes = None if step.slopes is None else next(left)
                y = activation(tape, step.kind, y, low=step.low, high=step.high, slopes=slopes)
        values.append(y)
    largest = [tape.op("ReduceMax", [tape.op("Abs", [one])], {"keepdims": 0}) for one in values] if ranges else []
    y = values[-1]
    if region.shuffle > 1:
        y = tape.op("DepthToSpace", [y], {"blocksize": region.shuffle, "mode": "DCR"})
    if not region.rows:
        y = tape.op("Transpose", [y], {"perm": (0, 2, 3, 1)})
    graph = ir.Graph([*given, *weights], [y, *largest], nodes=tape.nodes, opset_imports={"": OPSET})
    told = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in ATTRIBUTES]
    overload = spec.structure_hash(structure) + ("_ranges" if ranges else "")
    return ir.Function(DOMAIN, FUSED, overload, graph=graph, attributes=told)


def _layer(tape: ir.tape.Tape, layer: Layer, x: ir.Value, weights: ir.Value, bias: ir.Value, *, rows: bool) -> ir.Value:
    if rows:
        return tape.op("Add", [tape.op("MatMul", [x, weights]), bias])
    given = {"strides": layer.stride, "dilations": layer.dilation, "pads": layer.padding}
    return tape.op("Conv", [x, weights, bias], {**given, "group": layer.channels if layer.depthwise else 1})


def function(name: str) -> ir.Function:
    """The function `Gelu`, `GeluTanh` or `Silu` of our domain."""
    import onnx_ir as ir

    x, tape = ir.Value(name="x"), ir.tape.Tape()
    y = activation(tape, KINDS[name], x)
    graph = ir.Graph([x], [y], nodes=tape.nodes, opset_imports={"": OPSET})
    return ir.Function(DOMAIN, name, graph=graph, attributes=[])
