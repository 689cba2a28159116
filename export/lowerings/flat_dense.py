"""`Dense` on more than two axes, one of them free, without arithmetic on shapes.

TensorFlow's product of a tensor and a matrix computes the shapes that it needs at run time, by nine operators. With one
free axis they are constants. How many are free is looked at when the graph is traced: a model inside of another is
given sizes then that its own input leaves free.
"""

from __future__ import annotations

from typing import Any

import keras

from keras_efficient.export.lowerings import Lowering, rebuild_if

__all__ = ["FLAT_DENSE", "flat_dense"]


class _FlatDense(keras.layers.Dense):
    def call(self, inputs, training=None):
        import tensorflow as tf

        shape = inputs.shape
        if not _is_cured_by_constants(shape):
            return super().call(inputs, training=training)
        outputs = super().call(tf.reshape(inputs, [-1, shape[-1]]), training=training)
        return tf.reshape(outputs, [*(-1 if size is None else size for size in shape[:-1]), self.units])


def flat_dense(model: keras.Model) -> keras.Model:
    """Every stock Dense of more than two axes as a product of two matrices, where one axis at most is free."""
    return rebuild_if(model, _applies, _twin)


def _applies(operation: Any) -> bool:
    if type(operation) is not keras.layers.Dense or not operation.built:
        return False
    ranks = [len(node.input_tensors[0].shape) for node in operation._inbound_nodes]
    return not operation.quantization_mode and not operation.lora_enabled and max(ranks, default=0) > 2


def _is_cured_by_constants(shape: Any) -> bool:
    return len(shape) > 2 and list(shape).count(None) == 1 and shape[-1] is not None


def _twin(layer: keras.layers.Dense) -> keras.layers.Dense:
    twin = _FlatDense.from_config(layer.get_config())
    twin.build((None, layer.kernel.shape[0]))
    twin.set_weights(layer.get_weights())
    return twin


FLAT_DENSE = Lowering(name="flat-dense", function=flat_dense)
