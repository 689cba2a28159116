"""`keras.ops.add` as an addition where Keras on TensorFlow would take it for that of a bias.

It does so whenever the second operand has one axis above 1 that is as long as the first operand's second or last axis,
which a batch of one often makes true. TFLite has no BiasAdd of integers, and no converter one of fewer than four axes
whose channels come first.
"""

from __future__ import annotations

from typing import Any

import keras
from keras.src.ops.numpy import Add

from keras_efficient.export.lowerings import Lowering, rebuild_if

__all__ = ["PLAIN_ADD", "plain_add"]


class _PlainAdd(Add):
    def call(self, x1, x2):
        import tensorflow as tf

        dtype = keras.backend.result_type(*(getattr(x, "dtype", type(x)) for x in (x1, x2)))
        return tf.add(*(keras.ops.convert_to_tensor(x, dtype) for x in (x1, x2)))


def plain_add(model: keras.Model) -> keras.Model:
    """Every addition of integers, and every one of two tensors of different shapes."""
    return rebuild_if(model, _applies, lambda operation: _PlainAdd(name=operation.name))


def _applies(operation: Any) -> bool:
    return type(operation) is Add and any(_is_mistaken(*node.input_tensors) for node in operation._inbound_nodes)


def _is_mistaken(first: Any, second: Any = None) -> bool:
    if not first.dtype.startswith("float"):
        return True
    return second is not None and tuple(first.shape) != tuple(second.shape)


PLAIN_ADD = Lowering(name="plain-add", function=plain_add)
