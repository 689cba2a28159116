"""Layers with distributions over their weights: against the analytic Gaussian, tensorflow-probability and NumPy."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_efficient import probability
from keras_efficient.bayes.compiled import compiled
from keras_efficient.deploy import deploy
from keras_efficient.errors import UnknownName, WrongArgument
from keras_efficient.layers import bayesian
from keras_efficient.layers.bayesian import (
    BatchEnsembleConv1D,
    BatchEnsembleConv2D,
    BatchEnsembleDense,
    BayesianDense,
    Distribution,
    MCDropout,
    Parameter,
    PrecisionReset,
    RandomFeatureGaussianProcess,
    bayesianize,
    drawn,
    member,
    with_dropout,
)
from keras_efficient.layers.bayesian.distributions import divergence, softplus_inverse
from keras_efficient.layers.bayesian.estimators import flipout
from keras_efficient.layers.bayesian.layer import ESTIMATORS

RNG = np.random.default_rng(0)
NORMAL = Distribution("Normal", loc=Parameter(), scale=Parameter(0.1))
MIXTURE = Distribution(
    "MixtureSameFamily",
    mixture_distribution=Distribution("Categorical", probs=[0.25, 0.75]),
    components_distribution=Distribution("Normal", loc=[0.0, 0.0], scale=[1.0, 0.1]),
)
KINDS = {
    "dense": (lambda kind, **k: kind(5, **k), layers.Dense, (6, 4)),
    "dense-sequence": (lambda kind, **k: kind(5, activation="relu", **k), layers.Dense, (4, 3, 4)),
    "conv1d-causal": (lambda kind, **k: kind(4, 3, padding="causal", dilation_rate=2, **k), layers.Conv1D, (3, 9, 2)),
    "conv2d": (lambda kind, **k: kind(4, (3, 2), strides=2, groups=2, **k), layers.Conv2D, (3, 7, 8, 2)),
    "conv2d-dilated": (lambda kind, **k: kind(4, 3, dilation_rate=2, **k), layers.Conv2D, (3, 7, 8, 2)),
    "conv3d": (lambda kind, **k: kind(3, 2, padding="same", **k), layers.Conv3D, (2, 4, 3, 5, 2)),
    "conv1d-transpose": (lambda kind, **k: kind(4, 3, strides=2, **k), layers.Conv1DTranspose, (3, 5, 2)),
    "conv2d-transpose": (
        lambda kind, **k: kind(4, 3, strides=2, padding="same", **k),
        layers.Conv2DTranspose,
        (3, 5, 4, 2),
    ),
    "conv3d-transpose": (lambda kind, **k: kind(2, 2, use_bias=False, **k), layers.Conv3DTranspose, (2, 3, 3, 2, 2)),
}


def array(tensor):
    return ops.convert_to_numpy(tensor)


def layer_of(kind, estimator="reparameterization", **options):
    make, stock, shape = KINDS[kind]
    found = make(getattr(bayesian, f"Bayesian{stock.__name__}"), num_data=10, estimator=estimator, seed=1, **options)
    found.build(shape)
    if found.use_bias:
        found.bias.assign(RNG.normal(size=found.bias.shape))
    return found, RNG.normal(size=shape).astype("float32")


def set_scales(layer, scales):
    layer._kernel_posterior["scale"].assign(softplus_inverse(scales))


@pytest.mark.contract
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", KINDS)
def test_without_width_it_is_the_stock_layer(kind, estimator):
    layer, x = layer_of(kind, estimator)
    set_scales(layer, np.full(layer.mean.shape, 1e-20))
    wanted = array(layer.deploy()(x))
    assert type(layer.deploy()) is KINDS[kind][1]
    assert array(layer(x)) == pytest.approx(wanted, abs=1e-6)
    assert np.isfinite(array(layer.losses[0]))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", ["dense", "conv2d", "conv2d-transpose"])
def test_outputs_are_the_analytic_gaussian(kind, estimator):
    """Of 4,000 draws; the variance is the stock layer's output of squared inputs and squared scales."""
    layer, x = layer_of(kind, estimator)
    layer.activation = keras.activations.linear
    scales = RNG.uniform(0.05, 0.3, layer.mean.shape)
    set_scales(layer, scales)
    wanted = array(layer.deploy()(x))
    squares = layer.deploy()
    squares.set_weights([scales**2, *([np.zeros(layer.bias.shape)] if layer.use_bias else [])])
    variance = array(squares(x**2))
    import tensorflow as tf

    @tf.function
    def run(some):
        return tf.map_fn(lambda _: layer.call(some), tf.range(4000), fn_output_signature=tf.float32)

    found = run(x).numpy()
    error = np.abs(found.mean(axis=0) - wanted) / np.sqrt(variance / 4000)
    assert error.max() < 5.0
    assert found.var(axis=0) == pytest.approx(variance, rel=0.15)
    # Two examples that are alike: one draw gives them equal outputs, the other estimators do not correlate them.
    x[1] = x[0]
    first, second = run(x).numpy()[:, :2].reshape(4000, 2, -1)[..., 0].T
    correlation = np.corrcoef(first, second)[0, 1]
    assert correlation == pytest.approx(1.0 if estimator == "reparameterization" else 0.0, abs=0.08)


