"""Methods, each a frozen dataclass: `METHOD(...).fit(model_fn, data, seed)` gives a posterior."""

from typing import Any

from keras_efficient.bayes.inference.averaging import SWA, SWAG
from keras_efficient.bayes.inference.cyclic import CSGHMC, CSGLD, SnapshotEnsemble
from keras_efficient.bayes.inference.distillation import Distillation
from keras_efficient.bayes.inference.dropout import MCDropout
from keras_efficient.bayes.inference.hamiltonian import HMC, NUTS
from keras_efficient.bayes.inference.laplace import DiagonalLaplace, KroneckerLaplace, LastLayerLaplace
from keras_efficient.bayes.inference.maximum import MAP, DeepEnsemble
from keras_efficient.bayes.inference.sampling import SGHMCSampler, SGLDSampler
from keras_efficient.bayes.inference.scaling import TemperatureScaling
from keras_efficient.bayes.inference.space import Choice, Float, Int
from keras_efficient.bayes.inference.subspace import SubspaceSlice, SubspaceVI
from keras_efficient.bayes.inference.variational import MeanFieldVI

__all__ = [
    "CSGHMC",
    "CSGLD",
    "HMC",
    "MAP",
    "METHODS",
    "NUTS",
    "SWA",
    "SWAG",
    "Choice",
    "DeepEnsemble",
    "DiagonalLaplace",
    "Distillation",
    "Float",
    "Int",
    "KroneckerLaplace",
    "LastLayerLaplace",
    "MCDropout",
    "MeanFieldVI",
    "SGHMCSampler",
    "SGLDSampler",
    "SnapshotEnsemble",
    "SubspaceSlice",
    "SubspaceVI",
    "TemperatureScaling",
]

METHODS: dict[str, Any] = {
    one.__name__: one
    for one in (
        MAP,
        DeepEnsemble,
        MCDropout,
        MeanFieldVI,
        SnapshotEnsemble,
        SGLDSampler,
        SGHMCSampler,
        CSGLD,
        CSGHMC,
        HMC,
        NUTS,
        SWA,
        SWAG,
        SubspaceSlice,
        SubspaceVI,
        LastLayerLaplace,
        DiagonalLaplace,
        KroneckerLaplace,
        TemperatureScaling,
        Distillation,
    )
}
