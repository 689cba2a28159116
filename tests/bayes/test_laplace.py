"""Curvatures against products of Jacobians, and the prior's precision against numerical integration."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_efficient.bayes import Data, Members, StackedPosterior
from keras_efficient.bayes.compiled import compiled
from keras_efficient.bayes.inference import MAP, DiagonalLaplace, KroneckerLaplace, LastLayerLaplace
from keras_efficient.bayes.inference._likelihood import Vectors, derived
from keras_efficient.bayes.inference.laplace import (
    FACTORS,
    Diagonal,
    Full,
    Kronecker,
    _Around,
    _best_on,
    _Network,
    log_marginal,
    tuned_precision,
)
from keras_efficient.errors import UnsupportedLayer, WrongArgument

RNG = np.random.default_rng(0)
QUICK = {"epochs": 3, "batch_size": 20}
METHODS = [LastLayerLaplace, DiagonalLaplace, KroneckerLaplace]


def convolutional():
    inputs = keras.Input((5, 5, 2))
    x = layers.Conv2D(3, 3, strides=2, padding="same", activation="tanh")(inputs)
    x = layers.Dense(4, activation="relu", use_bias=False)(layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(3)(x))


def flat(units=3, features=4):
    inputs = keras.Input((features,))
    return keras.Model(inputs, layers.Dense(units)(inputs))


def normalised():
    inputs = keras.Input((4,))
    x = layers.BatchNormalization(name="norm")(layers.Dense(5)(inputs))
    return keras.Model(inputs, layers.Dense(3)(layers.ReLU()(x)))


def labelled(*shape, count=60):
    x = np.random.default_rng(1).normal(size=(count, *shape))
    columns = x.reshape(count, -1)
    return Data(x, (columns[:, 0] > 0).astype(int) + (columns[:, 1] > 0), 3)


class Unit:
    """Random numbers of which one is one, and the others are zero."""

    def __init__(self, place):
        self.place = place

    def standard_normal(self, shape):
        found = np.zeros(shape)
        found.flat[self.place] = 1.0
        return found


def matrix(curvature, precision=0.3):
    """H of a curvature, from what it makes of unit vectors, which is a root of (H + precision I)⁻¹."""
    size = curvature.draw(RNG, precision).size
    root = np.stack([curvature.draw(Unit(place), precision).ravel() for place in range(size)], axis=1)
    return np.linalg.inv(root @ root.T) - precision * np.eye(size)


def looked_at(method, model_fn, data, seed=3):
    members = Members.new(model_fn, 1, seed)
    network = _Network(members, method._layers(members.model))
    return network, method._curvatures(network, data)


def gauss_newton(network, layer, data):
    """Σ_examples Jᵀ (diag p − p pᵀ) J of one layer's weights, its kernel's rows and then its bias."""
    model, weights = network.model, [ops.convert_to_tensor(one) for one in network.trainable]

    def logit(some, x, label):
        found = model.stateless_call(some, network.others, x, training=False)[0][0]
        return ops.take(found, label), found

    run = compiled(derived(logit))
    places = [[one is mine for one in model.trainable_variables].index(True) for mine in layer.trainable_variables]
    total = 0.0
    for x in data.x:
        jacobian = []
        for label in range(3):
            (_, logits), gradient = run(weights, ops.convert_to_tensor(x[None]), ops.convert_to_tensor(label))
            jacobian.append(np.concatenate([np.ravel(ops.convert_to_numpy(gradient[place])) for place in places]))
        jacobian, logits = np.stack(jacobian).astype(float), ops.convert_to_numpy(logits).astype(float)
        p = np.exp(logits) / np.exp(logits).sum()
        total = total + jacobian.T @ (np.diag(p) - np.outer(p, p)) @ jacobian
    return total


@pytest.mark.contract
def test_the_last_layer_has_the_hessian():
    """Of a linear model it is that of the negative log likelihood, by differences of gradients that are known."""
    data = labelled(4, count=30)
    network, (curvature,) = looked_at(LastLayerLaplace(), flat, data)
    inputs = np.concatenate([data.x, np.ones((30, 1))], axis=1).astype(float)
    middle = np.concatenate([network.trainable[0], network.trainable[1][None]]).astype(float)

    def gradient(weights):
        powers = np.exp(inputs @ weights)
        return (inputs.T @ (powers / powers.sum(axis=1, keepdims=True) - np.eye(3)[data.y])).ravel()

    steps = 1e-5 * np.eye(middle.size).reshape(-1, *middle.shape)
    wanted = np.stack([(gradient(middle + step) - gradient(middle - step)) / 2e-5 for step in steps])
    assert matrix(curvature) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.contract
def test_the_diagonal_is_that_of_the_gauss_newton_matrix():
    data = labelled(5, 5, 2, count=12)
    network, curvatures = looked_at(DiagonalLaplace(), convolutional, data)
    assert len(curvatures) == len(network.layers) == 3
    for layer, curvature in zip(network.layers, curvatures, strict=True):
        found, wanted = matrix(curvature), np.diag(gauss_newton(network, layer, data))
        assert np.diag(found) == pytest.approx(wanted, rel=1e-3, abs=1e-4)
        assert np.abs(found - np.diag(np.diag(found))).max() < 1e-9
        assert wanted.max() > 0.01


@pytest.mark.contract
def test_the_last_layer_of_a_deep_network():
    data = labelled(5, 5, 2, count=12)
    network, (curvature,) = looked_at(LastLayerLaplace(), convolutional, data)
    assert matrix(curvature) == pytest.approx(gauss_newton(network, network.layers[0], data), abs=1e-3)


@pytest.mark.contract
def test_a_kronecker_product_is_exact_for_one_input():
    one = labelled(4, count=30)
    data = Data(np.repeat(one.x[:1], 30, axis=0), one.y, 3)
    network, (curvature,) = looked_at(KroneckerLaplace(), flat, data)
    assert matrix(curvature) == pytest.approx(gauss_newton(network, network.layers[0], data), abs=1e-3)


@pytest.mark.contract
def test_a_kronecker_product_of_means():
    """mean(a aᵀ) of the last layer's inputs, and the matrix that its biases have."""
    data = labelled(5, 5, 2, count=12)
    network, curvatures = looked_at(KroneckerLaplace(), convolutional, data)
    biases = gauss_newton(network, network.layers[-1], data)[-3:, -3:]
    hidden = keras.Model(network.model.inputs, network.model.layers[-1].input)
    for variable, value in zip(network.model.trainable_variables, network.trainable, strict=True):
        variable.assign(value)
    rows = np.concatenate([ops.convert_to_numpy(hidden(data.x)), np.ones((12, 1))], axis=1).astype(float)
    assert matrix(curvatures[-1]) == pytest.approx(np.kron(rows.T @ rows / 12, biases), abs=1e-3)