GOLDEN = [((0.0, 2.0), (0.0, 1.0), 0.8068528), ((1.0, 0.5), (0.0, 1.0), 0.8181472)]


@pytest.mark.contract
@pytest.mark.parametrize(("own", "its", "wanted"), GOLDEN)
def test_golden_divergences(own, its, wanted):
    posterior, prior = (Distribution("Normal", loc=float(a), scale=float(b)) for a, b in (own, its))
    one = {"loc": ops.zeros(())}
    assert float(divergence(posterior, prior, one, {}, None)) == pytest.approx(wanted, abs=1e-6)


FAMILIES = {
    "normal": (None, Distribution("Normal", loc=0.3, scale=0.5)),
    "normal-one-scale": (Distribution("Normal", loc=Parameter(), scale=Parameter(0.1, shape=())), None),
    "normal-trained-prior": (None, Distribution("Normal", loc=Parameter(0.1, shape=()), scale=Parameter(0.7))),
    "laplace": (
        Distribution("Laplace", loc=Parameter(), scale=Parameter(0.2)),
        Distribution("Laplace", loc=0.0, scale=0.5),
    ),
    "triangular": (
        Distribution("MultivariateNormalTriL", loc=Parameter(), scale_tril=Parameter(0.2)),
        Distribution("MultivariateNormalDiag", loc=[0.1] * 20, scale_diag=[0.9] * 20),
    ),
}


@pytest.mark.contract
@pytest.mark.parametrize("name", FAMILIES)
def test_closed_divergences_are_those_of_tensorflow_probability(name):
    posterior, prior = FAMILIES[name]
    layer = BayesianDense(5, num_data=7, posterior=posterior, prior=prior)
    layer.build((None, 4))
    known = probability.library().distributions
    shape = (4, 5)
    wanted = known.kl_divergence(
        layer.posterior.made(layer._kernel_posterior, shape), layer.prior.made(layer._kernel_prior, shape)
    )
    layer(np.ones((2, 4), "float32"))
    assert float(layer.losses[0]) == pytest.approx(float(np.sum(array(wanted))) / 7, rel=1e-5)


@pytest.mark.contract
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("prior", [Distribution("Laplace", loc=0.0, scale=0.3), MIXTURE], ids=lambda one: one.family)
def test_divergences_without_a_closed_form_are_estimated(estimator, prior):
    layer = BayesianDense(3, num_data=2, estimator=estimator, prior=prior, posterior=NORMAL, seed=2)
    layer.build((None, 2))
    known = probability.library().distributions
    mean, scale = array(layer.mean), 0.1
    # By the mean over 200,000 draws of NumPy's.
    draws = mean + scale * np.random.default_rng(1).normal(size=(200_000, 2, 3)).astype("float32")
    left = known.Normal(mean, np.float32(scale)).log_prob(draws)
    each = array(left - prior.made({}, (2, 3)).log_prob(draws)).sum(axis=(1, 2))
    weights = [one.value for one in layer.trainable_variables], [one.value for one in layer.non_trainable_variables]

    @compiled
    def loss(state):
        return layer.stateless_call(weights[0], [state], np.ones((1, 2), "float32"), return_losses=True)[2][0]

    found = [float(loss(ops.convert_to_tensor([number, 0], weights[1][0].dtype))) * 2 for number in range(300)]
    assert abs(np.mean(found) - each.mean()) < 3.5 * each.std() / np.sqrt(300)
    assert np.std(found) == pytest.approx(each.std(), rel=0.2)


