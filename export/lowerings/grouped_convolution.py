"""Grouped convolutions as one convolution a group.

Keras compiles a grouped convolution with XLA on a CPU; tf2onnx leaves the compiled function in the graph as a node that
ONNX does not have, and writes the file all the same.
"""

from __future__ import annotations

import keras
import numpy as np

from keras_efficient.export.lowerings import Lowering, rebuild_if

__all__ = ["SPLIT_GROUPED_CONVOLUTIONS", "split_grouped_convolutions"]

_CLASSES = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)


def split_grouped_convolutions(model: keras.Model) -> keras.Model:
    """``y = concat_g(conv(x_g, k_g)) + b`` for every convolution with ``groups > 1``; a channels-last model."""
    return rebuild_if(model, lambda layer: isinstance(layer, _CLASSES) and layer.groups > 1, _split)


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


SPLIT_GROUPED_CONVOLUTIONS = Lowering(
    name="split-grouped-convolutions",
    function=split_grouped_convolutions,
    targets=("onnx",),
    equality="rounding",
    summary="a grouped convolution becomes one convolution a group and a concatenation",
)