@pytest.mark.contract
@pytest.mark.parametrize("kind", [DiagonalLaplace, KroneckerLaplace])
def test_a_convolution_at_one_place_is_a_dense_layer(kind):
    def convolution():
        inputs = keras.Input((2, 2, 2))
        x = layers.Conv2D(3, 2, activation="tanh")(inputs)
        return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))

    def dense():
        inputs = keras.Input((2, 2, 2))
        x = layers.Dense(3, activation="tanh")(layers.Flatten()(inputs))
        return keras.Model(inputs, layers.Dense(3)(x))

    data = labelled(2, 2, 2, count=20)
    found = []
    weights = [RNG.normal(size=shape) for shape in ((1, 8, 3), (1, 3), (1, 3, 3), (1, 3))]
    for model_fn in (convolution, dense):
        model = model_fn()
        shaped = [one.reshape(1, *v.shape) for one, v in zip(weights, model.trainable_variables, strict=True)]
        network = _Network(Members(model, shaped), kind()._layers(model))
        found.append([matrix(one) for one in kind()._curvatures(network, data)])
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize(
    "curvature",
    [
        Full(np.diag([4.0, 1.0, 9.0, 0.0]) + 0.5, 2),
        Diagonal(np.array([[4.0, 1.0], [0.0, 9.0]])),
        Kronecker(np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[1.0, 0.5], [0.5, 2.0]])),
    ],
)
def test_the_covariance_of_draws_and_the_eigenvalues(curvature):
    drawn = np.stack([curvature.draw(RNG, 0.5).ravel() for _ in range(20_000)])
    h = matrix(curvature)
    wanted = np.linalg.inv(h + 0.5 * np.eye(4))
    sds = np.sqrt(np.diag(wanted))
    assert np.abs(np.cov(drawn.T) - wanted) / np.outer(sds, sds) == pytest.approx(0, abs=0.05)
    assert np.sort(np.ravel(curvature.eigenvalues)) == pytest.approx(np.linalg.eigvalsh(h), abs=1e-9)


def test_the_marginal_likelihood_against_integration():
    """Of a Gaussian likelihood of two weights, for which Laplace's approximation is exact."""
    h, at, delta = np.array([[3.0, 1.0], [1.0, 2.0]]), np.array([0.7, -1.2]), 0.8
    axis = np.linspace(-9, 9, 1201)
    places = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    away = places - at
    likelihood = np.exp(-0.5 * np.einsum("ni,ij,nj->n", away, h, away))
    prior = delta / (2 * np.pi) * np.exp(-0.5 * delta * np.square(places).sum(axis=1))
    wanted = np.log((likelihood * prior).sum() * (axis[1] - axis[0]) ** 2)
    top = np.linalg.solve(h + delta * np.eye(2), h @ at)
    there = -0.5 * (top - at) @ h @ (top - at)
    assert there + log_marginal(np.linalg.eigvalsh(h), top @ top, delta) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("squared_norm", [0.01, 3.0, 500.0])