@pytest.mark.contract
def test_the_divergence_counts_once():
    inputs = keras.Input((4,))
    shared = BayesianDense(4, num_data=10, name="shared")
    model = keras.Model(inputs, keras.Sequential([keras.Input((4,)), shared])(shared(shared(inputs))))
    x = np.ones((3, 4), "float32")
    model(x)
    wanted = float(divergence(shared.posterior, shared.prior, shared._kernel_posterior, {}, None)) / 10
    assert [float(one) for one in model.losses] == pytest.approx([wanted])
    model(x, training=True)
    assert [float(one) for one in model.losses] == pytest.approx([wanted])
    *_, losses = model.stateless_call(
        model.trainable_variables, model.non_trainable_variables, x, training=True, return_losses=True
    )
    assert [float(one) for one in losses] == pytest.approx([wanted])
    model.compile("sgd", "mse")
    assert model.evaluate(x, array(shared.deploy()(x)), verbose=0) > wanted


@pytest.mark.contract
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_mixed_precision_keeps_the_divergence_in_float32(estimator):
    layer = BayesianDense(200, num_data=3, estimator=estimator, dtype="mixed_float16")
    outputs = layer(np.full((2, 300), 300.0, "float32"))
    assert keras.backend.standardize_dtype(outputs.dtype) == "float16"
    assert np.isfinite(array(outputs)).all()
    wanted = float(divergence(layer.posterior, layer.prior, layer._kernel_posterior, {}, None)) / 3
    assert keras.backend.standardize_dtype(layer.losses[0].dtype) == "float32"
    assert float(layer.losses[0]) == pytest.approx(wanted, rel=1e-6)
    assert wanted > 65504 / 3  # beyond float16


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_inputs_of_zero_have_gradients(estimator):
    import tensorflow as tf

    layer = BayesianDense(3, num_data=10, estimator=estimator)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(tf.zeros((2, 4)))) + layer.losses[0]
    gradients = tape.gradient(loss, [one.value for one in layer.trainable_variables])
    assert all(np.isfinite(one).all() for one in gradients)


def test_mean_field_of_linear_regression_is_exact():
    """Means are the posterior's, and variances the inverses of its precision's diagonal."""
    x = RNG.normal(size=(500, 3)) @ np.array([[1.0, 0.4, 0.0], [0.0, 1.0, 0.3], [0.0, 0.0, 1.0]])
    noise = 0.5
    y = x @ [[1.0], [-0.5], [0.3]] + noise * RNG.normal(size=(500, 1))
    precision = x.T @ x / noise**2 + np.eye(3)
    layer = BayesianDense(1, use_bias=False, num_data=500, estimator="local_reparameterization", seed=0)
    model = keras.Sequential([keras.Input((3,)), layer])
    steps = 1000
    rate = keras.optimizers.schedules.CosineDecay(0.03, steps)
    model.compile(keras.optimizers.Adam(rate), lambda y, p: ops.mean(ops.square(y - p)) / (2 * noise**2))
    model.fit(
        np.tile(x, (steps, 1, 1)).reshape(-1, 3), np.tile(y, (steps, 1)), batch_size=500, shuffle=False, verbose=0
    )
    scale = np.log1p(np.exp(array(layer._kernel_posterior["scale"])))
    assert array(layer.mean)[:, 0] == pytest.approx(np.linalg.solve(precision, x.T @ y)[:, 0] / noise**2, abs=0.004)
    assert scale[:, 0] == pytest.approx(1 / np.sqrt(np.diag(precision)), rel=0.05)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_data": 0}, "num_data"),
        ({"num_data": 1, "lora_rank": 2}, "lora_rank"),
        ({"num_data": 1, "kernel_regularizer": "l2"}, "second prior"),
        ({"num_data": 1, "posterior": Distribution("Normal", loc=0.0, scale=1.0)}, "needs one"),
        ({"num_data": 1, "prior": NORMAL}, "initial value"),
        ({"num_data": 1, "estimator": "flipout", "posterior": FAMILIES["laplace"][0]}, "independent Gaussians"),
    ],
)
def test_what_is_refused(options, words):
    with pytest.raises(WrongArgument, match=words):
        BayesianDense(3, **options)


