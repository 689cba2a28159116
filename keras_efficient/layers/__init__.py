"""Drop-in Keras layers. Each has a training form and, by `keras_efficient.deploy`, a form of stock Keras layers."""

from keras_efficient.layers.bayesian import (
    BatchEnsembleConv1D,
    BatchEnsembleConv2D,
    BatchEnsembleConv3D,
    BatchEnsembleDense,
    BayesianConv1D,
    BayesianConv1DTranspose,
    BayesianConv2D,
    BayesianConv2DTranspose,
    BayesianConv3D,
    BayesianConv3DTranspose,
    BayesianDense,
    MCDropout,
    RandomFeatureGaussianProcess,
    bayesianize,
    drawn,
)
from keras_efficient.layers.collapsible import CollapsibleLinearBlock
from keras_efficient.layers.embedding import CompressedEmbedding, MEmComEmbedding
from keras_efficient.layers.fake_quantize import FakeQuantize
from keras_efficient.layers.halos import HALOSOutput
from keras_efficient.layers.saliency import MacroblockSaliencyHead

__all__ = [
    "BatchEnsembleConv1D",
    "BatchEnsembleConv2D",
    "BatchEnsembleConv3D",
    "BatchEnsembleDense",
    "BayesianConv1D",
    "BayesianConv1DTranspose",
    "BayesianConv2D",
    "BayesianConv2DTranspose",
    "BayesianConv3D",
    "BayesianConv3DTranspose",
    "BayesianDense",
    "CollapsibleLinearBlock",
    "CompressedEmbedding",
    "FakeQuantize",
    "HALOSOutput",
    "MCDropout",
    "MEmComEmbedding",
    "MacroblockSaliencyHead",
    "RandomFeatureGaussianProcess",
    "bayesianize",
    "drawn",
]
