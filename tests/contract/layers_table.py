"""The table of our layers: a new layer is one row here, and gets every check of test_layers.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np

from keras_efficient import layers
from keras_efficient.layers.bayesian import Distribution, Parameter
from keras_efficient.layers.halos import HashPlan, Index, RouterPlan


@dataclass(frozen=True)
class LayerRow:
    """A layer and what it promises.

    name: identifies the row. make: makes the layer from `name=` and `dtype=`. input_shape: with the batch, free
    dimensions `None`. stock: the stock layer that it drops in for, `None` for one without a model. extra: its arguments
    that the stock layer lacks, keyword-only. changed: arguments of the stock layer that it leaves out, or whose default
    differs. num_ids: for a layer of integer ids, how many there are. approximates: why the deployed form's inference
    differs from the layer's, `None` where it is equal. exports: whether float files can hold it. prepare: what is done
    to the built layer before it is looked at.
    """

    name: str
    make: Callable[..., keras.Layer]
    input_shape: tuple[int | None, ...]
    stock: type[keras.Layer] | None = None
    extra: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    num_ids: int | None = None
    approximates: str | None = None
    exports: bool = True
    prepare: Callable[[keras.layers.Layer], None] | None = None

    def sample(self, *, batch: int = 2, free: int = 9, seed: int = 0) -> np.ndarray:
        shape = (batch, *(free if n is None else n for n in self.input_shape[1:]))
        rng = np.random.default_rng(seed)
        if self.num_ids is not None:
            return rng.integers(0, self.num_ids, shape).astype("int32")
        return rng.normal(size=shape).astype("float32")

    def input(self) -> keras.KerasTensor:
        dtype = "float32" if self.num_ids is None else "int32"
        return keras.Input(batch_shape=self.input_shape, dtype=dtype, name="input")

    def model(self, dtype: str = "float32") -> keras.Model:
        """The layer alone, between an input and an output; made alike at every call."""
        keras.utils.set_random_seed(7)
        inputs = self.input()
        model = keras.Model(inputs, self.make(name="layer", dtype=dtype)(inputs), name="model")
        # No weight stays zero, or a bias lost on the way would not be seen.
        rng = np.random.default_rng(8)
        for weight in model.trainable_variables:
            weight.assign(weight + rng.normal(scale=0.05, size=weight.shape))
        if self.prepare is not None:
            self.prepare(model.get_layer("layer"))
        return model


_COLLAPSIBLE = ("expansion", "residual", "collapsed", "kernel_bits", "sparsity")

_MEMCOM = (
    "compression",
    "hash_size",
    "form",
    "bias",
    "scalars",
    "scalar_bits",
    "own_rows",
    "hash",
    "bits",
    "combiner",
    "out_of_range",
    "frozen",
)
_NOT_OF_EMBEDDING = ("embeddings_constraint", "weights", "lora_rank", "lora_alpha", "quantization_config")


def _memcom(name: str, **options) -> LayerRow:
    return LayerRow(
        name=f"MEmComEmbedding-{name}",
        make=lambda **k: layers.MEmComEmbedding(50, 8, **options, **k),
        input_shape=(None, None),
        stock=keras.layers.Embedding,
        extra=_MEMCOM,
        changed=_NOT_OF_EMBEDDING,
        num_ids=50,
    )


def _compressed(method: str, **options) -> LayerRow:
    return LayerRow(
        name=f"CompressedEmbedding-{method}",
        make=lambda **k: layers.CompressedEmbedding(50, 8, method=method, **options, **k),
        input_shape=(None, None),
        stock=keras.layers.Embedding,
        extra=("method", "compression", "size", "bits", "combiner", "out_of_range", "frozen"),
        changed=_NOT_OF_EMBEDDING,
        num_ids=50,
    )


_DRAWS = "inference draws, the deployed form is the mean"
_BAYESIAN = ("num_data", "estimator", "prior", "posterior", "bias_posterior", "seed")
_NOT_OF_DENSE = ("lora_rank", "lora_alpha", "quantization_config")
_LOCAL = "local_reparameterization"
_FACTORS = ("members", "num_data", "posterior", "prior", "seed")
_POSTERIOR = Distribution("Normal", loc=Parameter(), scale=Parameter(0.05))


def _bayesian(name: str, stock: type[keras.Layer], shape: tuple[int | None, ...], *arguments, **options) -> LayerRow:
    kind = getattr(layers, f"Bayesian{stock.__name__}")
    return LayerRow(
        name=f"{kind.__name__}-{name}",
        make=lambda **k: kind(*arguments, num_data=100, seed=3, **options, **k),
        input_shape=shape,
        stock=stock,
        extra=_BAYESIAN,
        changed=_NOT_OF_DENSE,
        approximates=_DRAWS,
    )


LAYERS = (
    LayerRow(
        name="CollapsibleLinearBlock",
        make=lambda **k: layers.CollapsibleLinearBlock(6, 3, padding="same", activation="relu", expansion=16, **k),
        input_shape=(None, None, None, 6),
        stock=keras.layers.Conv2D,
        extra=_COLLAPSIBLE,
    ),
    LayerRow(
        name="CollapsibleLinearBlock-strides-groups",
        make=lambda **k: layers.CollapsibleLinearBlock(8, (5, 2), strides=2, groups=2, expansion=8, **k),
        input_shape=(None, None, None, 4),
        stock=keras.layers.Conv2D,
        extra=_COLLAPSIBLE,
    ),
    LayerRow(
        name="CollapsibleLinearBlock-sparse",
        make=lambda **k: layers.CollapsibleLinearBlock(4, 3, padding="same", expansion=8, sparsity="2:4", **k),
        input_shape=(None, None, None, 8),
        stock=keras.layers.Conv2D,
        extra=_COLLAPSIBLE,
    ),
    LayerRow(
        name="FakeQuantize",
        make=lambda **k: layers.FakeQuantize(minimum=-4.0, maximum=4.0, **k),
        input_shape=(None, None, 3),
        exports=False,
    ),
    _memcom("paper", compression=4, mask_zero=True),
    _memcom("bias", compression=3, bias=True, own_rows=3, combiner="mean", mask_zero=True),
    _memcom("int8-groups", hash_size=7, scalars=2, scalar_bits=8, bits=8, hash="mix", out_of_range="wrap"),
    _memcom("subspace", hash_size=12, form="subspace", bits=1, combiner="sqrtn"),
    _memcom("codebooks", hash_size=3, form="codebooks", bits=8, combiner="mean", mask_zero=True),
    # The other methods differ in their plan only: tests/layers/test_embedding.py goes through all of them.
    _compressed("quotient_remainder", compression=2, bits=8, mask_zero=True),
    _compressed("hash_embedding", compression=2, bits=8, out_of_range="clip"),
    _compressed("tensor_train", compression=2, combiner="sum"),
    LayerRow(
        name="HALOSOutput",
        make=lambda **k: layers.HALOSOutput(30, 4, bias_initializer="normal", **k),
        input_shape=(None, 8),
    ),
    LayerRow(
        name="HALOSOutput-cells-int8",
        make=lambda **k: layers.HALOSOutput(30, 4, bits=8, **k),
        input_shape=(None, 8),
        prepare=lambda layer: layer.set_index(
            Index.random(RouterPlan(units=30, dim=8, capacity=5, head=3, widths=(2, 3), beams=(2, 2)))
        ),
    ),
    LayerRow(
        name="HALOSOutput-hash",
        make=lambda **k: layers.HALOSOutput(30, 4, use_bias=False, **k),
        input_shape=(None, 8),
        prepare=lambda layer: layer.set_index(Index.random(HashPlan(units=30, dim=8, capacity=6, tables=3, bits=2))),
    ),
    LayerRow(
        name="MacroblockSaliencyHead-fine",
        make=lambda **k: layers.MacroblockSaliencyHead(8, 8, **k),
        input_shape=(None, None, None, 6),
    ),
    LayerRow(
        name="MacroblockSaliencyHead-coarse",
        make=lambda **k: layers.MacroblockSaliencyHead(32, 8, frame_size=(40, 100), **k),
        input_shape=(None, 2, 4, 6),
    ),
    _bayesian("flipout", keras.layers.Dense, (None, 6), 5, estimator="flipout", bias_posterior=_POSTERIOR),
    _bayesian("reparameterization", keras.layers.Dense, (None, 4, 6), 5, activation="relu"),
    _bayesian("local", keras.layers.Conv1D, (None, None, 4), 5, 3, padding="causal", estimator=_LOCAL),
    _bayesian("flipout", keras.layers.Conv2D, (None, None, None, 4), 6, 3, groups=2, strides=2, estimator="flipout"),
    _bayesian("local", keras.layers.Conv2DTranspose, (None, None, None, 4), 6, 3, estimator=_LOCAL),
    LayerRow(
        name="MCDropout",
        make=lambda **k: layers.MCDropout(0.4, seed=3, **k),
        input_shape=(None, None, 6),
        stock=keras.layers.Dropout,
        approximates=_DRAWS,
    ),
    LayerRow(
        name="RandomFeatureGaussianProcess",
        make=lambda **k: layers.RandomFeatureGaussianProcess(5, 32, seed=3, **k),
        input_shape=(None, 6),
        prepare=lambda layer: layer(np.random.default_rng(0).normal(size=(40, 6)), training=True),
    ),
    LayerRow(
        name="BatchEnsembleDense",
        make=lambda **k: layers.BatchEnsembleDense(5, members=2, activation="relu", bias_initializer="normal", **k),
        input_shape=(None, 6),
        stock=keras.layers.Dense,
        extra=_FACTORS,
        changed=_NOT_OF_DENSE,
    ),
    LayerRow(
        name="BatchEnsembleConv2D-rank-1",
        make=lambda **k: layers.BatchEnsembleConv2D(
            4, 3, groups=2, members=3, posterior=_POSTERIOR, num_data=100, seed=3, **k
        ),
        input_shape=(None, None, None, 4),
        stock=keras.layers.Conv2D,
        extra=_FACTORS,
        approximates=_DRAWS,
    ),
)