def test_names_of_distributions_are_those_of_tensorflow_probability():
    with pytest.raises(UnknownName, match="Did you mean 'Laplace'"):
        BayesianDense(3, num_data=1, posterior=Distribution("Laplacian", loc=Parameter(), scale=Parameter(1.0)))(
            np.ones((1, 2))
        )
    with pytest.raises(WrongArgument, match="Laplace"):
        BayesianDense(3, num_data=1, prior=Distribution("Laplace", locus=1.0))(np.ones((1, 2)))
    with pytest.raises(WrongArgument, match="number"):
        Distribution("Normal", loc="zero")
    with pytest.raises(WrongArgument, match="above 0"):
        BayesianDense(3, num_data=1, posterior=Distribution("Normal", loc=Parameter(), scale=Parameter(0.0)))(
            np.ones((1, 2))
        )


def test_a_posterior_must_have_a_gradient():
    posterior = Distribution("Poisson", rate=Parameter())
    with pytest.raises(WrongArgument, match="gradient"):
        BayesianDense(3, num_data=1, posterior=posterior)(np.ones((1, 2)))


# Twins


def network(dropout=0.3):
    inputs = keras.Input((6, 6, 2), name="image")
    shared = layers.Conv2D(2, 3, padding="same", activation="relu", name="shared")
    x = layers.BatchNormalization(name="norm")(shared(shared(inputs)))
    x = layers.SpatialDropout2D(dropout, name="drop")(x) if dropout else x
    inner = keras.Sequential([keras.Input((72,)), layers.Dense(5, kernel_regularizer="l2", name="out")], name="inner")
    model = keras.Model(inputs, inner(layers.Flatten(name="flat")(x)), name="net")
    for variable in model.variables:
        if "moving" in variable.path or "bias" in variable.path:
            variable.assign(np.random.default_rng(3).uniform(0.5, 1.5, variable.shape))
    return model


IMAGES = np.random.default_rng(4).normal(size=(4, 6, 6, 2)).astype("float32")


@pytest.mark.contract
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_twin_is_the_network_but_for_its_draws(estimator, tmp_path):
    model = network()
    twin = bayesianize(model, num_data=50, estimator=estimator, bias_posterior=NORMAL)
    assert [layer.name for layer in twin.layers] == [layer.name for layer in model.layers]
    assert type(twin.get_layer("norm")) is layers.BatchNormalization
    assert array(deploy(twin)(IMAGES)) == pytest.approx(array(model(IMAGES)), abs=1e-5)
    assert not np.allclose(array(twin(IMAGES)), array(model(IMAGES)), atol=1e-3)
    assert len(twin.losses) == 2  # the shared layer's once; no regularizer
    for layer in (twin.get_layer("shared"), twin.get_layer("inner").get_layer("out")):
        set_scales(layer, np.full(layer.mean.shape, 1e-20))
        layer._bias_posterior["scale"].assign(np.full(layer.bias.shape, -50.0))
    assert array(twin(IMAGES)) == pytest.approx(array(model(IMAGES)), abs=1e-5)
    twin.save(tmp_path / "twin.keras")
    again = keras.saving.load_model(tmp_path / "twin.keras")
    assert array(again(IMAGES)) == pytest.approx(array(model(IMAGES)), abs=1e-5)
    copied = keras.models.clone_model(twin)
    copied.set_weights(twin.get_weights())
    assert array(copied(IMAGES)) == pytest.approx(array(model(IMAGES)), abs=1e-5)


