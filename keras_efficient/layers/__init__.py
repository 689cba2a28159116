"""Drop-in Keras layers. Each has a training form and, by `keras_efficient.deploy`, a form of stock Keras layers."""

from keras_efficient.layers.collapsible import CollapsibleLinearBlock
from keras_efficient.layers.embedding import CompressedEmbedding, MEmComEmbedding
from keras_efficient.layers.fake_quantize import FakeQuantize
from keras_efficient.layers.halos import HALOSOutput
from keras_efficient.layers.saliency import MacroblockSaliencyHead

__all__ = [
    "CollapsibleLinearBlock",
    "CompressedEmbedding",
    "FakeQuantize",
    "HALOSOutput",
    "MEmComEmbedding",
    "MacroblockSaliencyHead",
]
