"""Layer and group normalisation in operators that TFLite has in integers.

Keras folds both into ``x·i + (β - μ·i)``: the minus becomes NEG and the variance SQUARE, neither of which has an int8
kernel. Here ``y = (x - μ)·rsqrt(mean((x - μ)²) + ε)·γ + β``, by SUB and SQUARED_DIFFERENCE.
"""

from __future__ import annotations

import math
from typing import Any

import keras

from keras_efficient.export.lowerings import Lowering, rebuild_if

__all__ = ["INTEGER_NORMALIZATION", "integer_normalization"]


def _normalize(x: Any, axes: list[int], epsilon: float, gamma: Any, beta: Any) -> Any:
    import tensorflow as tf

    mean = tf.reduce_mean(x, axes, keepdims=True)
    variance = tf.reduce_mean(tf.math.squared_difference(x, mean), axes, keepdims=True)
    y = (x - mean) * tf.math.rsqrt(variance + epsilon)
    y = y if gamma is None else y * gamma
    return y if beta is None else y + beta


class _LayerNormalization(keras.layers.LayerNormalization):
    def call(self, inputs):
        shape = [inputs.shape[axis] if axis in self._axes(inputs) else 1 for axis in range(len(inputs.shape))]
        gamma, beta = (
            None if weight is None else keras.ops.reshape(weight, shape) for weight in (self.gamma, self.beta)
        )
        return _normalize(inputs, self._axes(inputs), self.epsilon, gamma, beta)

    def _axes(self, inputs):
        return [axis % len(inputs.shape) for axis in self.axis]


class _GroupNormalization(keras.layers.GroupNormalization):
    def _apply_normalization(self, reshaped_inputs, input_shape):
        if self.axis not in (-1, len(input_shape) - 1):
            return super()._apply_normalization(reshaped_inputs, input_shape)
        each = input_shape[-1] // self.groups
        # N×positions×groups×channels: SQUARED_DIFFERENCE takes four axes.
        x = keras.ops.reshape(reshaped_inputs, (-1, math.prod(input_shape[1:-1]), self.groups, each))
        shape = (1, 1, self.groups, each)
        gamma, beta = (
            None if weight is None else keras.ops.reshape(weight, shape) for weight in (self.gamma, self.beta)
        )
        return _normalize(x, [1, 3], self.epsilon, gamma, beta)


def integer_normalization(model: keras.Model) -> keras.Model:
    """Every LayerNormalization (without RMS scaling) and GroupNormalization in integer-friendly operators."""
    return rebuild_if(model, _applies, _lowered)


def _applies(operation: Any) -> bool:
    if type(operation) is keras.layers.GroupNormalization:
        return operation.built and None not in operation.get_build_config()["input_shape"][1:]
    return type(operation) is keras.layers.LayerNormalization and operation.built and not operation.rms_scaling


def _lowered(layer: keras.layers.Layer) -> keras.layers.Layer:
    groups = isinstance(layer, keras.layers.GroupNormalization)
    twin = (_GroupNormalization if groups else _LayerNormalization).from_config(layer.get_config())
    twin.build_from_config(layer.get_build_config())
    twin.set_weights(layer.get_weights())
    return twin


INTEGER_NORMALIZATION = Lowering(name="integer-normalization", function=integer_normalization)
