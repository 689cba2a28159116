"""Means of weights and the Gaussian around them, against NumPy on lists that are given."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_efficient.bayes import Data
from keras_efficient.bayes.inference import SWA, SWAG
from keras_efficient.bayes.inference._likelihood import Vectors
from keras_efficient.bayes.inference.averaging import Moments
from keras_efficient.errors import WrongArgument

RNG = np.random.default_rng(0)
QUICK = {"epochs": 3, "batch_size": 20, "averaging_epochs": 6}


def network():
    inputs = keras.Input((4,))
    return keras.Model(inputs, layers.Dense(3)(layers.Dense(5, activation="relu")(inputs)))


def normalised():
    inputs = keras.Input((4,))
    x = layers.BatchNormalization(name="norm")(layers.Dense(5, name="first")(inputs))
    return keras.Model(inputs, layers.Dense(3)(layers.ReLU()(x)))


@pytest.fixture(scope="module")
def data():
    x = np.random.default_rng(1).normal(size=(60, 4))
    return Data(x, (x[:, 0] > 0).astype(int) + (x[:, 1] > 0))


@pytest.fixture
def vectors():
    return RNG.normal(size=(7, 4)) * [1, 2, 0.1, 5] + [0, 1, 100, -3]


def collected(vectors, rank=0):
    moments = Moments(rank)
    for vector in vectors:
        moments.add(vector)
    return moments


def path(method, model_fn, data, seed):
    """Weights at the ends of the epochs that are collected, (epochs, size)."""
    return np.stack([Vectors(some.model).of(some)[0] for some in method.path(model_fn, data, seed)])


def weights(posterior):
    return Vectors(posterior.model).of(posterior.members)


def test_moments_of_seven_vectors(vectors):
    moments = collected(vectors, rank=3)
    assert moments.mean == pytest.approx(vectors.mean(axis=0))
    assert moments.variance == pytest.approx(vectors.var(axis=0))
    wanted = [vectors[k] - vectors[: k + 1].mean(axis=0) for k in (4, 5, 6)]
    assert moments.deviations == pytest.approx(np.transpose(wanted))


def test_moments_of_equal_vectors(vectors):
    moments = collected(np.repeat(vectors[:1], 5, axis=0), rank=3)
    assert moments.mean == pytest.approx(vectors[0])
    assert (moments.variance == 0).all()
    assert moments.draw(RNG, 4) == pytest.approx(np.repeat(vectors[:1], 4, axis=0), rel=1e-6)


def test_variances_that_are_small_against_the_mean():
    """1,000 and a deviation of 1e-4: the difference of squares in single precision is nothing but rounding."""
    vectors = 1000 + 1e-4 * RNG.normal(size=(50, 3))
    assert collected(vectors).variance == pytest.approx(vectors.var(axis=0), rel=1e-3)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_covariance_of_draws(vectors, scale):
    moments = collected(vectors, rank=3)
    drawn = moments.draw(RNG, 20_000, scale).astype(float)
    low_rank = moments.deviations @ moments.deviations.T / (2 * (3 - 1))
    wanted = scale**2 * (0.5 * np.diag(vectors.var(axis=0)) + low_rank)
    sds = np.sqrt(np.diag(wanted))
    assert np.abs(drawn.mean(axis=0) - vectors.mean(axis=0)).max() < 0.05 * sds.max()
    assert np.abs(np.cov(drawn.T) - wanted) / np.outer(sds, sds) == pytest.approx(0, abs=0.05)


def test_a_rank_that_gives_no_covariance(vectors):
    with pytest.raises(WrongArgument, match="needs 2 vectors"):
        collected(vectors, rank=1).draw(RNG, 1)
    with pytest.raises(WrongArgument, match="0 or more"):
        Moments(-1)


@pytest.mark.contract
def test_release_defect_8_the_mean_of_weights_is_not_shrunk(data):
    """The release counted one vector too many, so that its mean was k / (k + 1) of the true one."""
    method = SWA(**QUICK)
    found = path(method, network, data, 5)
    assert len(found) == 6
    posterior = method.fit(network, data, 5)
    assert posterior.count == 1
    assert weights(posterior)[0] == pytest.approx(found.mean(axis=0), abs=1e-5)


@pytest.mark.contract
def test_release_defect_9_draws_differ_and_are_around_the_mean(data):
    """The release overwrote each draw by its mean, which was the last vector."""
    method = SWAG(**QUICK, rank=4, draws=2000)
    found = path(method, network, data, 5)
    drawn = weights(method.fit(network, data, 5)).astype(float)
    moments = collected(found, rank=4)
    variance = 0.5 * (moments.variance + np.square(moments.deviations).sum(axis=1) / (4 - 1))
    moved = variance > 1e-12
    assert moved.sum() > 20
    assert drawn.std(axis=0)[moved] == pytest.approx(np.sqrt(variance[moved]), rel=0.1)
    off = (drawn.mean(axis=0) - found.mean(axis=0))[moved] / np.sqrt(variance[moved])
    assert np.abs(off).max() < 5 / np.sqrt(2000)


def test_the_path_goes_on_from_the_maximum(data):
    """At a rate of next to nothing the path stays there."""
    method = SWA(**QUICK, averaging_rate=1e-9)
    top = weights(super(SWA, method).fit(network, data, 3))
    assert weights(method.fit(network, data, 3)) == pytest.approx(top, abs=1e-5)


@pytest.mark.parametrize("kind", [SWA, SWAG])
def test_a_seed_is_a_run(data, kind):
    method = kind(**QUICK)
    first, again, other = (weights(method.fit(network, data, seed)) for seed in (1, 1, 2))
    assert first == pytest.approx(again, abs=1e-5)
    assert not np.allclose(first, other, atol=1e-2)


@pytest.mark.contract
def test_batch_normalisation_has_the_statistics_of_each_draw(data):
    posterior = SWAG(**QUICK, draws=3, scale=3.0).fit(normalised, data, 0)
    arrays, model = posterior.arrays(), posterior.model
    places = {one.path: place for place, one in enumerate(model.trainable_variables)}
    others = {one.path: place for place, one in enumerate(model.non_trainable_variables)}
    for index in range(3):
        kernel, bias = (arrays["trainable"][places[f"first/{name}"]][index] for name in ("kernel", "bias"))
        inner = data.x @ kernel + bias
        mean, variance = (
            arrays["non_trainable"][others[f"norm/moving_{name}"]][index] for name in ("mean", "variance")
        )
        assert mean == pytest.approx(inner.mean(axis=0), abs=1e-4)
        assert variance == pytest.approx(inner.var(axis=0), rel=1e-3)
    assert np.ptp(arrays["non_trainable"][others["norm/moving_mean"]], axis=0).min() > 1e-4


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (SWAG(rank=1), "rank=1"),
        (SWAG(averaging_epochs=1), "averaging_epochs=1"),
        (SWAG(draws=0), "draws=0"),
        (SWA(epochs=0), "epochs=0"),
        (SWA(learning_rate=-0.1), "learning_rate=-0.1"),
        (SWA(**{**QUICK, "averaging_epochs": 0}), "not 0"),
        (SWA(prior_sd=0.0), "prior_sd=0.0"),
    ],
)
def test_numbers_out_of_range(data, method, message):
    with pytest.raises(WrongArgument, match=message):
        method.fit(network, data, 0)


def test_vectors_are_split_as_they_were_joined():
    model = network()
    vectors = Vectors(model)
    joined = np.concatenate([np.ravel(ops.convert_to_numpy(one)) for one in model.trainable_variables])
    assert vectors.size == len(joined) == 4 * 5 + 5 + 5 * 3 + 3
    for part, variable in zip(vectors.split(joined), model.trainable_variables, strict=True):
        assert ops.convert_to_numpy(part) == pytest.approx(ops.convert_to_numpy(variable))
    members = vectors.members(model, np.stack([joined, 2 * joined]), [])
    assert vectors.of(members) == pytest.approx(np.stack([joined, 2 * joined]))
