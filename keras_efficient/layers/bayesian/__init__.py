"""Layers that draw: distributions over weights, dropout that stays on, and what turns a network into its twin."""

from keras_efficient.layers.bayesian.batch_ensemble import (
    BatchEnsembleConv1D,
    BatchEnsembleConv2D,
    BatchEnsembleConv3D,
    BatchEnsembleDense,
)
from keras_efficient.layers.bayesian.distributions import Distribution, Parameter
from keras_efficient.layers.bayesian.dropout import MCDropout
from keras_efficient.layers.bayesian.gaussian_process import PrecisionReset, RandomFeatureGaussianProcess
from keras_efficient.layers.bayesian.layer import (
    BayesianConv1D,
    BayesianConv1DTranspose,
    BayesianConv2D,
    BayesianConv2DTranspose,
    BayesianConv3D,
    BayesianConv3DTranspose,
    BayesianDense,
    BayesianWeights,
)
from keras_efficient.layers.bayesian.twins import bayesianize, drawn, member, with_dropout

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
    "BayesianWeights",
    "Distribution",
    "MCDropout",
    "Parameter",
    "PrecisionReset",
    "RandomFeatureGaussianProcess",
    "bayesianize",
    "drawn",
    "member",
    "with_dropout",
]
