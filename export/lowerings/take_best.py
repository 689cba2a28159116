"""`keras.ops.take_along_axis` of a row's own places by one gather.

On the TensorFlow backend Keras makes a grid of indices for all axes, and counts negative places from the end.
"""

from __future__ import annotations

import keras
from keras.src.ops.numpy import TakeAlongAxis

from keras_efficient.export.lowerings import Lowering, rebuild_if

__all__ = ["TAKE_BEST", "take_best"]


class _TakeBest(keras.layers.Layer):
    """``outputs[b, i] = values[b, places[b, i]]``."""

    def call(self, values, places):
        import tensorflow as tf

        return tf.gather(values, places, batch_dims=1)


def take_best(model: keras.Model) -> keras.Model:
    """Every `take_along_axis` of two axes along the last, whose places must not be negative."""

    def applies(operation: keras.Operation) -> bool:
        if not isinstance(operation, TakeAlongAxis) or operation.axis not in (1, -1):
            return False
        return all(len(tensor.shape) == 2 for tensor in operation._inbound_nodes[0].input_tensors)

    return rebuild_if(model, applies, lambda operation: _TakeBest(name=operation.name, dtype="float32", autocast=False))


TAKE_BEST = Lowering(name="take-best", function=take_best)
