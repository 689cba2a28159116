"""Activations in ONNX's standard operators: the bodies of our functions, and parts of the bodies of regions."""

from __future__ import annotations

from math import isinf, pi, sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["DOMAIN", "OPSET", "activation", "function", "number"]

DOMAIN = "keras_efficient.bolt"
OPSET = 18
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


def function(name: str) -> ir.Function:
    """The function `Gelu`, `GeluTanh` or `Silu` of our domain."""
    import onnx_ir as ir

    x, tape = ir.Value(name="x"), ir.tape.Tape()
    y = activation(tape, KINDS[name], x)
    graph = ir.Graph([x], [y], nodes=tape.nodes, opset_imports={"": OPSET})
    return ir.Function(DOMAIN, name, graph=graph, attributes=[])
