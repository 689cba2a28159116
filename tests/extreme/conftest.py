"""A set with a planted structure, and the classifier that is best for it."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from keras_efficient.layers import HALOSOutput

TOPICS, UNITS, DIM, NOISE = 40, 400, 16, 0.5


class Planted:
    """Classes lie around topics, queries around classes; the output layer is the Bayes classifier of them."""

    def __init__(self, seed: int = 0):
        random = np.random.default_rng(seed)
        topics = random.normal(size=(TOPICS, DIM))
        self.means = (topics[random.integers(TOPICS, size=UNITS)] + 0.3 * random.normal(size=(UNITS, DIM))).astype("f")
        self.frequencies = random.permutation(1 / np.arange(1, UNITS + 1) ** 0.7)
        self.frequencies /= self.frequencies.sum()

    def draw(self, number: int, seed: int = 1):
        """Queries and their labels."""
        random = np.random.default_rng(seed)
        labels = random.choice(UNITS, number, p=self.frequencies)
        return (self.means[labels] + NOISE * random.normal(size=(number, DIM))).astype("float32"), labels

    def model(self) -> keras.Model:
        inputs = keras.Input((DIM,), name="x")
        model = keras.Model(inputs, HALOSOutput(UNITS, name="out")(inputs))
        biases = np.log(self.frequencies) - 0.5 * np.square(self.means).sum(1) / NOISE**2
        model.get_layer("out").set_weights([self.means / NOISE**2, biases])
        return model


@pytest.fixture(scope="session")
def planted() -> Planted:
    return Planted()
