"""Batch normalisation of a draw has the statistics of that draw's own activations."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_efficient.bayes import Data, Members
from keras_efficient.bayes.statistics import refreshed
from keras_efficient.errors import WrongArgument

DATA = Data(np.random.default_rng(0).normal(3, 2, (64, 4)), np.arange(64) % 3)


def network(momentum=0.9):
    inputs = keras.Input((4,))
    x = layers.BatchNormalization(momentum=momentum)(layers.Dense(5)(inputs))
    return keras.Model(inputs, layers.Dense(3)(layers.ReLU()(x)))


@pytest.mark.contract
def test_they_are_means_over_batches():
    members = Members.new(network, 2, seed=1)
    before = [np.array(one.value) for one in members.non_trainable]
    found = refreshed(members, DATA, batch_size=20)
    for index in range(2):
        kernel, bias = (np.array(one.value[index]) for one in members.trainable[:2])
        some = DATA.x[np.random.default_rng(0).permutation(len(DATA))[: len(DATA) // 20 * 20]]
        batches = (some @ kernel + bias).reshape(-1, 20, 5)
        np.testing.assert_allclose(found.non_trainable[0].value[index], batches.mean(axis=(0, 1)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.non_trainable[1].value[index], batches.var(axis=1).mean(axis=0), rtol=1e-4)
    for one, value in zip(members.non_trainable, before, strict=True):
        np.testing.assert_array_equal(np.array(one.value), value)
    for one, other in zip(found.trainable, members.trainable, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(one), ops.convert_to_numpy(other))


def test_sorted_data_have_their_whole_variance():
    """Batches of one class each would hide what differs between classes."""
    x = np.repeat(np.arange(5.0, dtype=np.float32) * 3, 256)[:, None] * np.ones(4, np.float32)
    data = Data(x, np.repeat(np.arange(5), 256) % 3, 3)
    found = refreshed(Members.new(network, 1, seed=1), data)
    kernel, bias = (np.array(one.value[0]) for one in found.trainable[:2])
    np.testing.assert_allclose(found.non_trainable[1].value[0], (x @ kernel + bias).var(axis=0), rtol=0.05)


def test_without_any_nothing_is_done():
    def plain():
        inputs = keras.Input((4,))
        return keras.Model(inputs, layers.Dense(3)(inputs))

    members = Members.new(plain, 2, seed=1)
    assert refreshed(members, DATA) is members


def test_layers_that_forget_nothing_are_named():
    members = Members.new(lambda: network(1.0), 1, seed=1)
    with pytest.raises(WrongArgument, match="batch_normalization"):
        refreshed(members, DATA)