def test_the_tuned_precision_is_the_best_of_a_grid(squared_norm):
    eigenvalues = np.array([[100.0, 1.0], [0.0, 1e4]])
    found = tuned_precision(eigenvalues, squared_norm)
    best = log_marginal(eigenvalues, squared_norm, found)
    assert best > max(log_marginal(eigenvalues, squared_norm, found * factor) for factor in (0.98, 1.02, 0.1, 10))


def test_larger_weights_have_a_wider_prior():
    eigenvalues = np.array([100.0, 1.0, 1e4])
    found = [tuned_precision(eigenvalues, norm) for norm in (0.1, 1.0, 10.0, 1000.0)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 10 * found[-1]


def test_nothing_to_tune():
    with pytest.raises(WrongArgument, match="all zero"):
        tuned_precision(np.ones(3), 0.0)
    with pytest.raises(WrongArgument, match="all zero"):
        tuned_precision(np.zeros(3), 1.0)


def test_the_precision_on_held_out_data_has_the_least_loss():
    data = labelled(4)
    network, curvatures = looked_at(KroneckerLaplace(), flat, data)
    around, losses = _Around(network, curvatures), []
    for factor in FACTORS:
        drawn = around.draws(np.random.default_rng([5, 6]), 0.7 * factor, 8)
        found = StackedPosterior(Members(network.model, drawn)).predict(data.x, reduce="mean")
        losses.append(-np.log(found[np.arange(60), data.y]).mean())
    assert _best_on(data, network, around, 0.7, 5) == pytest.approx(0.7 * FACTORS[int(np.argmin(losses))])


@pytest.mark.contract
@pytest.mark.parametrize("kind", METHODS)
def test_draws_are_around_the_maximum(kind):
    data = labelled(4)
    top = Vectors(flat()).of(MAP(**QUICK).fit(flat, data, 2).members)[0]
    posterior = kind(**QUICK, held_out=0.0, prior_precision=50.0, draws=2000).fit(flat, data, 2)
    assert posterior.diagnostics == {"prior_precision": 50.0}
    drawn = Vectors(posterior.model).of(posterior.members).astype(float)
    sds = drawn.std(axis=0)
    assert np.abs(drawn.mean(axis=0) - top) / sds == pytest.approx(0, abs=0.25)
    assert (sds < 1.05 / np.sqrt(50)).all()  # as far as 2,000 draws tell
    assert (sds > 0.05).all()


def test_weights_before_the_last_layer_stay():
    posterior = LastLayerLaplace(**QUICK, draws=4).fit(normalised, labelled(4), 0)
    *before, kernel, bias = posterior.arrays()["trainable"]
    assert all((one == one[:1]).all() for one in before)
    assert np.ptp(kernel, axis=0).min() > 1e-4
    assert np.ptp(bias, axis=0).min() > 1e-4
    assert posterior.diagnostics["prior_precision"] > 0


@pytest.mark.parametrize("kind", METHODS)
def test_a_seed_is_a_run(kind):
    data = labelled(4)
    first, again, other = (kind(**QUICK, draws=3).fit(flat, data, seed).predict(data.x[:5]) for seed in (1, 1, 2))
    assert first == pytest.approx(again, abs=1e-4)
    assert not np.allclose(first, other, atol=1e-2)


def twice():
    inputs, layer = keras.Input((4,)), layers.Dense(4, name="shared")
    return keras.Model(inputs, layers.Dense(3)(layer(layer(inputs))))


def grouped():
    inputs = keras.Input((2, 2, 2))
    x = layers.Conv2D(4, 2, groups=2, name="grouped")(inputs)
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))


def with_softmax():
    inputs = keras.Input((4,))
    return keras.Model(inputs, layers.Dense(3, activation="softmax", name="probabilities")(inputs))


@pytest.mark.parametrize(
    ("kind", "model_fn", "shape", "layer"),
    [
        (DiagonalLaplace, normalised, (4,), "norm"),
        (KroneckerLaplace, normalised, (4,), "norm"),
        (KroneckerLaplace, twice, (4,), "shared"),
        (DiagonalLaplace, grouped, (2, 2, 2), "grouped"),
        (LastLayerLaplace, with_softmax, (4,), "probabilities"),
    ],
)
def test_layers_whose_curvature_is_not_known_are_named(kind, model_fn, shape, layer):
    with pytest.raises(UnsupportedLayer, match=rf"'{layer}'"):
        kind(**QUICK).fit(model_fn, labelled(*shape), 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"draws": 0}, "draws=0"),
        ({"prior_precision": 0.0}, "prior_precision=0.0"),
        ({"prior_precision": float("nan")}, "prior_precision=nan"),
        ({"held_out": 1.0}, "none on one side"),
        ({"held_out": -0.5}, "none on one side"),
        ({"epochs": 0}, "epochs=0"),
    ],
)
def test_numbers_out_of_range(wrong, message):
    with pytest.raises(WrongArgument, match=message):
        KroneckerLaplace(**{**QUICK, **wrong}).fit(flat, labelled(4), 0)
