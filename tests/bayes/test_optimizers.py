"""Samplers against posteriors that are known exactly."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

from keras_efficient.bayes import SGHMC, SGLD, CyclicCosine, CyclicTemperature
from keras_efficient.errors import WrongArgument

N, CHAINS = 500, 256
RNG = np.random.default_rng(0)
pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def regression():
    """Inputs and answers of a linear model with unit noise: the posterior is a Gaussian."""
    random = np.random.default_rng(1)
    mix = np.array([[1.0, 0.4, 0.0], [0.0, 0.8, 0.3], [0.0, 0.0, 1.2]])
    x = random.normal(size=(N, 3)) @ mix
    return x.astype("float32"), (x @ [0.5, -1.0, 0.2] + random.normal(size=N)).astype("float32")


def exact(x, y, *, prior_sd, temperature):
    precision = x.T @ x + (0 if prior_sd is None else np.eye(3) / prior_sd**2)
    covariance = np.linalg.inv(precision)
    return covariance @ (x.T @ y), np.sqrt(np.diag(covariance) * temperature)


def drawn(optimizer, x, y, *, burn_in, steps):
    """Mean and standard deviation over chains and steps, from the full batch."""
    moments = x.T @ x / N, x.T @ y / N
    weights = keras.Variable(np.zeros((CHAINS, 3), "float32"))
    total, squares = (keras.Variable(np.zeros(3, "float32")) for _ in range(2))
    optimizer.build([weights])

    def step(number):
        optimizer.apply([ops.matmul(weights, moments[0]) - moments[1]], [weights])
        counts = ops.cast(number >= burn_in, "float32")
        total.assign_add(counts * ops.mean(weights, 0))
        squares.assign_add(counts * ops.mean(ops.square(weights), 0))

    compiled(step, burn_in + steps, [weights, total, squares, *optimizer.variables])
    mean = ops.convert_to_numpy(total) / steps
    return mean, np.sqrt(ops.convert_to_numpy(squares) / steps - mean**2)


def compiled(step, count, variables):
    """Calls a step that assigns to variables, in one loop of the backend's own."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        @tf.function
        def loop():
            for number in tf.range(count):
                step(number)

        loop()
        return
    import jax

    def body(number, values):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))) as scope:
            step(number)
        return [scope.get_current_value(variable) for variable in variables]

    found = jax.jit(lambda values: jax.lax.fori_loop(0, count, body, values))([one.value for one in variables])
    for variable, value in zip(variables, found, strict=True):
        variable.assign(value)


@pytest.mark.contract
@pytest.mark.parametrize(("prior_sd", "temperature"), [(None, 1.0), (0.05, 1.0), (None, 2.0)])
@pytest.mark.parametrize("kind", [SGHMC, SGLD])
def test_a_gaussian_posterior(regression, kind, prior_sd, temperature):
    """Full batch; 0.02 is small against the curvature, which is about one."""
    optimizer = kind(0.02, N, prior_sd=prior_sd, temperature=temperature, seed=3)
    mean, sd = drawn(optimizer, *regression, burn_in=1500, steps=1500)
    wanted_mean, wanted_sd = exact(*regression, prior_sd=prior_sd, temperature=temperature)
    assert np.abs(mean - wanted_mean).max() < 0.05 * wanted_sd.max()
    assert sd == pytest.approx(wanted_sd, rel=0.05)


@pytest.mark.contract
@pytest.mark.parametrize(("kind", "alpha"), [(SGHMC, 0.1), (SGLD, 1.0)])
def test_the_noise_of_one_step(kind, alpha):
    weights = keras.Variable(np.zeros((200, 500), "float32"))
    optimizer = kind(0.3, 400, temperature=0.5, seed=1)
    optimizer.apply([ops.zeros((200, 500))], [weights])
    assert ops.convert_to_numpy(weights).std() == pytest.approx(np.sqrt(2 * alpha * 0.3 * 0.5 / 400), rel=0.02)


@pytest.mark.contract
def test_without_noise_it_is_sgd_with_momentum_and_the_prior_is_weight_decay():
    ours, theirs = (keras.Variable(np.ones(4, "float32")) for _ in range(2))
    sampler = SGHMC(0.1, 50, alpha=0.2, prior_sd=0.5, temperature=0.0)
    plain = keras.optimizers.SGD(0.1, momentum=0.8)
    for number in range(5):
        gradient = ops.full((4,), float(number))
        sampler.apply([gradient], [ours])
        plain.apply([gradient + theirs / (0.25 * 50)], [theirs])
    assert ops.convert_to_numpy(ours) == pytest.approx(ops.convert_to_numpy(theirs), rel=1e-5)


