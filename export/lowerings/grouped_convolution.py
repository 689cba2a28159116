"""Grouped convolutions as depthwise ones where every channel is a group, else as one convolution a group.

Keras compiles a grouped convolution with XLA on a CPU; tf2onnx leaves the compiled function in the graph as a node that
ONNX does not have, and writes the file all the same. A depthwise convolution is also what NPUs know.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_efficient.export.lowerings import Lowering, rebuild_if

__all__ = [
    "DEPTHWISE_CONVOLUTIONS",
    "SPLIT_GROUPED_CONVOLUTIONS",
    "depthwise_convolutions",
    "split_grouped_convolutions",
]

_CLASSES = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)


def depthwise_convolutions(model: keras.Model) -> keras.Model:
    """Every 1-D or 2-D convolution with one group a channel (and equal strides) as a depthwise convolution.

    Channels-last convolutions only, as everywhere here.
    """
    return rebuild_if(model, _is_depthwise, _depthwise)


def _is_grouped(layer: Any) -> bool:
    """Not a user's subclass, which may compute something else."""
    return type(layer) in _CLASSES and layer.groups > 1 and layer.data_format == "channels_last"


def _is_depthwise(layer: Any) -> bool:
    return _is_grouped(layer) and layer.rank < 3 and layer.kernel.shape[-2] == 1 and len(set(layer.strides)) == 1


def _depthwise(layer: keras.layers.Layer) -> keras.layers.Layer:
    """Output channel ``c·m + j`` belongs to input channel c in both: the kernel's last axis is cut into (c, m).

    A depthwise convolution knows no causal padding: zeros come before it then.
    """
    config, kernel = layer.get_config(), np.asarray(layer.kernel)
    causal = layer.padding == "causal"
    if causal:
        config["padding"] = "valid"
    kind = keras.layers.DepthwiseConv1D if layer.rank == 1 else keras.layers.DepthwiseConv2D
    kept = ("kernel_size", "strides", "padding", "data_format", "dilation_rate", "activation", "use_bias")
    twin = kind(**{key: config[key] for key in kept}, depth_multiplier=layer.filters // layer.groups, name=layer.name)
    twin.build((None, *[None] * layer.rank, layer.groups))
    kernel = kernel.reshape(*kernel.shape[:-2], layer.groups, -1)
    twin.set_weights([kernel, *([np.asarray(layer.bias)] if layer.use_bias else [])])
    if not causal:
        return twin
    before = layer.dilation_rate[0] * (layer.kernel_size[0] - 1)
    inputs = keras.Input((None, layer.groups), name=f"{layer.name}_input")
    padded = keras.layers.ZeroPadding1D((before, 0), name=f"{layer.name}_past")(inputs)
    return keras.Model(inputs, twin(padded), name=layer.name)


def split_grouped_convolutions(model: keras.Model) -> keras.Model:
    """``y = concat_g(conv(x_g, k_g) + b_g)`` for every channels-last convolution with ``groups > 1``."""
    return rebuild_if(model, _is_grouped, _split)


def _split(layer: keras.layers.Layer) -> keras.Model:
    groups, kernel = layer.groups, np.asarray(layer.kernel)
    config = layer.get_config()
    each = {key: config[key] for key in ("kernel_size", "strides", "padding", "dilation_rate") if key in config} | {
        "filters": layer.filters // groups,
        "use_bias": layer.use_bias,
    }
    inputs = keras.Input((*[None] * layer.rank, kernel.shape[-2] * groups), name=f"{layer.name}_input")
    outputs = []
    for index, part in enumerate(keras.ops.split(inputs, groups, axis=-1)):
        convolution = type(layer)(**each, name=f"{layer.name}_group_{index}")
        outputs.append(convolution(part))
        own = slice(index * each["filters"], (index + 1) * each["filters"])
        weights = [kernel[..., own]] + ([np.asarray(layer.bias)[own]] if layer.use_bias else [])
        convolution.set_weights(weights)
    result = keras.ops.concatenate(outputs, axis=-1)
    if layer.activation is not keras.activations.linear:
        result = keras.layers.Activation(layer.activation, name=f"{layer.name}_activation")(result)
    return keras.Model(inputs, result, name=layer.name)


DEPTHWISE_CONVOLUTIONS = Lowering(name="depthwise-convolutions", function=depthwise_convolutions)

SPLIT_GROUPED_CONVOLUTIONS = Lowering(name="split-grouped-convolutions", function=split_grouped_convolutions)
