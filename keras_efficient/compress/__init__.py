"""Smaller and coarser models by training: quantisation-aware training, pruning, weight clustering.

One concept, a session::

    from keras_efficient import compress

    session = compress.prune(model, sparsity=0.5)       # or cluster(model, clusters=16), or quantize_aware(model)
    session.compile("adam", "mse")
    session.fit(x, y, epochs=3)
    compressed = session.strip()                         # a Keras 3 model of stock layers
    session.export("model.tflite")                       # or straight to a checked file; int8 takes calibration=x

The work is done by tensorflow-model-optimization, which knows tf_keras only: the deployed model crosses a bridge (its
graph is replayed with tf_keras layers, its weights are copied), is trained there, and comes back. Neither `tf.keras`
nor the environment of the process is changed. Needs the TensorFlow backend and
``pip install 'keras-efficient[compress]'``.

Embedding tables are another matter: `advise_embeddings` and `compress_embeddings` need neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from keras_efficient import lazy

if TYPE_CHECKING:
    from keras_efficient.compress.clustering import cluster
    from keras_efficient.compress.embeddings import (
        EmbeddingAdvice,
        EmbeddingSetting,
        advise_embeddings,
        compress_embeddings,
    )
    from keras_efficient.compress.pruning import prune
    from keras_efficient.compress.quantization import quantize_aware
    from keras_efficient.compress.session import Session
    from keras_efficient.compress.sizes import KernelSizes, Sizes, measure

__all__ = [
    "EmbeddingAdvice",
    "EmbeddingSetting",
    "KernelSizes",
    "Session",
    "Sizes",
    "advise_embeddings",
    "cluster",
    "compress_embeddings",
    "measure",
    "prune",
    "quantize_aware",
]

_HOMES = {
    "EmbeddingAdvice": "embeddings",
    "EmbeddingSetting": "embeddings",
    "KernelSizes": "sizes",
    "Session": "session",
    "Sizes": "sizes",
    "advise_embeddings": "embeddings",
    "cluster": "clustering",
    "compress_embeddings": "embeddings",
    "measure": "sizes",
    "prune": "pruning",
    "quantize_aware": "quantization",
}


__getattr__, __dir__ = lazy.names(__name__, _HOMES, __all__)
