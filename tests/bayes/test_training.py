"""Members that are trained together are what each of them would be alone."""

from __future__ import annotations

import random

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_efficient.bayes import SGHMC, Data, Members, TrainingFailed, trained
from keras_efficient.errors import UnsupportedLayer, WrongArgument
from keras_efficient.layers import bayesianize

RNG = np.random.default_rng(0)


def small():
    inputs = keras.Input((6,))
    x = layers.Dense(8, activation="relu")(inputs)
    x = layers.BatchNormalization()(x)
    return keras.Model(inputs, layers.Dense(3)(x))


@pytest.fixture
def data():
    x = np.random.default_rng(1).normal(size=(50, 6))
    return Data(x, (x[:, 0] > 0).astype(int) + (x[:, 1] > 0))


def values(variables):
    return [ops.convert_to_numpy(variable) for variable in variables]


@pytest.mark.contract
def test_each_member_is_what_a_fit_of_its_own_makes(data):
    members = Members.new(small, 3, seed=4)
    alone = []
    for index in range(3):
        model = small()
        for mine, stacked in (
            (model.trainable_variables, members.trainable),
            (model.non_trainable_variables, members.non_trainable),
        ):
            for variable, value in zip(mine, values(stacked), strict=True):
                variable.assign(value[index])
        alone.append(model)
    losses = list(trained(members, data, keras.optimizers.SGD(0.1, momentum=0.9), epochs=2, batch_size=16, seed=7))
    order = np.random.default_rng(7)
    orders = [[order.permutation(50)[:48] for _ in range(3)] for _ in range(2)]
    for index, model in enumerate(alone):
        model.compile(
            keras.optimizers.SGD(0.1, momentum=0.9), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        )
        for epoch in range(2):
            some = orders[epoch][index]
            history = model.fit(data.x[some], data.y[some], batch_size=16, shuffle=False, verbose=0)
            assert losses[epoch][index] == pytest.approx(history.history["loss"][0], rel=1e-3)
        for stacked, variable in zip(
            (*members.trainable, *members.non_trainable),
            (*model.trainable_variables, *model.non_trainable_variables),
            strict=True,
        ):
            assert values([stacked])[0][index] == pytest.approx(values([variable])[0], abs=2e-5)


@pytest.mark.contract
def test_members_begin_apart_by_their_seed_and_leave_chance_as_it_was():
    random.seed(3)
    np.random.seed(3)
    wanted = random.random(), np.random.rand()
    random.seed(3)
    np.random.seed(3)
    first, again, other = (Members.new(small, 2, seed) for seed in (1, 1, 2))
    assert (random.random(), np.random.rand()) == wanted
    kernels = [values(some.trainable)[0] for some in (first, again, other)]
    assert (kernels[0] == kernels[1]).all()
    assert not np.allclose(kernels[0], kernels[2])
    assert not np.allclose(kernels[0][0], kernels[0][1])


@pytest.mark.contract
def test_dropout_of_each_member_is_its_own_and_goes_on(data):
    def model():
        inputs = keras.Input((6,))
        return keras.Model(inputs, layers.Dense(3)(layers.Dropout(0.5)(inputs)))

    members = Members.new(model, 2, seed=0)
    before = values(members.non_trainable)
    assert not (before[0][0] == before[0][1]).all()
    list(trained(members, data, keras.optimizers.SGD(0.0), epochs=1, batch_size=25))
    after = values(members.non_trainable)
    assert (after[0] != before[0]).any(axis=1).all()


@pytest.mark.contract
def test_a_sampler_takes_members(data):
    members = Members.new(small, 2, seed=0)
    losses = list(trained(members, data, SGHMC(0.05, len(data), prior_sd=1.0, seed=1), epochs=30, batch_size=25))
    assert losses[-1].max() < losses[0].min()


@pytest.mark.contract
def test_a_loss_that_is_not_finite_is_told(data):
    members = Members.new(small, 2, seed=0)
    bias = values(members.trainable)[-1]
    bias[1] = np.nan
    members.trainable[-1].assign(bias)
    with pytest.raises(TrainingFailed, match="loss of member 1 is nan at step 0"):
        list(trained(members, data, keras.optimizers.SGD(0.1), epochs=1))


