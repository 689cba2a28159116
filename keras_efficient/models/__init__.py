"""Functions that build functional Keras models, named like those of `keras.applications`."""

from keras_efficient.models.accmodel import AccModel, with_frozen_trunk, without_shrink
from keras_efficient.models.extreme_classifier import ExtremeClassifier, NextWord
from keras_efficient.models.fsrcnn import FSRCNN
from keras_efficient.models.quicksrnet import QUICKSRNET_VARIANTS, QuickSRNet
from keras_efficient.models.recommender import DLRM, PointwiseRanker, RatingModel, SequenceClassifier, TwoTower
from keras_efficient.models.sampled import SampledSoftmax
from keras_efficient.models.sesr import SESR, SESR_VARIANTS
from keras_efficient.models.sesr_npu import SESRNPU

__all__ = [
    "DLRM",
    "FSRCNN",
    "QUICKSRNET_VARIANTS",
    "SESR",
    "SESRNPU",
    "SESR_VARIANTS",
    "AccModel",
    "ExtremeClassifier",
    "NextWord",
    "PointwiseRanker",
    "QuickSRNet",
    "RatingModel",
    "SampledSoftmax",
    "SequenceClassifier",
    "TwoTower",
    "with_frozen_trunk",
    "without_shrink",
]
