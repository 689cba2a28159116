"""Recommenders around embedding tables that may be compressed: classifiers of sequences, rankers, towers, a DLRM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import layers, ops

from keras_efficient.layers import CompressedEmbedding, HALOSOutput, MEmComEmbedding
from keras_efficient.layers.embedding.plans import ImpossibleCompression

__all__ = [
    "DLRM",
    "Options",
    "PointwiseRanker",
    "RatingModel",
    "SequenceClassifier",
    "TwoTower",
    "candidate_output",
    "compressed_embedding",
]

Options = Mapping[str, Any] | None


def SequenceClassifier(
    vocabulary_size,
    num_classes,
    *,
    dim=64,
    hidden=(64,),
    activation="relu",
    dropout=0.0,
    normalize=False,
    combiner="mean",
    length=None,
    embedding: Options = None,
    output: Options = None,
    name=None,
):
    """The last entities of a user, or the words of a text, to the logits of classes: MEmCom's first kind of network.

    `ids → embedding → mean over the sequence → Dense, activation (BatchNorm), Dropout, for each width → logits`. With
    the entities themselves as classes it is the paper's ranker: a softmax over all candidates.

    Args:
        vocabulary_size: Integer. Entities and the padding, which is id 0.
        num_classes: Integer.
        dim: Integer. Width of the embedding.
        hidden: widths of the dense layers between pooling and logits.
        activation: of those.
        dropout: Float in [0, 1). Before the logits.
        normalize: Boolean. BatchNormalization after each dense layer.
        combiner: `"mean"`, `"sum"` or `"sqrtn"`: how a sequence is pooled.
        length: Integer or `None`: ids in a sequence.
        embedding: Dict or `None`: arguments of `MEmComEmbedding`, or, with `method`, of `CompressedEmbedding`. `None`:
            the whole table in float32.
        output: Dict or `None`: arguments of `HALOSOutput`, such as `k` and `bits`, in the place of a plain layer: once
            an index is learned, the deployed model answers `(logits, classes)` from a few candidates.
        name: of the model.

    Input shape: `(batch, length)`, integers. Output shape: `(batch, num_classes)`, logits.

    Source: Learning Compressed Embeddings for On-Device Inference, MLSys 2022, section 5.
    """
    ids = keras.Input((length,), dtype="int32", name="ids")
    x = compressed_embedding(vocabulary_size, dim, embedding, mask_zero=True, combiner=combiner, name="embedding")(ids)
    for index, width in enumerate(hidden):
        x = layers.Dense(width, activation=activation, name=f"hidden_{index}")(x)
        if normalize:
            x = layers.BatchNormalization(name=f"hidden_{index}_norm")(x)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    # Either has a row for each class, which training and a short list of candidates can take by themselves.
    if output is None:
        last = layers.EinsumDense("bh,ch->bc", num_classes, bias_axes="c", name="logits")
    else:
        last = candidate_output(num_classes, output)
    return keras.Model(ids, last(x), name=name or "sequence_classifier")


def PointwiseRanker(
    num_users, num_items, *, candidates=None, dim=32, hidden=(64, 32), dropout=0.0, embedding: Options = None, name=None
):
    """Scores of candidate items for a user, each scored by the same tower: MEmCom's rankers, pointwise and RankNet.

    `score = MLP([user vector, item vector, user · item])`. Trained with a pointwise loss it is a pointwise ranker, with
    two candidates and `recsys.ranknet` the paper's RankNet.

    Args:
        num_users, num_items: Integers.
        candidates: Integer or `None`: items scored in one call.
        dim: Integer. Width of both embeddings.
        hidden: widths of the tower's dense layers (ReLU).
        dropout: Float in [0, 1), behind the embeddings.
        embedding: as in `SequenceClassifier`, of the items and of the users.
        name: of the model.

    Input shape: `{"user": (batch,), "items": (batch, candidates)}`, integers.

    Output shape: `(batch, candidates)`.
    """
    user = keras.Input((), dtype="int32", name="user")
    items = keras.Input((candidates,), dtype="int32", name="items")
    item = compressed_embedding(num_items, dim, embedding, name="item_embedding")(items)
    query = compressed_embedding(num_users, dim, embedding, name="user_embedding")(user)
    if dropout:
        item = layers.Dropout(dropout, name="item_dropout")(item)
        query = layers.Dropout(dropout, name="user_dropout")(query)
    query = ops.expand_dims(query, 1)
    product = item * query
    x = ops.concatenate([item, product, query + ops.zeros_like(item)], axis=-1)
    for index, width in enumerate(hidden):
        x = layers.Dense(width, activation="relu", name=f"hidden_{index}")(x)
    scores = layers.Dense(1, name="score")(x)
    outputs = ops.squeeze(scores, -1) + ops.sum(product, axis=-1)
    return keras.Model({"user": user, "items": items}, outputs, name=name or "pointwise_ranker")


def RatingModel(
    num_users,
    num_items,
    *,
    dim=64,
    rating_range=(0.0, 5.0),
    user_embedding: Options = None,
    item_embedding: Options = None,
    name=None,
):
    """A rating from the product of a user's and an item's vector: `low + (high − low) · sigmoid(u · v)`.

    Args:
        num_users, num_items: Integers.
        dim: Integer. Width of both embeddings.
        rating_range: lowest and highest rating.
        user_embedding, item_embedding: as `embedding` in `SequenceClassifier`.
        name: of the model.

    Input shape: `{"user": (batch,), "item": (batch,)}`, integers. Output shape: `(batch, 1)`.
    """
    user = keras.Input((), dtype="int32", name="user")
    item = keras.Input((), dtype="int32", name="item")
    u = compressed_embedding(num_users, dim, user_embedding, name="user_embedding")(user)
    v = compressed_embedding(num_items, dim, item_embedding, name="item_embedding")(item)
    low, high = rating_range
    score = ops.sum(u * v, axis=-1, keepdims=True)
    outputs = ops.sigmoid(score) * (high - low) + low
    return keras.Model({"user": user, "item": item}, outputs, name=name or "rating_model")


def TwoTower(
    vocabulary_size,
    num_items,
    *,
    dim=64,
    hidden=(64,),
    combiner="mean",
    query_embedding: Options = None,
    item_embedding: Options = None,
):
    """Two models whose outputs' product is the score of an item for a query: retrieval.

    The query tower is `history → embedding → pooled → Dense …`, the item tower an embedding and as many dense layers;
    both end in a linear `Dense(dim)`.

    Args:
        vocabulary_size: Integer. Entities of a history and the padding, which is id 0.
        num_items: Integer. Candidates.
        dim: Integer. Width of the embeddings and of the outputs.
        hidden: widths of the dense layers (ReLU) of each tower.
        combiner: how a history is pooled.
        query_embedding, item_embedding: as `embedding` in `SequenceClassifier`.

    Returns:
        The query tower, `(batch, length)` to `(batch, dim)`, and the item tower, `(batch,)` to `(batch, dim)`.
    """
    history = keras.Input((None,), dtype="int32", name="history")
    item = keras.Input((), dtype="int32", name="item")
    pooled = {"mask_zero": True, "combiner": combiner}
    x = compressed_embedding(vocabulary_size, dim, query_embedding, name="history_embedding", **pooled)(history)
    query = keras.Model(history, _tower(x, hidden, dim), name="query_tower")
    y = compressed_embedding(num_items, dim, item_embedding, name="item_embedding")(item)
    return query, keras.Model(item, _tower(y, hidden, dim), name="item_tower")


def DLRM(
    vocabulary_sizes: Sequence[int],
    num_dense,
    *,
    dim=32,
    bottom=(64,),
    top=(128, 64),
    embedding: Options = None,
    name=None,
):
    """A click model: dense features and categories, all pairs of their vectors multiplied (Naumov et al., 2019).

    `logit = MLP([bottom(dense), ⟨e_a, e_b⟩ for all pairs a < b])` of the vectors of every category and of the dense
    features.

    Args:
        vocabulary_sizes: Integers, one a category.
        num_dense: Integer. Dense features.
        dim: Integer. Width of every vector.
        bottom, top: widths of the dense layers (ReLU) before and behind the products.
        embedding: as in `SequenceClassifier`, of every category that it makes smaller; the whole table of the others.
        name: of the model.

    Input shape: `{"dense": (batch, num_dense), "categories": (batch, len(vocabulary_sizes))}`.

    Output shape: `(batch, 1)`, logits.

    Raises:
        ValueError: a compression that not even the largest vocabulary allows; the message says how far it goes.
    """
    if not len(vocabulary_sizes):
        raise ValueError("A DLRM has one category at least. Received: no vocabulary sizes.")
    # Raises what is not only impossible for small vocabularies.
    compressed_embedding(max(vocabulary_sizes), dim, embedding)
    dense = keras.Input((num_dense,), name="dense")
    categories = keras.Input((len(vocabulary_sizes),), dtype="int32", name="categories")
    x = dense
    for index, width in enumerate(bottom):
        x = layers.Dense(width, activation="relu", name=f"bottom_{index}")(x)
    x = layers.Dense(dim, activation="relu", name="bottom_vector")(x)
    vectors = [x]
    for index, size in enumerate(vocabulary_sizes):
        table = compressed_embedding(size, dim, _if_smaller(size, dim, embedding), name=f"embedding_{index}")
        vectors.append(table(categories[:, index]))
    pairs = [ops.sum(a * b, axis=-1, keepdims=True) for i, a in enumerate(vectors) for b in vectors[:i]]
    y = ops.concatenate([x, *pairs], axis=-1)
    for index, width in enumerate(top):
        y = layers.Dense(width, activation="relu", name=f"top_{index}")(y)
    logit = layers.Dense(1, name="logit")(y)
    return keras.Model({"dense": dense, "categories": categories}, logit, name=name or "dlrm")


def compressed_embedding(size: int, dim: int, options: Options, **common: Any) -> keras.Layer:
    """The whole table, or what the options say: `MEmComEmbedding`, or, with a method, `CompressedEmbedding`."""
    if options is None:
        return CompressedEmbedding(size, dim, method="reduced", **common)
    if not isinstance(options, Mapping):
        raise ValueError(f"An embedding's options are a dict, such as {{'compression': 16}}. Received: {options!r}.")
    kind = CompressedEmbedding if "method" in options else MEmComEmbedding
    return kind(size, dim, **{**common, **options})


def candidate_output(num_classes: int, options: Options) -> HALOSOutput:
    """A `HALOSOutput` named `logits` with the options."""
    if not isinstance(options, Mapping | None):
        raise ValueError(f"An output's options are a dict, such as {{'k': 20}}. Received: {options!r}.")
    return HALOSOutput(num_classes, **{"name": "logits", **(options or {})})


def _if_smaller(size: int, dim: int, options: Options) -> Options:
    """The options, unless they are impossible for a vocabulary as small as this."""
    try:
        layer = compressed_embedding(size, dim, options)
    except ImpossibleCompression:
        return None
    return options if layer.compression_ratio > 1 else None


def _tower(x: Any, hidden: Sequence[int], dim: int) -> Any:
    for index, width in enumerate(hidden):
        x = layers.Dense(width, activation="relu", name=f"hidden_{index}")(x)
    return layers.Dense(dim, name="vector")(x)
