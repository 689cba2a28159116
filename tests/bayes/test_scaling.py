"""The temperature is the best one, and leaves what is predicted as it was."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from keras_efficient.bayes import Data, StochasticPosterior
from keras_efficient.bayes.inference import MAP, DeepEnsemble, TemperatureScaling
from keras_efficient.bayes.inference._runs import divided
from keras_efficient.bayes.inference.scaling import best_temperature
from keras_efficient.errors import UnsupportedLayer, WrongArgument
from keras_efficient.layers import MCDropout

RNG = np.random.default_rng(0)
QUICK = {"epochs": 10, "batch_size": 20}


def network():
    inputs = keras.Input((4,))
    return keras.Model(inputs, layers.Dense(3)(layers.Dense(16, activation="relu")(inputs)))


@pytest.fixture(scope="module")
def data():
    """Labels that hang on inputs but for a third, so that what is learnt of them by heart is too sure."""
    random = np.random.default_rng(1)
    x = random.normal(size=(150, 4))
    y = (x[:, 0] > 0).astype(int) + (x[:, 1] > 0)
    return Data(x, np.where(random.uniform(size=150) < 0.3, random.integers(3, size=150), y), 3)


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def loss(logits, labels, temperature):
    found = softmax(logits / temperature).mean(axis=0)
    return -np.log(found[np.arange(len(labels)), labels]).mean()


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("sureness", [0.3, 4.0])
def test_the_temperature_is_the_best_of_a_grid(members, sureness):
    logits = sureness * RNG.normal(size=(members, 300, 5))
    labels = (logits.mean(axis=0) / sureness + RNG.gumbel(size=(300, 5))).argmax(axis=1)
    found = best_temperature(softmax(logits), labels)
    grid = np.exp(np.linspace(np.log(0.01), np.log(100), 2001))
    wanted = grid[int(np.argmin([loss(logits, labels, one) for one in grid]))]
    assert found == pytest.approx(wanted, rel=0.01)
    assert loss(logits, labels, found) <= loss(logits, labels, wanted) + 1e-9


def test_the_temperature_of_logits_that_were_multiplied():
    logits = RNG.normal(size=(1, 20_000, 4))
    labels = (logits[0] + RNG.gumbel(size=logits[0].shape)).argmax(axis=1)
    assert best_temperature(softmax(logits), labels) == pytest.approx(1.0, rel=0.05)
    assert best_temperature(softmax(3 * logits), labels) == pytest.approx(3.0, rel=0.05)


def test_probabilities_that_are_zero():
    """What is wrong and quite sure: as hot as it may be, and a number."""
    assert best_temperature(np.array([[[1.0, 0.0]]]), np.array([1])) == pytest.approx(100.0)


@pytest.mark.contract
@pytest.mark.parametrize("method", [MAP(**QUICK), DeepEnsemble(**QUICK, members=2)])
def test_logits_are_divided_and_the_rest_fits_best(data, method):
    posterior = TemperatureScaling(method, held_out=0.3).fit(network, data, 0)
    rest, held = divided(data, 0.3, 0)
    assert (len(rest), len(held)) == (105, 45)
    plain = method.fit(network, rest, 0)
    temperature = posterior.diagnostics["temperature"]
    assert abs(np.log(temperature)) > 0.05  # it was too sure, or not sure enough
    assert posterior.logits(data.x) == pytest.approx(plain.logits(data.x) / temperature, abs=1e-4)
    assert (posterior.predict(data.x).argmax(axis=2) == plain.predict(data.x).argmax(axis=2)).all()
    losses = [loss(plain.logits(held.x).astype(float), held.y, temperature * factor) for factor in (1.0, 0.9, 1.1)]
    assert losses[0] == min(losses)


def test_a_seed_is_a_run(data):
    method = TemperatureScaling(MAP(**QUICK))
    first, again, other = (method.fit(network, data, seed).predict(data.x[:5]) for seed in (1, 1, 2))
    assert first == pytest.approx(again, abs=1e-4)
    assert not np.allclose(first, other, atol=1e-2)


@pytest.mark.parametrize("part", [0.0, 0.001, 1.0, -0.2])
def test_a_part_that_leaves_nothing(data, part):
    with pytest.raises(WrongArgument, match="none on one side"):
        TemperatureScaling(held_out=part).fit(network, data, 0)


def test_what_cannot_be_scaled(data):
    def softened():
        inputs = keras.Input((4,))
        return keras.Model(inputs, layers.Dense(3, activation="softmax", name="probabilities")(inputs))

    class Dropping:
        def fit(self, model_fn, data, seed):
            inputs = keras.Input((4,))
            return StochasticPosterior(keras.Model(inputs, layers.Dense(3)(MCDropout(0.5)(inputs))))

    with pytest.raises(UnsupportedLayer, match="'probabilities'"):
        TemperatureScaling(MAP(epochs=1)).fit(softened, data, 0)
    with pytest.raises(WrongArgument, match="Dropping gives no draws of weights"):
        TemperatureScaling(Dropping()).fit(network, data, 0)
