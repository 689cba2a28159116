"""Chains on Gaussians and on a network whose posterior a grid gives, and what they say of their convergence."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_efficient.bayes import Data, TrainingFailed
from keras_efficient.bayes.compiled import compiled
from keras_efficient.bayes.inference import HMC, NUTS
from keras_efficient.bayes.inference._likelihood import Likelihood, derived
from keras_efficient.bayes.inference.hamiltonian import convergence
from keras_efficient.errors import UnsupportedLayer, WrongArgument

RNG = np.random.default_rng(0)
MEAN, COVARIANCE = np.array([1.0, -2.0]), np.array([[1.0, 0.9], [0.9, 1.0]])


def line():
    """One input, two classes, no bias: two weights, of which the difference counts."""
    inputs = keras.Input((1,))
    return keras.Model(inputs, layers.Dense(2, use_bias=False)(inputs))


def normalised():
    inputs = keras.Input((1,))
    return keras.Model(inputs, layers.Dense(2)(layers.BatchNormalization(name="norm")(inputs)))


@pytest.fixture(scope="module")
def data():
    random = np.random.default_rng(1)
    x = random.normal(size=(40, 1))
    return Data(x, (random.uniform(size=40) < 1 / (1 + np.exp(-1.5 * x[:, 0]))).astype(int))


def log_density(states):
    away = states - MEAN.astype("float32")
    return -0.5 * ops.sum(away * ops.matmul(away, np.linalg.inv(COVARIANCE).astype("float32")), axis=1)


@pytest.mark.contract
@pytest.mark.parametrize("method", [HMC(draws=500, burn_in=200, leapfrog_steps=10), NUTS(draws=500, burn_in=200)])
def test_a_correlated_gaussian(method):
    chains = method.sample(log_density, 3 * RNG.normal(size=(8, 2)), seed=1)
    assert chains.draws.shape == (500, 8, 2)
    assert chains.log_density.shape == (500, 8)
    drawn = chains.draws.reshape(-1, 2).astype(float)
    assert drawn.mean(axis=0) == pytest.approx(MEAN, abs=0.07)
    rhat, ess = convergence(chains.draws.swapaxes(0, 1).reshape(-1, 2), 8)
    assert rhat.max() < 1.01
    assert ess.min() > 400
    # Four standard errors of a variance: other processors round otherwise, and chains go other ways.
    squares = np.square(chains.draws - MEAN).swapaxes(0, 1).reshape(-1, 2)
    error = float(np.sqrt(2 / convergence(squares, 8)[1].min()))
    assert error < 0.1
    assert np.cov(drawn.T) == pytest.approx(COVARIANCE, abs=4 * error)
    said = chains.diagnostics
    rhat, ess = convergence(chains.log_density.T.reshape(-1), 8)
    assert said["rhat_log_density"] == pytest.approx(float(rhat))
    assert said["ess_log_density"] == pytest.approx(float(ess))
    assert rhat < 1.1  # paths of one length hardly change the energy of some orbits
    assert 0.7 < said["acceptance"] < 0.97
    assert 0.05 < said["step_size"] < 1.0  # from 0.01 on
    height = ops.convert_to_numpy(log_density(ops.convert_to_tensor(chains.draws[7])))
    assert chains.log_density[7] == pytest.approx(height, abs=1e-4)


@pytest.mark.contract
@pytest.mark.parametrize("method", [HMC(draws=5, burn_in=5, leapfrog_steps=3), NUTS(draws=5, burn_in=5)])
def test_a_seed_is_a_run(method):
    first, again, other = (method.sample(log_density, np.zeros((2, 2)), seed).draws for seed in (1, 1, 2))
    assert (first == again).all()
    assert not np.allclose(first, other, atol=1e-3)
    assert not np.allclose(first[:, 0], first[:, 1], atol=1e-3)


@pytest.mark.contract
def test_the_posterior_of_a_network_is_that_of_the_grid(data):
    """The likelihood is summed over batches, the last of which is not full."""
    method = HMC(prior_sd=0.7, chains=4, draws=600, burn_in=200, leapfrog_steps=4, step_size=0.1, batch_size=15)
    probes = np.array([[-1.0], [0.5], [2.0]])
    posterior = method.fit(line, data, 3)
    assert posterior.count == 2400
    drawn = posterior.predict(probes)[:, :, 1].astype(float)
    # The difference of two weights has a prior of twice their variance.
    slopes = np.linspace(-5, 8, 2001)
    signs = np.where(data.y == 1, 1.0, -1.0) * data.x[:, 0]
    height = -np.logaddexp(0, -np.outer(slopes, signs)).sum(axis=1) - slopes**2 / (4 * 0.7**2)
    density = np.exp(height - height.max())
    density /= density.sum()
    there = 1 / (1 + np.exp(-np.outer(slopes, probes[:, 0])))
    mean = density @ there
    sd = np.sqrt(density @ np.square(there - mean))
    assert np.abs(drawn.mean(axis=0) - mean) / sd == pytest.approx(0, abs=0.12)
    assert drawn.std(axis=0) == pytest.approx(sd, rel=0.1)
    assert posterior.diagnostics["rhat_predictions"] < 1.05
    assert posterior.diagnostics["ess_predictions"] > 100


@pytest.mark.contract
def test_the_likelihood_in_batches_is_that_of_all_at_once(data):
    weights = [ops.convert_to_tensor(np.float32([[0.3, -0.8]]))]
    found = []
    for batch_size in (40, 15):
        likelihood = Likelihood(line(), [], data, batch_size)
        run = compiled(derived(lambda some, likelihood=likelihood: (likelihood(some), ())))
        (value, _), gradient = run(weights)
        found.append((float(value), ops.convert_to_numpy(gradient[0])))
    signs = np.where(data.y == 1, 1.0, -1.0) * data.x[:, 0]
    assert found[0][0] == pytest.approx(-np.logaddexp(0, 1.1 * signs).sum(), rel=1e-5)
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4)


def test_batches_pass_over_the_data_in_orders_of_their_own(data):
    some = Likelihood(line(), [], data, 10).batches(RNG)
    first, second = ([next(some) for _ in range(4)] for _ in range(2))
    for one in (first, second):
        assert np.sort(np.concatenate([x for x, _ in one]).ravel()) == pytest.approx(np.sort(data.x.ravel()))
    assert not np.array_equal(first[0][0], second[0][0])


def test_convergence_against_the_textbook():
    """Split R-hat of two chains, written out (Gelman et al., section 11.4)."""
    values = RNG.normal(size=(2, 100, 3))
    values[0] += [0.0, 0.5, 3.0]
    rhat, ess = convergence(values.reshape(200, 3), 2)
    halves = values.reshape(4, 50, 3)
    within = halves.var(axis=1, ddof=1).mean(axis=0)
    between = halves.mean(axis=1).var(axis=0, ddof=1)
    wanted = (between + (1 - 1 / 50) * within) / within
    assert rhat**2 == pytest.approx(wanted)
    assert rhat[2] > 1.5
    assert ess[2] < 10 < ess[0]


def test_convergence_of_what_never_changes_and_of_one_chain():
    values = np.stack([np.full(40, 0.3), RNG.normal(size=40)], axis=1)
    for chains in (1, 2):
        rhat, ess = convergence(values, chains)
        assert rhat.shape == ess.shape == (2,)
        assert rhat[0] == 1
        assert np.isnan(ess[0])
        assert ess[1] > 5
    stuck = convergence(np.repeat([[0.1], [0.2]], 20, axis=0), 2)[0]
    assert (stuck > 1e6).all()


def test_effective_draws_of_a_process_whose_correlation_is_known():
    """An autoregression with 0.8 is worth (1 − 0.8) / (1 + 0.8) of its draws."""
    values = np.zeros((4, 5000))
    for step in range(1, 5000):
        values[:, step] = 0.8 * values[:, step - 1] + RNG.normal(size=4)
    _, ess = convergence(values.reshape(-1), 4)
    assert float(ess) == pytest.approx(20_000 / 9, rel=0.2)


@pytest.mark.parametrize("kind", [HMC, NUTS])
def test_batch_normalisation_has_no_density(data, kind):
    with pytest.raises(UnsupportedLayer, match=rf"'norm'.*{kind.__name__}"):
        kind().fit(normalised, data, 0)


def test_a_density_that_is_not_finite():
    with pytest.raises(TrainingFailed, match="chain 0 is nan at draw 0"):
        HMC(draws=4, burn_in=2, leapfrog_steps=2).sample(
            lambda states: ops.sum(states, axis=1) * np.float32("nan"), np.zeros((2, 2)), 0
        )


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (HMC(prior_sd=0.0), "prior_sd=0.0"),
        (HMC(probes=0), "probes=0"),
        (HMC(batch_size=0), "batch_size=0"),
        (HMC(draws=3), "draws=3"),
        (HMC(burn_in=0), "burn_in=0"),
        (HMC(chains=0), "not 0"),
        (HMC(step_size=0.0), "step_size=0.0"),
        (HMC(acceptance=1.0), "acceptance=1.0"),
        (HMC(leapfrog_steps=0), "leapfrog_steps=0"),
        (NUTS(max_tree_depth=0), "max_tree_depth=0"),
    ],
)
def test_numbers_out_of_range(data, method, message):
    with pytest.raises(WrongArgument, match=message):
        method.fit(line, data, 0)
