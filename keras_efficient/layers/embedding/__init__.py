"""Embedding tables in a fraction of their bytes (MEmCom, Pansare et al., MLSys 2022), and what it is compared with."""

from keras_efficient.layers.embedding.layer import CompressedEmbedding
from keras_efficient.layers.embedding.memcom import MEmComEmbedding

__all__ = ["CompressedEmbedding", "MEmComEmbedding"]