def test_what_is_refused(data):
    members = Members.new(small, 1, seed=0)
    for options in ({"epochs": 0}, {"epochs": 1, "batch_size": 0}):
        with pytest.raises(WrongArgument):
            next(trained(members, data, keras.optimizers.SGD(0.1), **options))
    with pytest.raises(WrongArgument, match="clipvalue"):
        next(trained(members, data, keras.optimizers.SGD(0.1, clipnorm=1.0), epochs=1))
    with pytest.raises(WrongArgument, match="One member"):
        Members.new(small, 0, seed=0)
    with pytest.raises(WrongArgument, match="built Keras model"):
        Members.new(lambda: keras.Sequential([layers.Dense(3)]), 1, seed=0)
    widths = iter([3, 4])
    with pytest.raises(WrongArgument, match="different shapes"):
        Members.new(lambda: keras.Sequential([keras.Input((2,)), layers.Dense(next(widths))]), 2, seed=0)
    with pytest.raises(WrongArgument, match="have weights"):
        Members(members.model, values(members.trainable)[:1], values(members.non_trainable))


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (np.zeros((3, 2)), [0, 1], "as many"),
        (np.zeros((0, 2)), np.zeros(0, int), "as many"),
        (np.zeros((2, 2)), [0.5, 1], "integers"),
        (np.zeros((3, 2)), [0, 5, 1], "Label 5 of example 1"),
        (np.zeros((3, 2)), [0, 1, -1], "Label -1 of example 2"),
        (np.array([[0, 1], [np.nan, 0]]), [0, 1], "Example 1 has NaN"),
    ],
)
def test_data_that_are_wrong(x, y, words):
    with pytest.raises(WrongArgument, match=words):
        Data(x, np.array(y), num_classes=3)


@pytest.mark.contract
def test_losses_that_layers_add_are_trained(data):
    def shrinking():
        inputs = keras.Input((6,))
        return keras.Model(inputs, layers.Dense(3, kernel_regularizer=keras.regularizers.L2(5.0))(inputs))

    members = Members.new(shrinking, 2, seed=4)
    before = values(members.trainable)[0]
    (losses,) = trained(members, data, keras.optimizers.SGD(0.01), epochs=1, batch_size=16, seed=7)
    after = values(members.trainable)[0]
    assert np.abs(after).mean() < 0.9 * np.abs(before).mean()
    assert (losses > 2 * (after**2).sum(axis=(1, 2))).all()


def test_a_second_prior_is_refused(data):
    def with_regularizer():
        inputs = keras.Input((6,))
        return keras.Model(inputs, layers.Dense(3, kernel_regularizer="l2")(inputs))

    def with_prior():
        return bayesianize(small(), num_data=50)

    for model_fn in (with_regularizer, with_prior):
        members = Members.new(model_fn, 1, seed=0)
        with pytest.raises(UnsupportedLayer, match="prior"):
            next(iter(trained(members, data, SGHMC(0.1, 50, prior_sd=1.0), epochs=1)))
        next(iter(trained(members, data, SGHMC(0.01, 50), epochs=1)))


def test_examples_of_another_shape(data):
    members = Members.new(small, 1, seed=4)
    with pytest.raises(WrongArgument, match=r"takes examples of \(6,\), not of \(5,\)"):
        next(trained(members, Data(data.x[:, 1:], data.y), SGHMC(0.1, 50), epochs=1))


def test_more_classes_than_outputs(data):
    members = Members.new(small, 1, seed=4)
    many = Data(data.x, data.y, 4)
    with pytest.raises(WrongArgument, match="4 classes do not fit a model of 3 outputs"):
        next(trained(members, many, SGHMC(0.1, 50), epochs=1))


def test_scales_of_normalisation_have_no_prior(data):
    """A part of the paper's defect 12: a prior around 0 draws them to 0."""
    members = Members.new(small, 1, seed=4)
    optimizer = SGHMC(0.1, len(data), alpha=0.1, prior_sd=0.05, temperature=0.0)
    *_, _ = trained(members, data, optimizer, epochs=40, batch_size=25)
    kernel, _, gamma, *_ = values(members.trainable)
    assert np.abs(kernel).mean() < 0.1
    assert gamma.mean() > 0.5


def test_sequential_models_are_taken_as_functional_ones(data):
    def sequential():
        return keras.Sequential([keras.Input((6,)), layers.Dense(8), layers.BatchNormalization(), layers.Dense(3)])

    members = Members.new(sequential, 2, seed=4)
    assert not isinstance(members.model, keras.Sequential)
    assert next(variable.path for variable in members.model.trainable_variables).endswith("kernel")
    assert members.model.inputs


def test_model_functions_that_give_no_networks_of_logits():
    kept = small()
    with pytest.raises(WrongArgument, match="same model each time"):
        Members.new(lambda: kept, 2, seed=4)
    for end in (layers.Dense(3, activation="softmax"), layers.Softmax()):
        inputs = keras.Input((3,))
        model = keras.Model(inputs, end(inputs))
        with pytest.raises(UnsupportedLayer, match="gives probabilities"):
            Members.new(lambda model=model: model, 1, seed=4)
    inputs, other = keras.Input((3,)), keras.Input((3,))
    for given, outputs in [([inputs, other], inputs + other), (inputs, {"logits": inputs + 0.0}), (inputs, [inputs])]:
        model = keras.Model(given, outputs)
        with pytest.raises(WrongArgument, match="takes or gives more than one tensor"):
            Members.new(lambda model=model: model, 1, seed=4)
