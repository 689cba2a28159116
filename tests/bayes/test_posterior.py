"""What draws say together is what each says alone."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_efficient.bayes import Members, StackedPosterior, StochasticPosterior
from keras_efficient.bayes.posterior import _bytes_of
from keras_efficient.errors import WrongArgument
from keras_efficient.layers import MCDropout

RNG = np.random.default_rng(0)


def network():
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(4, 3, use_bias=False)(inputs)
    x = layers.Dropout(0.3)(layers.ReLU()(layers.BatchNormalization()(x)))
    return keras.Model(inputs, layers.Dense(5)(layers.Flatten()(x)))


@pytest.fixture(scope="module")
def posterior():
    """Draws with statistics of their own in their batch normalisation."""
    members = Members.new(network, 3, seed=1)
    random = np.random.default_rng(2)
    for variable in members.non_trainable:
        if "moving" in variable.name:
            variable.assign(random.uniform(0.5, 2, variable.shape))
    return StackedPosterior(members), members


def one_by_one(members, x):
    found = []
    for index in range(members.count):
        model = network()
        for variable, value in zip(
            (*model.trainable_variables, *model.non_trainable_variables),
            (*members.trainable, *members.non_trainable),
            strict=True,
        ):
            variable.assign(value.value[index])
        found.append(ops.convert_to_numpy(ops.softmax(model(x, training=False))))
    return np.stack(found)


@pytest.mark.contract
def test_it_is_the_loop_over_members(posterior):
    posterior, members = posterior
    x = RNG.normal(size=(11, 6, 6, 2)).astype("float32")
    wanted = one_by_one(members, x)
    assert posterior.predict(x) == pytest.approx(wanted, abs=1e-5)
    assert posterior.predict(x, batch_size=4) == pytest.approx(wanted, abs=1e-5)
    assert posterior.predict(x, max_bytes=3 * 2 * _bytes_of(members.model)) == pytest.approx(wanted, abs=1e-5)
    assert posterior.predict(x, max_bytes=1) == pytest.approx(wanted, abs=1e-5)
    assert posterior.predict(x, members=2) == pytest.approx(wanted[:2], abs=1e-5)
    assert posterior.predict(x, batch_size=3, reduce="mean") == pytest.approx(wanted.mean(axis=0), abs=1e-5)


@pytest.mark.contract
def test_draws_stay_when_the_members_are_trained_on(posterior):
    _, members = posterior
    held = StackedPosterior(members)
    x = RNG.normal(size=(2, 6, 6, 2))
    before = held.predict(x)
    kept = [ops.copy(one.value) for one in members.trainable]
    for variable in members.trainable:
        variable.assign(variable.value * 2)
    assert (held.predict(x) == before).all()
    for variable, value in zip(members.trainable, kept, strict=True):
        variable.assign(value)


@pytest.mark.parametrize("wrong", [{"members": 0}, {"members": 4}, {"batch_size": 0}, {"max_bytes": 0}])
def test_what_is_refused(posterior, wrong):
    with pytest.raises(WrongArgument):
        posterior[0].predict(np.zeros((2, 6, 6, 2)), **wrong)
    with pytest.raises(WrongArgument):
        posterior[0].predict(np.zeros((0, 6, 6, 2)))
    with pytest.raises(WrongArgument, match=r"takes examples of \(6, 6, 2\), not of \(6, 5, 2\)"):
        posterior[0].predict(np.zeros((2, 6, 5, 2)))


def test_stock_dropout_does_not_draw():
    with pytest.raises(WrongArgument, match="no layer that draws"):
        StochasticPosterior(network())


def test_draws_of_a_network_differ():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(3)(MCDropout(0.5)(inputs)))
    p = StochasticPosterior(model, 4).predict(np.ones((1, 4)))[:, 0]
    assert len(np.unique(p.round(6), axis=0)) > 1
