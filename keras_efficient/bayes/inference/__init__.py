"""Methods, each a frozen dataclass: `METHOD(...).fit(model_fn, data, seed)` gives a posterior."""

from keras_efficient.bayes.inference.cyclic import CSGHMC, CSGLD
from keras_efficient.bayes.inference.maximum import MAP, DeepEnsemble

__all__ = ["CSGHMC", "CSGLD", "MAP", "DeepEnsemble"]
