"""What is done to two numbers `a` and `b` behind a product of matrices, as lines of source."""

from __future__ import annotations

from collections.abc import Callable

from keras_efficient.export.bolt.region import Activate, Add, Layer

__all__ = ["activation", "steps"]


def steps(
    layer: Layer, add: Callable[[int], list[str]], slopes: Callable[[int], str], *, pair: bool = True
) -> list[str]:
    """Lines of all steps behind a layer's bias, in their order.

    Args:
        layer: whose steps.
        add: gives the lines that add a value, by its number.
        slopes: gives the address of the slopes, as of `activation`, of the layer's first PReLU (1), second one, ….
        pair: as of `activation`.
    """
    lines, count = [], 0
    for step in layer.steps:
        if isinstance(step, Add):
            lines += add(step.value)
            continue
        count += step.kind == "prelu"
        lines += activation(step, slopes(count) if step.kind == "prelu" else "", pair=pair)
    return lines


def activation(step: Activate, slopes: str = "", *, pair: bool = True) -> list[str]:
    """Lines that change `a` and `b`.

    Args:
        step: the function.
        slopes: of `prelu`: an expression, the address of the float of `a`, behind which is that of `b`.
        pair: whether there is a `b`.
    """
    lines = _both(step, slopes)
    return lines if pair else [line for line in lines if line.startswith("a ")]


def _both(step: Activate, slopes: str) -> list[str]:
    match step.kind:
        case "prelu":
            return [
                f"a = a > 0.0f ? a : a * load_global({slopes});",
                f"b = b > 0.0f ? b : b * load_global({slopes} + 1);",
            ]
        case "clip":
            low, high = (f"{limit!r}f" if abs(limit) < float("inf") else "" for limit in (step.low, step.high))
            lines = [f"{one} = {one} < {low} ? {low} : {one};" for one in "ab" if low]
            return lines + [f"{one} = {one} > {high} ? {high} : {one};" for one in "ab" if high]
        case kind:
            kind = {"tanh": "fast_tanh"}.get(kind, kind)
            return [f"{one} = {kind}({one});" for one in "ab"]
