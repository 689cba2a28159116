"""`Embedding` as one gather of its rows.

`keras.ops.take` lets -1 stand for the last row, which becomes LESS, ADD and SELECT in front of every GATHER. A file has
no use for it: an id out of range is a mistake, and the runtimes raise when they meet one.
"""

from __future__ import annotations

from typing import Any

import keras

from keras_efficient.export.lowerings import Lowering, rebuild_if

__all__ = ["CHECKED_GATHER", "PLAIN_GATHER", "PlainGather", "checked_gather", "is_plain_embedding", "plain_gather"]


class PlainGather(keras.layers.Embedding):
    """The same weights and mask; ids of 32 or 64 bits and any rank."""

    def call(self, inputs):
        import tensorflow as tf

        ids = inputs if inputs.dtype in (tf.int32, tf.int64) else tf.cast(inputs, tf.int32)
        return tf.gather(tf.convert_to_tensor(self.embeddings), self._checked(ids))

    def _checked(self, ids):
        return ids  # LiteRT's GATHER raises for negative ids as for too large ones


class _CheckedGather(PlainGather):
    def _checked(self, ids):
        import tensorflow as tf

        # ONNX counts negative ids from the end; all of them become the first id that does not exist. Not tf.where,
        # which tf2onnx writes as twice as many nodes for integers.
        return tf.maximum(ids, tf.cast(ids < 0, ids.dtype) * self.input_dim)


def plain_gather(model: keras.Model) -> keras.Model:
    """Every stock Embedding by a gather that raises for ids out of range."""
    return rebuild_if(model, is_plain_embedding, lambda layer: _twin(PlainGather, layer))


def checked_gather(model: keras.Model) -> keras.Model:
    """The same for ONNX, whose Gather would take ids from -n on."""
    return rebuild_if(model, is_plain_embedding, lambda layer: _twin(_CheckedGather, layer))


def is_plain_embedding(operation: Any) -> bool:
    """Whether it is Keras' own Embedding of one table: not a subclass, not quantised by Keras, without LoRA."""
    stock = type(operation) is keras.layers.Embedding and operation.built
    return stock and not operation.quantization_mode and not operation.lora_enabled


def _twin(kind: type[PlainGather], layer: keras.layers.Embedding) -> PlainGather:
    twin = kind.from_config(layer.get_config())
    twin._embeddings = layer._embeddings  # the rebuilt model has its own, but where they are too large for a copy
    twin.built = True
    return twin


PLAIN_GATHER = Lowering(name="plain-gather", function=plain_gather)
CHECKED_GATHER = Lowering(name="checked-gather", function=checked_gather)
