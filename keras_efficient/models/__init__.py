"""Functions that build functional Keras models, named like those of `keras.applications`."""

from keras_efficient.models.accmodel import AccModel, with_frozen_trunk, without_shrink
from keras_efficient.models.classifiers import CLASSIFIERS
from keras_efficient.models.extreme_classifier import ExtremeClassifier, NextWord
from keras_efficient.models.fsrcnn import FSRCNN
from keras_efficient.models.mlp import MLP
from keras_efficient.models.quicksrnet import QUICKSRNET_VARIANTS, QuickSRNet
from keras_efficient.models.recommender import DLRM, PointwiseRanker, RatingModel, SequenceClassifier, TwoTower
from keras_efficient.models.resnet import CifarResNet, PreResNet, ResNet50, WideResNet
from keras_efficient.models.sampled import SampledSoftmax
from keras_efficient.models.sesr import SESR, SESR_VARIANTS
from keras_efficient.models.sesr_npu import SESRNPU

__all__ = [
    "CLASSIFIERS",
    "DLRM",
    "FSRCNN",
    "MLP",
    "QUICKSRNET_VARIANTS",
    "SESR",
    "SESRNPU",
    "SESR_VARIANTS",
    "AccModel",
    "CifarResNet",
    "ExtremeClassifier",
    "NextWord",
    "PointwiseRanker",
    "PreResNet",
    "QuickSRNet",
    "RatingModel",
    "ResNet50",
    "SampledSoftmax",
    "SequenceClassifier",
    "TwoTower",
    "WideResNet",
    "with_frozen_trunk",
    "without_shrink",
]
