"""Methods that sample along the gradient: a posterior that a grid gives, which epochs are drawn, others' defects."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_efficient.bayes import SGHMC, Data, Members
from keras_efficient.bayes.inference import CSGHMC, CSGLD, MAP, SGHMCSampler, SGLDSampler, SnapshotEnsemble
from keras_efficient.bayes.inference import cyclic as cyclic_module
from keras_efficient.bayes.inference import sampling as sampling_module
from keras_efficient.errors import WrongArgument

RNG = np.random.default_rng(0)


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
    x = random.normal(size=(40, 1))
    return Data(x, (random.uniform(size=40) < 1 / (1 + np.exp(-1.5 * x[:, 0]))).astype(int))


def slope_moments(data, prior_sd, temperature=1.0):
    """Mean and standard deviation of the difference of the two weights, whose prior has twice their variance."""
    slopes = np.linspace(-6, 10, 4001)
    signs = np.where(data.y == 1, 1.0, -1.0) * data.x[:, 0]
    height = -np.logaddexp(0, -np.outer(slopes, signs)).sum(axis=1) - slopes**2 / (4 * prior_sd**2)
    density = np.exp((height - height.max()) / temperature)
    density /= density.sum()
    mean = density @ slopes
    return mean, np.sqrt(density @ np.square(slopes - mean))


@pytest.mark.contract
@pytest.mark.parametrize(
    "method",
    [
        SGHMCSampler(learning_rate=0.05, sampling_rate=0.05, burn_in=150, samples=150, thinning=4, chains=8),
        SGLDSampler(learning_rate=0.5, sampling_rate=0.2, burn_in=150, samples=150, thinning=4, chains=8),
    ],
)
def test_release_defect_1_draws_of_a_network_are_as_wide_as_its_posterior(data, method):
    """From the full batch; the release's noise was too small by the root of the number of examples, six times here."""
    method = type(method)(**{**method.__dict__, "prior_sd": 0.7, "temperature": 0.5})
    posterior = method.fit(line, data, 1)
    (kernels,) = posterior.arrays()["trainable"]
    slopes = kernels[:, 0, 1] - kernels[:, 0, 0]
    assert len(slopes) == 150 * 8
    mean, sd = slope_moments(data, 0.7, 0.5)
    assert slopes.mean() == pytest.approx(mean, abs=0.2 * sd)
    assert slopes.std() == pytest.approx(sd, rel=0.15)


@pytest.mark.contract
def test_release_defect_2_the_first_step_goes_downhill():
    """The release's momentum began with the gradient itself, uphill and whatever the learning rate."""
    weights = keras.Variable(np.zeros(3, "float32"))
    optimizer = SGHMC(0.01, 10, alpha=0.1, temperature=0.0)
    optimizer.apply([ops.convert_to_tensor(np.float32([1.0, -2.0, 0.5]))], [weights])
    assert ops.convert_to_numpy(weights) == pytest.approx([-0.01, 0.02, -0.005])


def walked_by_number(monkeypatch, module, count):
    """Instead of training: members whose only weights are the number of the epoch; gives what it was asked for."""
    asked = {}

    def numbered(model_fn, data, optimizer, *, members, epochs, batch_size, seed):
        asked.update(optimizer=optimizer, epochs=epochs, members=members)
        model = model_fn()
        for epoch in range(1, epochs + 1):
            yield epoch, Members(model, [np.full((count, 1, 2), epoch, np.float32)])

    monkeypatch.setattr(module, "walked", numbered)
    return asked


def epochs_of(posterior):
    return posterior.arrays()["trainable"][0][:, 0, 0].astype(int).tolist()


def test_the_epochs_of_a_sampler(monkeypatch, data):
    asked = walked_by_number(monkeypatch, sampling_module, 2)
    method = SGHMCSampler(
        learning_rate=0.4, sampling_rate=0.1, burn_in=3, samples=2, thinning=3, chains=2, batch_size=8
    )
    assert epochs_of(method.fit(line, data, 0)) == [6, 6, 9, 9]
    assert asked["epochs"] == 9
    rate = asked["optimizer"].learning_rate
    schedule = asked["optimizer"]._learning_rate
    assert float(schedule(0)) == pytest.approx(0.4)
    # Release defect 4: its rate went on to zero while draws were taken, so that the last ones were alike.
    assert [float(schedule(step)) for step in (15, 30, 45)] == pytest.approx([0.1] * 3)
    assert float(rate) == pytest.approx(0.4)