@pytest.mark.contract
def test_moped_begins_around_the_weights():
    model = network()
    twin = bayesianize(model, num_data=50, moped=0.1, prior=Distribution("Normal", loc=5.0, scale=0.5))
    layer = twin.get_layer("shared")
    kernel = array(model.get_layer("shared").kernel)
    values = layer.posterior.values(layer._kernel_posterior, kernel.shape)
    assert array(values["loc"]) == pytest.approx(kernel)
    assert array(values["scale"]) == pytest.approx(0.1 * np.abs(kernel), rel=1e-3, abs=2e-5)
    centre = layer.prior.values(layer._kernel_prior, kernel.shape)
    assert array(centre["loc"]) == pytest.approx(kernel)
    assert array(centre["scale"]) == pytest.approx(0.5)
    assert [one.path for one in layer.trainable_variables if "prior" in one.path] == []


def test_which_layers_become_bayesian():
    twin = bayesianize(network(), num_data=50, which=lambda layer: layer.name == "out")
    assert type(twin.get_layer("shared")) is layers.Conv2D
    assert type(twin.get_layer("inner").get_layer("out")) is BayesianDense
    with pytest.raises(WrongArgument, match="no layer"):
        bayesianize(network(), num_data=50, which=lambda layer: False)
    with pytest.raises(WrongArgument, match="Gaussian"):
        bayesianize(network(), num_data=50, moped=0.1, prior=Distribution("Laplace", loc=0.0, scale=1.0))
    for wrong in ({"moped": -1.0}, {"moped": 0.1, "posterior": FAMILIES["normal-one-scale"][0]}):
        with pytest.raises(WrongArgument, match="MOPED"):
            bayesianize(network(), num_data=50, **wrong)


@pytest.mark.contract
def test_draws_are_stock_networks_around_the_mean(tmp_path):
    twin = with_dropout(bayesianize(network(), num_data=50, estimator="flipout"), 0.5)
    first, again, other = (drawn(twin, seed) for seed in (1, 1, 2))
    assert {type(layer).__module__.split(".")[0] for layer in first._flatten_layers()} == {"keras"}
    outputs = [array(one(IMAGES)) for one in (first, again, other)]
    assert (outputs[0] == outputs[1]).all()
    assert not np.allclose(outputs[0], outputs[2], atol=1e-3)
    assert (array(first(IMAGES)) == outputs[0]).all()
    assert first.losses == []
    first.save(tmp_path / "draw.keras")
    assert array(keras.saving.load_model(tmp_path / "draw.keras")(IMAGES)) == pytest.approx(outputs[0], abs=1e-6)
    # Weights of draws spread as the posterior says.
    layer = twin.get_layer("shared")
    kernels = np.stack([array(layer.drawn(seed).kernel) for seed in range(50)])
    assert kernels.std(axis=0) == pytest.approx(0.02, rel=0.5)
    assert kernels.std(axis=0).mean() == pytest.approx(0.02, rel=0.1)
    with pytest.raises(WrongArgument, match="no layer that draws"):
        drawn(network(), 1)


# Dropout


@pytest.mark.contract
def test_dropout_is_on_at_inference_and_the_rest_is_not():
    model = network()
    on = with_dropout(model)
    assert type(on.get_layer("drop")) is MCDropout
    outputs = np.stack([array(on(IMAGES, training=False)) for _ in range(100)])
    assert outputs.std(axis=0).min() > 1e-3
    before = [array(one) for one in on.get_layer("norm").non_trainable_variables]
    assert all(
        (array(one) == old).all() for one, old in zip(on.get_layer("norm").non_trainable_variables, before, strict=True)
    )
    assert array(deploy(on)(IMAGES)) == pytest.approx(array(model(IMAGES)), abs=1e-5)
    spread = outputs.std(axis=0)
    assert np.abs(outputs.mean(axis=0) - array(model(IMAGES))).max() < 6 * spread.max() / np.sqrt(100)
    # A channel is dropped at all places or at none.
    dropped = array(on.get_layer("drop")(np.ones((5, 6, 6, 2), "float32")))
    assert (dropped == dropped[:, :1, :1]).all()
    assert set(np.unique(dropped.round(4))) <= {0.0, np.float32(np.round(1 / 0.7, 4))}


