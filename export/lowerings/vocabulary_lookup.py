"""`IntegerLookup` as a binary search in a sorted constant: no file has a hash table whose keys are integers.

A vocabulary of n keys takes ⌈log₂ n⌉ steps of a gather, a comparison and a sum, on integers of 32 bits.
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
    """``place(id)`` where the id is a key, else ``first_unknown + id mod num_unknown``; without any, it raises.

    Weights: the keys, rising, and the place of each.
    """

    def __init__(self, size: int, num_unknown: int, first_unknown: int, **kwargs: Any):
        super().__init__(**{**kwargs, "dtype": "int32", "trainable": False, "autocast": False})
        self.size, self.num_unknown, self.first_unknown = size, num_unknown, first_unknown

    def build(self, input_shape: Any = None) -> None:
        options = {"shape": (self.size,), "dtype": "int32", "initializer": "zeros", "trainable": False}
        self.keys = self.add_weight(name="keys", **options)
        self.places = self.add_weight(name="places", **options)

    def call(self, inputs: Any) -> Any:
        import tensorflow as tf

        keys, places = tf.convert_to_tensor(self.keys), tf.convert_to_tensor(self.places)
        ids = tf.cast(inputs, tf.int32)
        found, size = 0, self.size  # the last key that is not above the id, if there is one, is among `size` from here
        while size > 1:
            half = size // 2
            found += half * tf.cast(tf.gather(keys, found + half) <= ids, tf.int32)
            size -= half
        known = tf.equal(tf.gather(keys, found), ids)
        if inputs.dtype.is_floating or inputs.dtype.max > _LIMITS.max:
            inputs = tf.cast(inputs, tf.int64)
            known = tf.logical_and(known, tf.equal(inputs, tf.cast(ids, tf.int64)))  # not an id cut to a key
        unknown = 1 - tf.cast(known, tf.int32)
        if self.num_unknown == 0:  # beyond the end, where the runtimes raise as Keras does
            return tf.gather(places, found + unknown * self.size)
        return (1 - unknown) * tf.gather(places, found) + unknown * (self.first_unknown + self._bucket(inputs))

    def _bucket(self, ids: Any) -> Any:
        """``id mod num_unknown``, never negative."""
        import tensorflow as tf

        count = self.num_unknown
        return tf.cast((ids % count + count) % count, tf.int32) if count > 1 else 0  # tf2onnx's % keeps the sign

    def compute_output_spec(self, inputs: Any) -> Any:
        return keras.KerasTensor(inputs.shape, "int32")

    def get_config(self) -> dict[str, Any]:
        own = {"size": self.size, "num_unknown": self.num_unknown, "first_unknown": self.first_unknown}
        return {**super().get_config(), **own}


def vocabulary_lookup(model: keras.Model) -> keras.Model:
    """Every `IntegerLookup` as a search.

    Raises:
        UnsupportedLayer: outputs other than indices; unknown ids hashed by FarmHash; an empty vocabulary; keys of more
            than 32 bits.
    """
    return rebuild_if(model, _applies, _twin)


def _applies(operation: Any) -> bool:
    return type(operation) is keras.layers.IntegerLookup


def _twin(layer: keras.layers.IntegerLookup) -> _SearchedLookup:
    config = layer.get_config()
    num_unknown = config["num_oov_indices"]
    hashed = num_unknown > 1 and config.get("oov_method", "floormod") != "floormod"
    if config["output_mode"] != "int" or config.get("invert") or hashed:
        raise UnsupportedLayer(
            layer.name,
            "a file can look up indices of integers, unknown ones by their remainder, and nothing else",
            hint='IntegerLookup(output_mode="int", oov_method="floormod") is such a lookup.',
        )
    keys = np.asarray(layer.get_vocabulary(include_special_tokens=False), np.int64)
    first_unknown = int(layer.mask_token is not None)
    places = np.arange(len(keys)) + first_unknown + num_unknown
    if layer.mask_token is not None:
        keys, places = np.append(keys, layer.mask_token), np.append(places, 0)
    if not len(keys) or keys.min() < _LIMITS.min or keys.max() > _LIMITS.max:
        raise UnsupportedLayer(layer.name, "its vocabulary is empty, or has keys of more than 32 bits")
    order = np.argsort(keys)
    twin = _SearchedLookup(len(keys), num_unknown, first_unknown, name=layer.name)
    twin.build()
    twin.set_weights([keys[order].astype("int32"), places[order].astype("int32")])
    return twin


VOCABULARY_LOOKUP = Lowering(name="vocabulary-lookup", function=vocabulary_lookup)
