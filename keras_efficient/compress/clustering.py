"""Weight clustering: the values of a kernel share a few centroids, which go on learning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras

from keras_efficient.compress._tfmot import import_tf_keras, import_tfmot
from keras_efficient.compress.bridge import to_tf_keras
from keras_efficient.compress.session import Session, keep_mask, selected
from keras_efficient.errors import UnknownName, WrongArgument

__all__ = ["cluster"]

_STARTS = {
    "linear": "LINEAR",
    "density": "DENSITY_BASED",
    "kmeans++": "KMEANS_PLUS_PLUS",
    "random": "RANDOM",
}


def cluster(
    model: keras.Model,
    clusters: int = 16,
    *,
    start: str = "kmeans++",
    keep_zeros: bool = False,
    layers: Iterable[str] | None = None,
) -> Session:
    """Prepares a model for training with clustered kernels.

    Every value of a kernel is one of `clusters` centroids of its own layer: log2(clusters) bits a weight once the file
    is compressed. Kernels of convolutions, dense layers and embeddings are clustered; depthwise kernels, biases,
    recurrent and frozen layers are not (`session.skipped` names them).

    Args:
        model: a functional or Sequential Keras 3 model; it is deployed first and not changed.
        clusters: number of different values in each kernel, from 2 on.
        start: where the centroids begin: ``"kmeans++"``, ``"linear"``, ``"density"`` or ``"random"``.
        keep_zeros: whether zeros of a pruned model stay zero; zero is then one of the values.
        layers: paths of the layers to cluster, by default all that can be.

    Returns:
        A `Session`; its `strip()` has kernels of at most `clusters` different values.

    Raises:
        WrongArgument: fewer than two clusters, or nothing to cluster (`UnknownName` for a path or a start).
        UnsupportedLayer, MissingDependency: see `to_tf_keras`.
    """
    if not isinstance(clusters, int) or clusters < 2:
        raise WrongArgument(f"clusters={clusters!r}: at least 2 different values are needed.")
    if start not in _STARTS:
        raise UnknownName("start of the centroids", start, _STARTS)
    bridge = to_tf_keras(model)
    tfmot, tf_keras = import_tfmot(), import_tf_keras()
    chosen = selected(bridge, layers)
    reasons = {
        twin.name: _obstacle(bridge.model.get_layer(twin.name), twin.path in chosen, clusters) for twin in bridge.twins
    }
    options = {
        "number_of_clusters": clusters,
        "cluster_centroids_init": tfmot.clustering.keras.CentroidInitialization[_STARTS[start]],
        "preserve_sparsity": keep_zeros,
    }

    def wrap(layer):
        if layer.name in reasons and reasons[layer.name] is None:
            return keep_mask(tfmot.clustering.keras.cluster_weights(layer, **options))
        return layer

    clustered = [twin.path for twin in bridge.twins if reasons[twin.name] is None]
    if not clustered:
        raise WrongArgument(f"Model {model.name!r} has no layer that can be clustered.", hint="Choose other layers.")
    skipped = {twin.path: why for twin in bridge.twins if twin.weights and (why := reasons[twin.name])}
    return _ClusteringSession(
        bridge, tf_keras.models.clone_model(bridge.model, clone_function=wrap), clustered, skipped
    )


class _ClusteringSession(Session):
    def _strip(self) -> keras.Model:
        stripped = import_tfmot().clustering.keras.strip_clustering(self.model)
        return self._bridge.back({layer.name: layer.get_weights() for layer in stripped.layers})


def _obstacle(layer: Any, chosen: bool, clusters: int) -> str | None:
    """Why a tf_keras layer is not clustered; `None` where it is."""
    from tensorflow_model_optimization.python.core.clustering.keras.clustering_registry import ClusteringRegistry

    names = ClusteringRegistry._LAYERS_WEIGHTS_MAP.get(type(layer), [])
    if not chosen:
        return "not chosen"
    if not layer.trainable:
        return "it is frozen (trainable=False)"
    if not names:
        return f"tfmot clusters no weight of {type(layer).__name__}"
    smallest = min(int(getattr(layer, name).shape.num_elements()) for name in names)
    if smallest <= clusters:
        return f"it has {smallest} weights, not more than the {clusters} clusters"
    return None