def test_dropout_is_given_to_a_model_without():
    model = network(dropout=0.0)
    with pytest.raises(WrongArgument, match="no dropout"):
        with_dropout(model)
    on = with_dropout(model, 0.25)
    assert [layer.rate for layer in on.layers if isinstance(layer, MCDropout)] == [0.25]
    assert array(deploy(on)(IMAGES)) == pytest.approx(array(model(IMAGES)), abs=1e-5)
    assert not np.allclose(array(on(IMAGES)), array(on(IMAGES)))
    assert with_dropout(network(), 0.1).get_layer("drop").rate == 0.1
    with pytest.raises(WrongArgument, match="rate"):
        with_dropout(model, 1.0)


def test_a_mask_needs_sizes():
    inputs = keras.Input((None, 3))
    model = keras.Model(inputs, MCDropout(0.5)(inputs))
    with pytest.raises(WrongArgument, match="known sizes"):
        drawn(model, 0)


# Gaussian process


def process(**options):
    layer = RandomFeatureGaussianProcess(1, 8192, length_scale=1.5, likelihood="gaussian", seed=1, **options)
    layer.build((None, 2))
    return layer


@pytest.mark.contract
def test_random_features_near_the_exact_process():
    x, others = RNG.normal(size=(50, 2)), RNG.uniform(-3, 3, size=(40, 2))
    y, noise = np.sin(x[:, :1]) + x[:, 1:], 0.1
    layer = process(noise_variance=noise, mean_field_factor=0.0)

    def covariance(a, b):
        return np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * 1.5**2))

    inverse = np.linalg.inv(covariance(x, x) + noise * np.eye(50))
    wanted = covariance(others, x) @ inverse @ y
    variance = 1 - (covariance(others, x) @ inverse * covariance(others, x)).sum(1)
    features = array(layer.features(x)).astype(np.float64)
    # The kernel's own posterior mean, which training would find.
    layer.kernel.assign(features.T @ np.linalg.solve(features @ features.T + noise * np.eye(50), y))
    layer(x[:30], training=True)
    layer(x[30:], training=True)
    assert array(layer(others)) == pytest.approx(wanted, abs=0.1)
    small = RandomFeatureGaussianProcess(1, 512, length_scale=1.5, likelihood="gaussian", noise_variance=noise, seed=1)
    small.build((None, 2))
    small(x, training=True)
    assert array(small.variance(others))[:, 0] == pytest.approx(variance, abs=0.12)


