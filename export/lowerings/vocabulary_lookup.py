"""`IntegerLookup` as a binary search in a sorted constant: hash tables are no operators of LiteRT's or ONNX' own.

A vocabulary of n keys takes ⌈log₂(n + 1)⌉ steps of a gather, a comparison and a sum, on integers of 32 bits.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_efficient.errors import UnsupportedLayer
from keras_efficient.export.lowerings import Lowering, rebuild_if

__all__ = ["VOCABULARY_LOOKUP", "vocabulary_lookup"]

_LIMITS = np.iinfo(np.int32)


@keras.saving.register_keras_serializable(package="keras_efficient.export")
class _SearchedLookup(keras.layers.Layer):
    """``place(id)`` where the id is a key, else `unknown`.

    Weights: the keys, rising, filled up to a power of two with the largest; and what each stands for.
    """

    def __init__(self, size: int, unknown: int, **kwargs: Any):
        super().__init__(**{**kwargs, "dtype": "int32", "trainable": False, "autocast": False})
        self.size, self.unknown = size, unknown

    def build(self, input_shape: Any = None) -> None:
        options = {"shape": (self.size,), "dtype": "int32", "initializer": "zeros", "trainable": False}
        self.keys = self.add_weight(name="keys", **options)
        self.places = self.add_weight(name="places", **options)

    def call(self, inputs: Any) -> Any:
        import tensorflow as tf

        ids = inputs if inputs.dtype in (tf.int32, tf.int64) else tf.cast(inputs, tf.int32)
        keys = tf.cast(tf.convert_to_tensor(self.keys), ids.dtype)  # ids of 64 bits must not be cut to a key
        places = tf.convert_to_tensor(self.places)
        found = tf.zeros_like(ids, tf.int32)  # the last key that is not above the id, if the first is not
        step = self.size // 2
        while step:
            above = tf.gather(keys, found + step)
            found = found + step * tf.cast(above <= ids, tf.int32)
            step //= 2
        known = tf.cast(tf.equal(tf.gather(keys, found), ids), tf.int32)
        return known * tf.gather(places, found) + (1 - known) * self.unknown

    def compute_output_spec(self, inputs: Any) -> Any:
        return keras.KerasTensor(inputs.shape, "int32")

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "size": self.size, "unknown": self.unknown}


def vocabulary_lookup(model: keras.Model) -> keras.Model:
    """Every `IntegerLookup` of a fixed vocabulary as a search.

    Raises:
        UnsupportedLayer: several indices for unknown ids, or none; outputs other than indices; keys of more
            than 32 bits.
    """
    return rebuild_if(model, _applies, _twin)


def _applies(operation: Any) -> bool:
    return type(operation) is keras.layers.IntegerLookup


def _twin(layer: keras.layers.IntegerLookup) -> _SearchedLookup:
    config = layer.get_config()
    if config["output_mode"] != "int" or config["num_oov_indices"] != 1 or config.get("invert"):
        raise UnsupportedLayer(
            layer.name,
            "only a lookup of indices with one index for unknown ids can be put into a file",
            hint='IntegerLookup(output_mode="int", num_oov_indices=1).',
        )
    masked = layer.mask_token is not None
    unknown = int(masked)
    vocabulary = np.asarray(layer.get_vocabulary(include_special_tokens=False), np.int64)
    keys = np.concatenate([[layer.mask_token], vocabulary]) if masked else vocabulary
    places = np.concatenate([[0], np.arange(len(vocabulary)) + unknown + 1]) if masked else np.arange(len(keys)) + 1
    if not len(keys) or keys.min() < _LIMITS.min or keys.max() > _LIMITS.max:
        raise UnsupportedLayer(layer.name, "its vocabulary is empty, or has keys of more than 32 bits")
    order = np.argsort(keys)
    size = 2 ** int(np.ceil(np.log2(len(keys)))) if len(keys) > 1 else 1
    # At the end the largest key once more, so that every number of steps finds it.
    order = np.concatenate([order, np.repeat(order[-1:], size - len(order))])
    twin = _SearchedLookup(size, unknown, name=layer.name)
    twin.build()
    twin.set_weights([keys[order].astype("int32"), places[order].astype("int32")])
    return twin


VOCABULARY_LOOKUP = Lowering(name="vocabulary-lookup", function=vocabulary_lookup)
