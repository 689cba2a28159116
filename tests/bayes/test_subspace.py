"""Inference in principal directions, against singular values, exact Gaussians and a posterior on a grid."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from keras_efficient.bayes import Data, TrainingFailed
from keras_efficient.bayes.inference import SubspaceSlice, SubspaceVI
from keras_efficient.bayes.inference._likelihood import Vectors
from keras_efficient.bayes.inference.subspace import elliptical_slice, mean_field, principal
from keras_efficient.errors import WrongArgument

RNG = np.random.default_rng(0)
QUICK = {"epochs": 3, "batch_size": 20, "averaging_epochs": 6, "averaging_rate": 0.5, "rank": 2}


def line():
    """One input, two classes, no bias: two weights, of which the difference counts."""
    inputs = keras.Input((1,))
    return keras.Model(inputs, layers.Dense(2, use_bias=False)(inputs))


def normalised():
    inputs = keras.Input((1,))
    x = layers.BatchNormalization(name="norm")(layers.Dense(3, name="first")(inputs))
    return keras.Model(inputs, layers.Dense(2)(layers.ReLU()(x)))


@pytest.fixture(scope="module")
def data():
    random = np.random.default_rng(1)
    x = random.normal(size=(60, 1))
    return Data(x, (random.uniform(size=60) < 1 / (1 + np.exp(-1.5 * x[:, 0]))).astype(int))


def moments_on_a_grid(data, mean, basis, temperature, prior_sd):
    """Mean and standard deviation of z, the latter also as the precision's diagonal says."""
    axis = np.linspace(-6, 6, 301) * prior_sd
    places = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    weights = mean + places @ basis.T
    signs = np.where(data.y == 1, 1.0, -1.0) * data.x[:, 0]
    likelihood = -np.logaddexp(0, -np.outer(weights[:, 1] - weights[:, 0], signs)).sum(axis=1)
    height = likelihood / temperature - 0.5 * np.square(places / prior_sd).sum(axis=1)
    density = np.exp(height - height.max())
    density /= density.sum()
    middle = density @ places
    covariance = (density[:, None] * (places - middle)).T @ (places - middle)
    return middle, np.sqrt(np.diag(covariance)), 1 / np.sqrt(np.diag(np.linalg.inv(covariance)))


def inner(method, data):
    """Exact moments in the subspace of a method's path, and places of its draws."""
    path = np.stack([Vectors(some.model).of(some)[0] for some in method.path(line, data, 2)])
    mean, basis = principal(path, 2)
    posterior = method.fit(line, data, 2)
    drawn = Vectors(posterior.model).of(posterior.members)
    assert len(drawn) == method.draws
    exact = moments_on_a_grid(data, mean, basis, method.temperature, method.subspace_sd)
    return exact, (drawn - mean) @ np.linalg.pinv(basis).T


def test_principal_directions_are_those_of_the_singular_values():
    vectors = RNG.normal(size=(9, 5)) @ RNG.normal(size=(5, 5))
    mean, basis = principal(vectors, 3)
    values, axes = np.linalg.eigh(np.cov(vectors.T))
    assert mean == pytest.approx(vectors.mean(axis=0))
    assert np.linalg.norm(basis, axis=0) == pytest.approx(np.sqrt(values[:-4:-1]))
    cosines = (basis / np.linalg.norm(basis, axis=0)).T @ axes[:, :-4:-1]
    assert np.abs(cosines) == pytest.approx(np.eye(3), abs=1e-8)
    _, full = principal(vectors, 5)
    assert full @ full.T == pytest.approx(np.cov(vectors.T))


@pytest.mark.parametrize("rank", [0, 4, 5])
def test_directions_that_vectors_do_not_have(rank):
    with pytest.raises(WrongArgument, match="1 to 3"):
        principal(RNG.normal(size=(4, 6)), rank)


def test_slices_of_a_constant_likelihood_are_the_prior():
    from scipy import stats

    chain = elliptical_slice(lambda place: 7.0, np.zeros(2), 3.0, RNG)
    drawn = np.stack([next(chain) for _ in range(20_000)][::10])  # far enough apart to be independent
    for column in drawn.T:
        assert stats.kstest(column, stats.norm(scale=3.0).cdf).pvalue > 0.01


def test_slices_of_a_gaussian_likelihood():
    """Mean and width within 5 % of the posterior of four examples of one weight and of one of another."""
    at, precision = np.array([1.0, -2.0]), np.array([4.0, 1.0])
    chain = elliptical_slice(lambda z: -0.5 * float(precision @ np.square(z - at)), np.zeros(2), 2.0, RNG)
    drawn = np.stack([next(chain) for _ in range(30_000)][100:])
    wanted = 1 / np.sqrt(precision + 0.25)
    assert np.abs(drawn.mean(axis=0) - precision * at * wanted**2) / wanted == pytest.approx(0, abs=0.05)
    assert drawn.std(axis=0) == pytest.approx(wanted, rel=0.05)