@pytest.mark.contract
def test_precision_is_of_the_last_epoch():
    layer = RandomFeatureGaussianProcess(3, 16, seed=0)
    model = keras.Sequential([keras.Input((2,)), layer])
    x, y = RNG.normal(size=(64, 2)).astype("float32"), RNG.integers(0, 3, 64)
    model.compile(keras.optimizers.SGD(0.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, epochs=3, batch_size=16, verbose=0, callbacks=[PrecisionReset()])
    features = array(layer.features(x))
    chances = array(ops.softmax(features @ array(layer.kernel)))
    weights = (chances * (1 - chances)).max(axis=1)
    wanted = (features.T * weights) @ features
    assert array(layer.information) == pytest.approx(wanted, abs=1e-3)
    model.fit(x, y, batch_size=16, verbose=0)
    assert array(layer.information) == pytest.approx(2 * wanted, abs=2e-3)
    variance = (features @ np.linalg.inv(2 * wanted + np.eye(16)) * features).sum(axis=1)
    logits = features @ array(layer.kernel) / np.sqrt(1 + np.pi / 8 * variance[:, None])
    assert array(model(x)) == pytest.approx(logits, abs=1e-4)
    layer.reset_precision()
    assert not array(layer.information).any()


@pytest.mark.parametrize("wrong", [{"ridge": 0.0}, {"likelihood": "poisson"}, {"mean_field_factor": -1.0}])
def test_what_a_process_refuses(wrong):
    with pytest.raises(WrongArgument):
        RandomFeatureGaussianProcess(3, **wrong)
    with pytest.raises(WrongArgument, match="batch, features"):
        RandomFeatureGaussianProcess(3)(np.zeros((2, 3, 4)))


# Ensembles that share a kernel


@pytest.mark.contract
def test_a_shared_kernel_is_the_loop_over_its_members():
    inputs = keras.Input((8, 6, 4))
    x = BatchEnsembleConv2D(6, 3, groups=2, strides=2, activation="relu", members=3)(inputs)
    x = layers.Reshape((6, 6))(x)
    x = BatchEnsembleConv1D(4, 3, padding="causal", use_bias=False, members=3)(x)
    model = keras.Model(inputs, BatchEnsembleDense(5, members=3)(layers.Flatten()(x)))
    for variable in model.trainable_variables:
        variable.assign(RNG.normal(size=variable.shape))
    x = RNG.normal(size=(4, 8, 6, 4)).astype("float32")
    together = array(model(np.repeat(x, 3, axis=0))).reshape(4, 3, 5)
    for index in range(3):
        alone = member(model, index)
        assert {type(layer).__module__.split(".")[0] for layer in alone.layers} == {"keras"}
        assert together[:, index] == pytest.approx(array(alone(x)), rel=1e-4, abs=1e-3)
    assert array(deploy(model)(x)) == pytest.approx(array(model(x)), rel=1e-4, abs=1e-3)
    assert not np.allclose(together[:, 0], together[:, 1])
    with pytest.raises(WrongArgument, match="3 members"):
        member(model, 3)
    with pytest.raises(WrongArgument, match="0 members"):
        member(network(), 0)


@pytest.mark.contract
def test_factors_may_be_distributions():
    layer = BatchEnsembleDense(5, members=2, posterior=NORMAL, num_data=10, seed=0)
    x = np.repeat(RNG.normal(size=(1, 4)).astype("float32"), 4000, axis=0)
    outputs = array(layer(x))
    factors = [array(layer._factors[name]["loc"]) for name in ("input", "output")]
    wanted = sum((0.1**2 + one**2 - 1) / 2 - np.log(0.1) for one in np.concatenate(factors, axis=1).ravel() - 1)
    # The data's loss is a mean over members.
    assert float(layer.losses[0]) == pytest.approx(wanted / 2 / 10, rel=1e-4)
    one = outputs[::2]
    kernel = array(layer.kernel)
    mean = x[:1] * factors[0][0] @ kernel * factors[1][0]
    spread = np.sqrt((x[:1] ** 2 * 0.01) @ kernel**2 * 1.01 + 0.01 * (x[:1] * factors[0][0] @ kernel) ** 2)
    assert one.std(axis=0) == pytest.approx(spread[0], rel=0.1)
    assert np.abs(one.mean(axis=0) - mean[0]).max() < 5 * spread.max() / np.sqrt(2000)
    for wrong in ({"members": 0}, {"posterior": NORMAL}, {"posterior": FAMILIES["laplace"][0], "num_data": 1}):
        with pytest.raises(WrongArgument):
            BatchEnsembleDense(5, **wrong)


def test_flipout_turns_the_signs_of_inputs_and_of_outputs():
    """One draw for all examples: alike but for its signs, which are each example's and unit's own."""
    seed = keras.random.SeedGenerator(3)
    one = ops.convert_to_numpy(flipout(ops.matmul, ops.ones((2, 1)), ops.zeros((1, 200)), 1.0, 0, -1, seed))
    assert np.allclose(np.abs(one[0]), np.abs(one[1]))
    assert 60 < (one[0] * one[1] > 0).sum() < 140  # with signs of inputs alone: none, or all
    many = ops.convert_to_numpy(flipout(ops.matmul, ops.ones((200, 2)), ops.zeros((2, 1)), 1.0, 0, -1, seed))
    assert len(np.unique(np.abs(many).round(5))) == 2  # |ξ₁ + ξ₂| and |ξ₁ − ξ₂|: with signs of outputs alone, one
