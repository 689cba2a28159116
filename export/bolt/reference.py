"""What a region computes, in NumPy and double precision: what kernels are held to."""

from __future__ import annotations

from collections.abc import Sequence
from math import erf, sqrt

import numpy as np

from keras_efficient.export.bolt.region import Activate, Add, Layer, Region

__all__ = ["activated", "computed"]

_erf = np.vectorize(erf, otypes=[np.float64])


def computed(region: Region, inputs: Sequence[np.ndarray], *, rounded: type | None = None) -> np.ndarray:
    """The region's output.

    Args:
        region: what is computed.
        inputs: (N, H, W, C) each, or (M, C) of rows.
        rounded: a NumPy type that weights and each layer's output are rounded to, as kernels keep them; `None`: none.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # what float16 does not hold is infinite, there as here
        return _computed(region, inputs, rounded)


def _computed(region: Region, inputs: Sequence[np.ndarray], rounded: type | None) -> np.ndarray:
    values = [np.asarray(one, np.float64) for one in inputs]
    if region.rows:
        values = [one[None, None] for one in values]
    for layer in region.layers:
        weights = layer.weights if rounded is None else layer.weights.astype(rounded)
        found = _convolved(values[layer.value], layer, weights.astype(np.float64)) + layer.bias
        for step in layer.steps:
            found = found + values[step.value] if isinstance(step, Add) else activated(found, step)
        values.append(found if rounded is None else found.astype(rounded).astype(np.float64))
    found = values[-1]
    if region.shuffle > 1:
        n, height, width, channels = found.shape
        block = region.shuffle
        found = found.reshape(n, height, width, block, block, channels // block**2).transpose(0, 1, 3, 2, 4, 5)
        found = found.reshape(n, height * block, width * block, -1)
    return found[0, 0] if region.rows else found


def activated(x: np.ndarray, step: Activate) -> np.ndarray:
    """A step's function of each number."""
    match step.kind:
        case "relu":
            return np.maximum(x, 0)
        case "prelu":
            return np.where(x > 0, x, x * step.slopes)
        case "clip":
            return np.clip(x, step.low, step.high)
        case "gelu":
            return 0.5 * x * (1 + _erf(x / sqrt(2)))
        case "gelu_tanh":
            return 0.5 * x * (1 + np.tanh(sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        case "silu":
            return x * _sigmoid(x)
        case "hard_swish":
            return x * np.clip(x + 3, 0, 6) / 6
        case "softplus":
            return np.logaddexp(0, x)
        case "sigmoid":
            return _sigmoid(x)
        case _:
            return np.tanh(x)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def _convolved(x: np.ndarray, layer: Layer, weights: np.ndarray) -> np.ndarray:
    top, left, bottom, right = layer.padding
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    height, width = layer.size(*x.shape[1:3])
    found = np.zeros((len(x), height, width, layer.filters))
    for row in range(layer.kernel[0]):
        for column in range(layer.kernel[1]):
            above, beside = row * layer.dilation[0], column * layer.dilation[1]
            seen = padded[:, above :: layer.stride[0], beside :: layer.stride[1]][:, :height, :width]
            one = weights[row, column]
            found += seen * one[:, 0] if layer.depthwise else seen @ one
    return found