def test_the_likelihood_of_where_a_chain_stands_is_kept():
    calls = []

    def log_likelihood(place):
        calls.append(place)
        return 0.0

    chain = elliptical_slice(log_likelihood, np.zeros(1), 1.0, RNG)
    for _ in range(10):
        next(chain)
    assert len(calls) == 11  # the start, and the first point of each draw, which a constant likelihood takes


def test_a_likelihood_that_is_not_a_number():
    with pytest.raises(TrainingFailed, match="begins"):
        next(elliptical_slice(lambda place: -np.inf, np.zeros(1), 1.0, RNG))
    with pytest.raises(TrainingFailed, match="not a number"):
        next(elliptical_slice(lambda place: 0.0 if (place == 0).all() else np.nan, np.zeros(1), 1.0, RNG))
    with pytest.raises(TrainingFailed, match="step 0"):
        mean_field(lambda place: np.full(1, np.nan), 1, 1.0, RNG, steps=5)
    with pytest.raises(WrongArgument, match="step"):
        mean_field(lambda place: -place, 1, 1.0, RNG, steps=0)


@pytest.mark.parametrize("prior_sd", [0.5, 3.0])
def test_the_nearest_independent_gaussian(prior_sd):
    """Of a Gaussian it has the mean, and the diagonal of the precision."""
    precision = np.array([[9.0, 5.0], [5.0, 6.0]])
    at = np.array([0.8, -0.5])
    whole = precision + np.eye(2) / prior_sd**2
    mean, width = mean_field(lambda z: precision @ (at - z), 2, prior_sd, RNG, steps=6000)
    wanted = 1 / np.sqrt(np.diag(whole))
    assert np.abs(mean - np.linalg.solve(whole, precision @ at)) / wanted == pytest.approx(0, abs=0.05)
    assert width == pytest.approx(wanted, rel=0.05)


@pytest.mark.contract
def test_slices_of_a_network_have_the_moments_of_the_grid(data):
    method = SubspaceSlice(**QUICK, draws=800, temperature=2.0, subspace_sd=10.0)
    (mean, sd, _), drawn = inner(method, data)
    assert np.abs(drawn.mean(axis=0) - mean) / sd == pytest.approx(0, abs=0.15)
    assert drawn.std(axis=0) == pytest.approx(sd, rel=0.12)


@pytest.mark.contract
def test_vi_of_a_network_has_the_precision_of_the_grid(data):
    """On batches of a third of the data, whose likelihood counts three times."""
    method = SubspaceVI(**QUICK, draws=4000, steps=1500, temperature=2.0, subspace_sd=10.0)
    (mean, sd, narrow), drawn = inner(method, data)
    assert np.abs(drawn.mean(axis=0) - mean) / sd == pytest.approx(0, abs=0.15)
    assert drawn.std(axis=0) == pytest.approx(narrow, rel=0.12)


@pytest.mark.parametrize("method", [SubspaceSlice(**QUICK, draws=5), SubspaceVI(**QUICK, draws=5, steps=20)])
def test_a_seed_is_a_run(data, method):
    first, again, other = (method.fit(line, data, seed).predict(data.x) for seed in (1, 1, 2))
    assert first == pytest.approx(again, abs=1e-3)
    assert not np.allclose(first, other, atol=1e-2)


@pytest.mark.parametrize("method", [SubspaceSlice(**QUICK, draws=3), SubspaceVI(**QUICK, draws=3, steps=20)])
def test_batch_normalisation_has_the_statistics_of_each_draw(data, method):
    posterior = method.fit(normalised, data, 0)
    arrays, model = posterior.arrays(), posterior.model
    values = dict(zip([one.path for one in model.trainable_variables], arrays["trainable"], strict=True))
    others = dict(zip([one.path for one in model.non_trainable_variables], arrays["non_trainable"], strict=True))
    for index in range(3):
        first = data.x @ values["first/kernel"][index] + values["first/bias"][index]
        assert others["norm/moving_mean"][index] == pytest.approx(first.mean(axis=0), abs=1e-4)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (SubspaceSlice(rank=20, averaging_epochs=20), "20 epochs have no 20"),
        (SubspaceVI(rank=0), "no 0 principal"),
        (SubspaceSlice(subspace_sd=0.0), "subspace_sd=0.0"),
        (SubspaceVI(temperature=0.0), "temperature=0.0"),
        (SubspaceSlice(draws=0), "draws=0"),
        (SubspaceSlice(burn_in=-1), "burn-in"),
        (SubspaceVI(steps=0), "step"),
    ],
)
def test_numbers_out_of_range_are_said_before_the_training(data, method, message):
    def never():
        raise AssertionError("A network was made.")

    with pytest.raises(WrongArgument, match=message):
        method.fit(never, data, 0)