def test_a_variable_without_a_prior():
    kernel, scale = (keras.Variable(np.ones(2, "float32"), name=name) for name in ("kernel", "gamma"))
    optimizer = SGLD(0.1, 10, prior_sd=1.0, temperature=0.0)
    optimizer.exclude_from_prior(var_names=["gamma"])
    optimizer.apply([ops.zeros(2), ops.zeros(2)], [kernel, scale])
    assert ops.convert_to_numpy(kernel) == pytest.approx(0.99)
    assert ops.convert_to_numpy(scale) == pytest.approx(1.0)


def test_the_momentum_begins_anew_with_a_cycle():
    weights = keras.Variable(np.zeros(1, "float32"))
    optimizer = SGHMC(0.1, 10, alpha=0.5, temperature=0.0, restart_every=3)
    moves = []
    for gradient in (1.0, 0.0, 0.0, 0.0, 1.0):
        before = float(weights.value[0])
        optimizer.apply([ops.full((1,), gradient)], [weights])
        moves.append(float(weights.value[0]) - before)
    assert moves == pytest.approx([-0.1, -0.05, -0.025, 0.0, -0.1], abs=1e-6)


def test_cycles_that_do_not_divide_the_steps():
    rate, heat = CyclicCosine(0.4, 7), CyclicTemperature(2.0, 7, 0.5)
    rates = [float(rate(step)) for step in range(16)]
    assert rates[0] == rates[7] == rates[14] == pytest.approx(0.4)
    assert rates[3] == pytest.approx(0.2 * (np.cos(np.pi * 3 / 7) + 1))
    assert min(rates) > 0
    assert [float(heat(step)) for step in range(8)] == [0, 0, 0, 0, 2, 2, 2, 0]


@pytest.mark.contract
def test_it_trains_a_model_and_is_saved_with_it(tmp_path):
    """The noise goes on where it was, not from its seed."""
    random = np.random.default_rng(2)
    x, y = random.normal(size=(64, 5)).astype("float32"), random.integers(3, size=64)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
    heat = CyclicTemperature(0.5, 8, 0.25)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(SGHMC(CyclicCosine(0.05, 8), 64, prior_sd=1.0, temperature=heat, restart_every=8, seed=5), loss)
    model.fit(x, y, batch_size=16, epochs=3, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for one in (model, loaded):
        one.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    for mine, theirs in zip(model.get_weights(), loaded.get_weights(), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_data": 0},
        {"alpha": 0.0},
        {"alpha": 1.5},
        {"prior_sd": 0.0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"restart_every": 0},
        {"weight_decay": 0.1},
    ],
)
def test_numbers_out_of_range(wrong):
    with pytest.raises(WrongArgument):
        SGHMC(0.1, **{"num_data": 5, **wrong})
    with pytest.raises(WrongArgument):
        CyclicCosine(0.1, 0)
    with pytest.raises(WrongArgument):
        CyclicTemperature(0.1, 5, 2.0)
    with pytest.raises(WrongArgument):
        SGLD(0.1, 5, alpha=0.5)


@pytest.mark.contract
@pytest.mark.parametrize(("alpha", "rate"), [(1.0, 1.5), (0.1, 3.0)])
def test_cycles_find_both_modes_and_a_small_step_one(alpha, rate):
    """Two Gaussians six standard deviations apart: 64 chains that begin in one of them, 20 cycles, the end of each."""
    steps, cycles = 200, 20

    def sides(optimizer):
        weights = keras.Variable(np.tile(np.float32([3, 0]), (64, 1)))
        kept = keras.Variable(np.zeros((cycles, 64), "float32"))
        optimizer.build([weights])

        def step(number):
            first = weights[:, :1]
            optimizer.apply([ops.concatenate([first - 3 * ops.tanh(3 * first), weights[:, 1:]], 1)], [weights])
            is_end = ops.cast(ops.arange(1, cycles + 1) * steps == number + 1, "float32")
            kept.assign_add(is_end[:, None] * ops.sign(weights[:, 0]))

        compiled(step, steps * cycles, [weights, kept, *optimizer.variables])
        return ops.convert_to_numpy(kept)

    cyclic = {"temperature": CyclicTemperature(1.0, steps, 0.0), "restart_every": steps}
    found = sides(SGHMC(CyclicCosine(rate, steps), 1, alpha=alpha, seed=4, **cyclic))
    assert (np.abs(found) == 1).all()
    assert (found.min(axis=0) == -1).all()
    assert (found.max(axis=0) == 1).all()
    assert (found > 0).mean() == pytest.approx(0.5, abs=0.1)
    assert (sides(SGHMC(0.001 * alpha, 1, alpha=alpha, seed=4)) > 0).mean() > 0.9
