"""Classifiers of very many classes, with a `HALOSOutput` at their end: of bags of words, and of the next word."""

from __future__ import annotations

import keras
from keras import layers

from keras_efficient.models.recommender import Options, candidate_output, compressed_embedding

__all__ = ["ExtremeClassifier", "NextWord"]


def ExtremeClassifier(
    num_features,
    num_classes,
    *,
    hidden=128,
    dropout=0.0,
    normalize=True,
    embedding: Options = None,
    output: Options = None,
    name=None,
):
    """Sparse features to classes: `weighted sum of embeddings → length one → bias, ReLU → HALOSOutput`.

    The network of SLIDE and of its line of work. Its first layer is an embedding whose sum is the product with a sparse
    vector.

    Args:
        num_features: Integer. Features; ids are features plus one, 0 is padding.
        num_classes: Integer.
        hidden: Integer. Width of the hidden layer.
        dropout: Float in [0, 1). Before the output.
        normalize: Boolean. The weighted sum is divided by its length.
        embedding: as in `SequenceClassifier`.
        output: Dict or `None`: further arguments of `HALOSOutput`, such as `k` and `bits`.
        name: of the model.

    Input shape: `{"ids": (batch, length), "weights": (batch, length)}`, int32 and float32, as `extreme.SparseBatches`
    gives them. Output shape: `(batch, num_classes)`, logits; once deployed `(logits, classes)`.
    """
    ids = keras.Input((None,), dtype="int32", name="ids")
    weights = keras.Input((None,), name="weights")
    pooled = {"mask_zero": True, "combiner": "sum", "name": "embedding"}
    x = compressed_embedding(num_features + 1, hidden, embedding, **pooled)([ids, weights])
    if normalize:
        x = layers.UnitNormalization(name="length_one")(x)
    x = layers.Dense(hidden, activation="relu", name="hidden")(x)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    logits = candidate_output(num_classes, output)(x)
    return keras.Model({"ids": ids, "weights": weights}, logits, name=name or "extreme_classifier")


def NextWord(
    vocabulary_size,
    *,
    dim=128,
    units=256,
    length=None,
    dropout=0.0,
    embedding: Options = None,
    output: Options = None,
    name=None,
):
    """Words to the next one: `embedding → GRU → Dense(dim) → HALOSOutput` of the last step.

    Args:
        vocabulary_size: Integer. Words and the padding, which is id 0; the classes are the same ids.
        dim: Integer. Width of the embedding, and of what goes into the output.
        units: Integer. Of the GRU.
        length: Integer or `None`: words in a text.
        dropout: Float in [0, 1). Before the output.
        embedding: as in `SequenceClassifier`.
        output: Dict or `None`: further arguments of `HALOSOutput`, such as `k` and `bits`.
        name: of the model.

    Input shape: `(batch, length)`, int32, padded at the end. Output shape: `(batch, vocabulary_size)`, logits; once
    deployed `(logits, classes)`.
    """
    ids = keras.Input((length,), dtype="int32", name="ids")
    x = compressed_embedding(vocabulary_size, dim, embedding, mask_zero=True, name="embedding")(ids)
    x = layers.GRU(units, name="gru")(x)
    x = layers.Dense(dim, name="hidden")(x)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    logits = candidate_output(vocabulary_size, output)(x)
    return keras.Model(ids, logits, name=name or "next_word")
