"""PReLU for integers on a CPU.

LiteRT runs an int8 PRELU outside XNNPACK, by a scalar kernel, so that a network of PReLUs is slower in int8 than in
float. What follows stays inside XNNPACK. Measured for six PReLUs of 16 channels at 360×640 (one thread, int8, ms, least
of 9 runs): PRELU 97 (61 in float32), MAXIMUM(x, a·x) 28 at half the accuracy, doubled convolution and 1×1
convolution 33, two depthwise convolutions and an addition 32, one depthwise convolution and an addition 27, one
slope for all channels (LEAKY_RELU) 22, ReLU 21.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_efficient.export.lowerings import Lowering, rebuild_if

__all__ = ["OTHER_PRELU_AS_RELU", "PRELU_AS_RELU", "other_prelu_as_relu", "prelu_as_relu"]


def prelu_as_relu(model: keras.Model) -> keras.Model:
    """Every PReLU on images that has one slope ``a`` a channel, without PRELU.

    One slope for all channels: LeakyReLU. All slopes ``a ≤ 1``: ``y = x + relu((a - 1)·x)``, the product as a 1×1
    depthwise convolution. Else: ``y = x + (1 - a)·relu(-x)`` with two depthwise convolutions.
    """
    return rebuild_if(model, _applies, _lowered)


def other_prelu_as_relu(model: keras.Model) -> keras.Model:
    """`prelu_as_relu`, but for PReLUs that `doubled_convolution` takes: slopes ``a ≤ 1`` behind a convolution."""
    return rebuild_if(model, lambda operation: _applies(operation) and not _is_behind_convolution(operation), _lowered)


def _is_behind_convolution(layer: keras.layers.PReLU) -> bool:
    """Whether its one input comes from a convolution without an activation that nothing else reads."""
    nodes = layer._inbound_nodes
    source: Any = nodes[0].input_tensors[0]._keras_history.operation if len(nodes) == 1 else None
    return (
        type(source) is keras.layers.Conv2D
        and source.activation is keras.activations.linear
        and source.groups == 1
        and len(source._inbound_nodes) == 1
        and len(source._outbound_nodes) == 1
        and bool(np.all(np.asarray(layer.alpha) <= 1))
    )


def _applies(operation: Any) -> bool:
    # A user's subclass may compute something else.
    if type(operation) is not keras.layers.PReLU or not operation.built:
        return False
    shape = operation.alpha.shape
    return len(shape) == 3 and shape[:2] == (1, 1)


def _lowered(layer: keras.layers.PReLU) -> keras.layers.Layer:
    slopes = np.asarray(layer.alpha).reshape(-1)
    if np.all(slopes == slopes[0]) and slopes[0] >= 0:
        return keras.layers.LeakyReLU(float(slopes[0]), name=layer.name)
    inputs = keras.Input((None, None, len(slopes)), name=f"{layer.name}_input")
    if np.all(slopes <= 1):
        correction = _scaled(inputs, slopes - 1, "relu", f"{layer.name}_negative")
    else:
        negative = _scaled(inputs, np.full_like(slopes, -1), "relu", f"{layer.name}_negative")
        correction = _scaled(negative, 1 - slopes, None, f"{layer.name}_slope")
    return keras.Model(inputs, keras.layers.Add(name=f"{layer.name}_add")([inputs, correction]), name=layer.name)


def _scaled(x: keras.KerasTensor, factors: np.ndarray, activation: str | None, name: str) -> keras.KerasTensor:
    layer = keras.layers.DepthwiseConv2D(1, use_bias=False, activation=activation, name=name)
    y = layer(x)
    layer.set_weights([factors.reshape(1, 1, -1, 1)])
    return y


PRELU_AS_RELU = Lowering(name="prelu-as-relu", function=prelu_as_relu)

OTHER_PRELU_AS_RELU = Lowering(name=PRELU_AS_RELU.name, function=other_prelu_as_relu)
