"""`StringLookup` with the shape of its words said again behind it.

LiteRT has hash tables with keys of text among its own operators, but the converter takes what they find for a scalar,
and a pooling layer behind one would not run.
"""

from __future__ import annotations

from typing import Any

import keras

from keras_efficient.errors import UnsupportedLayer
from keras_efficient.export.lowerings import Lowering, operations

__all__ = ["TEXT_LOOKUP", "text_lookup"]


@keras.saving.register_keras_serializable(package="keras_efficient.export")
class _ShapedAs(keras.layers.Layer):
    """The indices in the shape of the words, by constants where one axis at most is free."""

    def __init__(self, **kwargs: Any):
        super().__init__(**{**kwargs, "autocast": False})  # words are no numbers

    def call(self, indices: Any, words: Any) -> Any:
        import tensorflow as tf

        sizes = words.shape.as_list()[1:]
        return tf.reshape(indices, tf.shape(words) if None in sizes else [-1, *sizes])

    def compute_output_spec(self, indices: Any, words: Any) -> Any:
        return keras.KerasTensor(words.shape, indices.dtype)


def text_lookup(model: keras.Model) -> keras.Model:
    """A reshape behind every `StringLookup`.

    Raises:
        UnsupportedLayer: several indices for unknown words, or none; outputs other than indices.
    """
    from keras_efficient.deploy import rebuild

    lookups = [operation for operation in operations(model) if _is_lookup(operation)]
    for layer in lookups:
        if layer.output_mode != "int" or layer.num_oov_indices != 1 or layer.invert:
            raise UnsupportedLayer(
                layer.name,
                "a file can look up words with one index for unknown ones, and in no other way",
                hint='StringLookup(output_mode="int", num_oov_indices=1) is such a lookup; or look words up before.',
            )
    return rebuild(model, lambda operation, path: None, follow=_reshaped) if lookups else model


def _is_lookup(operation: Any) -> bool:
    return type(operation) is keras.layers.StringLookup


def _reshaped(path: str, tensor: keras.KerasTensor) -> keras.KerasTensor:
    lookup, node, _ = tensor._keras_history
    return _ShapedAs()(tensor, lookup._inbound_nodes[node].input_tensors[0]) if _is_lookup(lookup) else tensor


TEXT_LOOKUP = Lowering(name="text-lookup", function=text_lookup)