def test_the_epochs_and_steps_of_cycles(monkeypatch, data):
    """40 examples in batches of 15 are two steps, so a cycle of 3 epochs is one of 6."""
    asked = walked_by_number(monkeypatch, cyclic_module, 1)
    method = CSGHMC(
        learning_rate=0.4,
        temperature=0.3,
        cycles=2,
        epochs_per_cycle=3,
        samples_per_cycle=2,
        noise_from=0.5,
        batch_size=15,
    )
    assert epochs_of(method.fit(line, data, 0)) == [2, 3, 5, 6]
    optimizer = asked["optimizer"]
    assert optimizer.restart_every == 6
    assert [float(optimizer._learning_rate(step)) for step in (0, 3, 6, 9)] == pytest.approx([0.4, 0.2, 0.4, 0.2])
    assert [float(optimizer.temperature(step)) for step in range(7)] == pytest.approx([0, 0, 0, 0.3, 0.3, 0.3, 0])


def test_snapshots_are_the_ends_of_cycles_without_noise(monkeypatch, data):
    asked = walked_by_number(monkeypatch, cyclic_module, 1)
    assert epochs_of(SnapshotEnsemble(members=3, epochs_per_cycle=4).fit(line, data, 0)) == [4, 8, 12]
    assert asked["optimizer"].temperature == 0


@pytest.mark.contract
@pytest.mark.parametrize(
    "method",
    [
        SGLDSampler(burn_in=2, samples=2, thinning=1, batch_size=10),
        CSGHMC(cycles=2, epochs_per_cycle=2, samples_per_cycle=1, batch_size=10),
    ],
)
def test_release_defect_12_batch_normalisation_has_the_statistics_of_each_draw(data, method):
    posterior = method.fit(normalised, data, 0)
    arrays, model = posterior.arrays(), posterior.model
    values = dict(zip([one.path for one in model.trainable_variables], arrays["trainable"], strict=True))
    others = dict(zip([one.path for one in model.non_trainable_variables], arrays["non_trainable"], strict=True))
    assert posterior.count == 2
    for index in range(2):
        first = data.x @ values["first/kernel"][index] + values["first/bias"][index]
        assert others["norm/moving_mean"][index] == pytest.approx(first.mean(axis=0), abs=1e-4)
        assert others["norm/moving_variance"][index] == pytest.approx(first.var(axis=0), rel=1e-3)


@pytest.mark.parametrize("kind", [SGHMCSampler, SGLDSampler])
def test_a_seed_is_a_run(data, kind):
    method = kind(burn_in=2, samples=3, thinning=1, batch_size=10, chains=2)
    first, again, other = (method.fit(line, data, seed).predict(data.x) for seed in (1, 1, 2))
    assert first == pytest.approx(again, abs=1e-4)
    assert not np.allclose(first, other, atol=1e-3)
    assert not np.allclose(first[0], first[1], atol=1e-3)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (SGHMCSampler(burn_in=0), "burn_in=0"),
        (SGHMCSampler(samples=0), "samples=0"),
        (SGHMCSampler(thinning=0), "thinning=0"),
        (SGLDSampler(chains=0), "chains=0"),
        (SGLDSampler(sampling_rate=0.0), "sampling_rate=0.0"),
        (SGLDSampler(learning_rate=-1.0), "learning_rate=-1.0"),
        (SGHMCSampler(temperature=-1.0), "temperature=-1.0"),
        (SGHMCSampler(alpha=0.0), "alpha=0.0"),
        (CSGHMC(cycles=0), "cycles=0"),
        (CSGLD(learning_rate=0.0), "learning_rate=0.0"),
        (CSGHMC(noise_from=1.5), "1.5"),
        (CSGHMC(chains=0), "not 0"),
        (SnapshotEnsemble(members=0), "cycles=0"),
        (MAP(prior_sd=-1.0), "prior_sd=-1.0"),
        (MAP(batch_size=0), "batch_size=0"),
    ],
)
def test_numbers_out_of_range(data, method, message):
    with pytest.raises(WrongArgument, match=message):
        method.fit(line, data, 0)
