"""Huge output layers: which of very many classes to look at for an answer, learned from labelled data.

::

    from keras_efficient import extreme
    from keras_efficient.deploy import deploy

    learned = extreme.learn_index(model, (x, y), budget=0.02)     # the last layer is a HALOSOutput
    logits, classes = deploy(model)(x)
"""

from keras_efficient.extreme.classes import add_classes, remove_classes, set_classes
from keras_efficient.extreme.files import SparseBatches, SparseFile
from keras_efficient.extreme.hashes import Guards
from keras_efficient.extreme.learning import Learned, learn_index, reindex
from keras_efficient.extreme.measures import Measures, measure
from keras_efficient.extreme.queries import Queries, queries
from keras_efficient.extreme.sampled import SampledBatches

__all__ = [
    "Guards",
    "Learned",
    "Measures",
    "Queries",
    "SampledBatches",
    "SparseBatches",
    "SparseFile",
    "add_classes",
    "learn_index",
    "measure",
    "queries",
    "reindex",
    "remove_classes",
    "set_classes",
]
