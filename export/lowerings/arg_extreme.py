"""`keras.ops.argmax` and `argmin` without their treatment of negative zeros.

On the TensorFlow backend Keras looks at the sign bit of zeros, by bit operations that neither TFLite nor ONNX has.
"""

from __future__ import annotations

import keras
from keras.src.ops.numpy import Argmax, Argmin

from keras_efficient.export.lowerings import Lowering, rebuild_if

__all__ = ["PLAIN_ARG_EXTREMES", "plain_arg_extremes"]


class _ArgExtreme(keras.layers.Layer):
    """``tf.argmax`` or ``tf.argmin`` along one axis, or over the flattened input; int32."""

    def __init__(self, largest: bool, axis: int | None, keepdims: bool, **kwargs):
        super().__init__(**kwargs)
        self.largest, self.axis, self.keepdims = largest, axis, keepdims

    def call(self, x):
        import tensorflow as tf

        function = tf.argmax if self.largest else tf.argmin
        if self.axis is None:
            found = function(tf.reshape(x, [-1]), output_type=tf.int32)
            return tf.reshape(found, [1] * len(x.shape)) if self.keepdims else found
        found = function(x, axis=self.axis, output_type=tf.int32)
        return tf.expand_dims(found, self.axis) if self.keepdims else found

    def get_config(self):
        return {**super().get_config(), "largest": self.largest, "axis": self.axis, "keepdims": self.keepdims}


def plain_arg_extremes(model: keras.Model) -> keras.Model:
    """Every argmax and argmin by the converter's own operator; they differ where +0.0 and -0.0 are the extremes."""

    def make(operation: keras.Operation) -> keras.layers.Layer:
        return _ArgExtreme(isinstance(operation, Argmax), operation.axis, operation.keepdims, name=operation.name)

    return rebuild_if(model, lambda operation: isinstance(operation, (Argmax, Argmin)), make)


PLAIN_ARG_EXTREMES = Lowering(name="plain-argmax", function=plain_arg_extremes)
