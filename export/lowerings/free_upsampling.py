"""Interpolating `UpSampling2D` of an image whose size is free: Keras 3.15 cannot trace it (a tensor used as a bool)."""

from __future__ import annotations

from typing import Any

import keras

from keras_efficient.export.lowerings import Lowering, rebuild_if

__all__ = ["FREE_UPSAMPLING", "free_upsampling"]


class _UpSampling(keras.layers.UpSampling2D):
    def call(self, inputs):
        import tensorflow as tf

        size = tf.shape(inputs)[1:3] * tf.constant(self.size, tf.int32)
        return tf.image.resize(inputs, size, method=self.interpolation)


def free_upsampling(model: keras.Model) -> keras.Model:
    """Every channels-last UpSampling2D that interpolates (not ``nearest``) by TensorFlow's own resizing."""
    return rebuild_if(model, _applies, lambda layer: _UpSampling.from_config(layer.get_config()))


def _applies(operation: Any) -> bool:
    stock = type(operation) is keras.layers.UpSampling2D
    return stock and operation.interpolation != "nearest" and operation.data_format == "channels_last"


FREE_UPSAMPLING = Lowering(name="free-upsampling", function=free_upsampling)
