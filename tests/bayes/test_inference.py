"""Each method learns scikit-learn's digits, and comes out the same from the same seed."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from keras_efficient.bayes import Data, inference, load_posterior
from keras_efficient.bayes.inference import (
    CSGHMC,
    CSGLD,
    HMC,
    MAP,
    NUTS,
    SWA,
    SWAG,
    DeepEnsemble,
    DiagonalLaplace,
    KroneckerLaplace,
    LastLayerLaplace,
    MCDropout,
    MeanFieldVI,
    SGHMCSampler,
    SGLDSampler,
    SnapshotEnsemble,
    SubspaceSlice,
    SubspaceVI,
    TemperatureScaling,
)
from keras_efficient.errors import WrongArgument

SHORT = {"epochs": 10, "batch_size": 32}
PATH = {"epochs": 8, "batch_size": 32, "averaging_epochs": 6}
METHODS = {
    "map": (MAP(epochs=12, batch_size=32), 1),
    "ensemble": (DeepEnsemble(epochs=12, batch_size=32, members=3), 3),
    "csghmc": (CSGHMC(cycles=2, epochs_per_cycle=8, samples_per_cycle=2, temperature=0.1, chains=2), 8),
    "csgld": (CSGLD(cycles=2, epochs_per_cycle=12, samples_per_cycle=2, temperature=0.1), 4),
    "snapshots": (SnapshotEnsemble(members=2, epochs_per_cycle=8, batch_size=32), 2),
    "sghmc": (SGHMCSampler(burn_in=10, samples=2, temperature=0.1, chains=2, batch_size=32), 4),
    "sgld": (SGLDSampler(burn_in=10, samples=3, temperature=0.1, batch_size=32), 3),
    "hmc": (HMC(chains=2, draws=10, burn_in=40, leapfrog_steps=20, probes=5), 20),
    "nuts": (NUTS(chains=2, draws=5, burn_in=30, max_tree_depth=4, probes=5), 10),
    "swa": (SWA(**PATH), 1),
    "swag": (SWAG(**PATH, draws=3), 3),
    "slices": (SubspaceSlice(**PATH, rank=3, draws=3, burn_in=5), 3),
    "subspace vi": (SubspaceVI(**PATH, rank=3, draws=3, steps=100), 3),
    "last layer": (LastLayerLaplace(**SHORT, draws=3), 3),
    "diagonal": (DiagonalLaplace(**SHORT, draws=3), 3),
    "kronecker": (KroneckerLaplace(**SHORT, draws=3), 3),
    "temperature": (TemperatureScaling(MAP(**SHORT)), 1),
}


def network():
    inputs = keras.Input((64,))
    return keras.Model(inputs, layers.Dense(10)(layers.Dense(32, activation="relu")(inputs)))


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order] - 8) / 8, y[order]
    return Data(x[:1300], y[:1300], 10), x[1300:], y[1300:]


@pytest.mark.contract
@pytest.mark.parametrize("name", METHODS)
def test_digits(digits, name):
    method, draws = METHODS[name]
    data, x, y = digits
    posterior = method.fit(network, data, seed=0)
    found = posterior.predict(x)
    assert found.shape == (draws, len(x), 10)
    assert (found.mean(axis=0).argmax(axis=1) != y).mean() < 0.06
    # Hamiltonian chains may stay where they are.
    assert len(np.unique(found[:, :20].round(3), axis=0)) > (draws - 1 if draws < 10 else draws // 2)


@pytest.mark.parametrize("method", [*inference.METHODS.values()], ids=[*inference.METHODS])
def test_first_arguments_that_are_wrong(digits, method):
    data, x, y = digits
    wanted = method(MAP()) if method in (TemperatureScaling, inference.Distillation) else method()
    with pytest.raises(WrongArgument, match="a function that builds a model, not Functional"):
        wanted.fit(network(), data, 0)
    with pytest.raises(WrongArgument, match=r"`bayes\.Data`, not tuple"):
        wanted.fit(network, (x, y), 0)
    for seed in (-1, 0.5, None):
        with pytest.raises(WrongArgument, match="A seed is an integer from 0 on"):
            wanted.fit(network, data, seed)


def test_every_method_is_in_a_table():
    known = {type(method).__name__ for method in (*(one for one, _ in METHODS.values()), *STOCHASTIC.values())}
    assert known | {"Distillation"} == set(inference.METHODS)  # that has tests of its own


@pytest.mark.parametrize("name", ["map", "csghmc"])
def test_a_seed_is_a_run(digits, name):
    method, _ = METHODS[name]
    data, x, _ = digits
    first, again, other = (method.fit(network, data, seed=seed).predict(x[:50]) for seed in (1, 1, 2))
    assert first == pytest.approx(again, abs=1e-3)
    assert not np.allclose(first, other, atol=1e-2)


def test_orders_hang_on_the_seed_too(digits):
    def alike():
        inputs = keras.Input((64,))
        return keras.Model(inputs, layers.Dense(10, kernel_initializer="zeros")(inputs))

    data, x, _ = digits
    first, other = (MAP(epochs=1, batch_size=32).fit(alike, data, seed=seed).predict(x[:50]) for seed in (1, 2))
    assert not np.allclose(first, other, atol=1e-3)


def test_more_samples_than_epochs(digits):
    with pytest.raises(WrongArgument, match="no 5 samples"):
        CSGHMC(epochs_per_cycle=4, samples_per_cycle=5).fit(network, digits[0], seed=0)


STOCHASTIC = {
    "dropout": MCDropout(epochs=12, batch_size=32, draws=6),
    "mean-field": MeanFieldVI(learning_rate=0.01, epochs=30, batch_size=32, draws=6),
    "mean-field-local": MeanFieldVI(
        learning_rate=0.01, epochs=30, batch_size=32, draws=6, estimator="local_reparameterization"
    ),
}


@pytest.mark.contract
@pytest.mark.parametrize("name", STOCHASTIC)
def test_networks_that_draw(digits, name, tmp_path):
    data, x, y = digits
    posterior = STOCHASTIC[name].fit(network, data, seed=0)
    found = posterior.predict(x)
    assert found.shape == (6, len(x), 10)
    assert (found.mean(axis=0).argmax(axis=1) != y).mean() < 0.06
    assert all(not np.allclose(found[0], other, atol=1e-3) for other in found[1:])
    # Draws are of the seed, not of the call.
    assert posterior.predict(x) == pytest.approx(found, abs=1e-6)
    posterior.save(tmp_path / "posterior.zip")
    assert load_posterior(tmp_path / "posterior.zip").predict(x) == pytest.approx(found, abs=1e-5)


def test_dropout_of_the_model_and_of_the_method(digits):
    with pytest.raises(WrongArgument, match="no dropout"):
        MCDropout(rate=None, epochs=1).fit(network, digits[0], seed=0)

    def twin():
        inputs = keras.Input((64,))
        x = layers.Dropout(0.1)(layers.BatchNormalization()(layers.Dense(32, activation="relu")(inputs)))
        return keras.Model(inputs, layers.Dense(10)(x))

    posterior = MCDropout(rate=None, epochs=1, draws=2).fit(twin, digits[0], seed=0)
    assert [layer.rate for layer in posterior.model.layers if hasattr(layer, "rate")] == [0.1]
    # Batch normalisation does not see who else is in the batch.
    first = posterior.predict(digits[1][:8])
    other = np.concatenate([digits[1][:4], 5 * digits[1][4:8]])
    assert posterior.predict(other)[:, :4] == pytest.approx(first[:, :4], abs=1e-6)
