"""Three ways to the same expected gradient of a layer whose weights are Gaussian, which differ in its noise.

A layer gives `linear(inputs, kernel)`, which is linear in both; means and scales are of the kernel's numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

__all__ = ["flipout", "local_reparameterization", "reparameterized"]

Linear = Callable[[Any, Any], Any]

TINY = 1e-20  # a variance, of which the root has a finite derivative


def reparameterized(mean: Any, scale: Any, seed: Any) -> Any:
    """A draw of weights, `mean + scale · ξ`, which all examples of a call share.

    Source: Kingma, Welling, ICLR 2014, https://arxiv.org/abs/1312.6114.
    """
    return mean + scale * keras.random.normal(mean.shape, dtype="float32", seed=seed)


def local_reparameterization(linear: Linear, inputs: Any, mean: Any, scale: Any, seed: Any) -> Any:
    """Outputs drawn instead of weights: `linear(x, mean) + √linear(x², scale²) · ξ`, one ξ for each output.

    Each output is distributed as that of drawn weights. Outputs at several places of a convolution share weights, which
    is not seen here: they come independent.

    Source: Kingma, Salimans, Welling, NeurIPS 2015, https://arxiv.org/abs/1506.02557.
    """
    outputs = linear(inputs, ops.cast(mean, inputs.dtype))
    # In float32: squares of inputs are beyond float16's range, and of small scales below it.
    variance = linear(ops.square(ops.cast(inputs, "float32")), ops.square(scale))
    noise = keras.random.normal(ops.shape(outputs), dtype="float32", seed=seed)
    return outputs + ops.cast(ops.sqrt(variance + TINY) * noise, outputs.dtype)


def flipout(linear: Linear, inputs: Any, mean: Any, scale: Any, places: int, channels: int, seed: Any) -> Any:
    """One draw of weights, with signs of each example's own: `linear(x, mean) + r ∘ linear(x ∘ s, scale · ξ)`.

    Signs r and s turn those of the draw, which is as likely; so outputs of examples are distributed as if each had
    weights of its own, and are not correlated.

    Args:
        places: axes behind the batch over which signs are the same (those of a convolution).
        channels: the axis of the features.

    Source: Wen, Vicol, Ba, Tran, Grosse, ICLR 2018, https://arxiv.org/abs/1803.04386.
    """
    outputs = linear(inputs, ops.cast(mean, inputs.dtype))
    noise = ops.cast(scale * keras.random.normal(mean.shape, dtype="float32", seed=seed), inputs.dtype)
    into, out = (_signs(tensor, places, channels, seed) for tensor in (inputs, outputs))
    return outputs + linear(inputs * into, noise) * out


def _signs(tensor: Any, places: int, channels: int, seed: Any) -> Any:
    shape = list(ops.shape(tensor))
    if places:
        shape = [shape[0], *([1] * (len(shape) - 1))]
        shape[channels] = tensor.shape[channels]
    return ops.sign(ops.cast(keras.random.uniform(shape, -1.0, 1.0, dtype="float32", seed=seed), tensor.dtype))
