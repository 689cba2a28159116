"""`keras.ops.depth_to_space` by reshaping and transposing: TFLite's converter has no 16-bit DEPTH_TO_SPACE."""

from __future__ import annotations

import keras
from keras.src.ops.nn import DepthToSpace

from keras_efficient.export.lowerings import Lowering, rebuild_if

__all__ = ["TRANSPOSED_SHUFFLE", "transposed_shuffle"]


class _TransposedShuffle(keras.layers.Layer):
    """(N·H)×W×r×(r·C) → (N·H)×r×W×(r·C), between two reshapes: rows and batch are one axis, r and C another."""

    def __init__(self, block_size: int, **kwargs):
        super().__init__(**kwargs)
        self.block_size = block_size

    def call(self, x):
        import tensorflow as tf

        r, shape = self.block_size, tf.shape(x)
        height, width = (x.shape[axis] or shape[axis] for axis in (1, 2))
        channels = x.shape[3] // (r * r)
        x = tf.reshape(x, [-1, width, r, r * channels])
        x = tf.transpose(x, [0, 2, 1, 3])
        return tf.reshape(x, [-1, height * r, width * r, channels])

    def get_config(self):
        return {**super().get_config(), "block_size": self.block_size}


def transposed_shuffle(model: keras.Model) -> keras.Model:
    """Every channels-last `depth_to_space` as reshape, transpose, reshape."""
    return rebuild_if(
        model,
        lambda operation: isinstance(operation, DepthToSpace) and operation.data_format == "channels_last",
        lambda operation: _TransposedShuffle(operation.block_size, name=operation.name),
    )


TRANSPOSED_SHUFFLE = Lowering(name="transposed-shuffle", function=transposed_shuffle)
