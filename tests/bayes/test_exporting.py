"""A posterior in a file gives what `predict` gives."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from keras_efficient import export
from keras_efficient.bayes import Members, StackedPosterior, StochasticPosterior
from keras_efficient.bayes.exporting import draw_noise, export_posterior
from keras_efficient.bayes.noise import spreads
from keras_efficient.errors import ConversionError, UnknownName, UnsupportedLayer, WrongArgument

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 12)).astype("float32")


def network():
    inputs = keras.Input((12,), name="features")
    x = layers.Dense(16, activation="relu")(inputs)
    return keras.Model(inputs, layers.Dense(4)(x), name="small")


def image_network():
    inputs = keras.Input((8, 8, 2))
    x = layers.Conv2D(4, 3, use_bias=False)(inputs)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    return keras.Model(inputs, layers.Dense(5)(layers.Flatten()(x)))


def far(model_fn=network, count=3, gain=3.0):
    """Members of their own, sure enough of their classes."""
    members = Members.new(model_fn, count, seed=1)
    for variable in members.trainable:
        variable.assign(variable.value * gain)
    return StackedPosterior(members)


def near(model_fn=network, count=20, spread=0.1):
    """Draws around one set of weights."""
    one = Members.new(model_fn, 1, seed=1)
    random = np.random.default_rng(3)

    def drawn(variable):
        value = np.asarray(variable.value)[0]
        return value + spread * random.normal(size=(count, *value.shape))

    others = [np.repeat(np.asarray(variable.value), count, axis=0) for variable in one.non_trainable]
    return StackedPosterior(Members(one.model, [drawn(variable) for variable in one.trainable], others))


@pytest.mark.parametrize("suffix", [".tflite", ".onnx"])
@pytest.mark.parametrize("model_fn", [network, image_network])
def test_ensemble_gives_the_mean_of_predictions(tmp_path, suffix, model_fn):
    posterior = far(model_fn)
    path = tmp_path / f"m{suffix}"
    export_posterior(posterior, path, mode="ensemble", members=2)
    run = export.load(path)
    x = RNG.normal(size=(5, *posterior.model.input_shape[1:])).astype("float32")
    np.testing.assert_allclose(run(x), posterior.predict(x, members=2, reduce="mean"), atol=1e-5)
    assert run.metadata["posterior"] == {"mode": "ensemble", "kind": "stacked", "members": 2}


def test_members_are_averaged_behind_the_softmax(tmp_path):
    posterior = far()
    export_posterior(posterior, tmp_path / "m.tflite")
    logits = posterior.logits(X).mean(axis=0)
    of_logits = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    assert abs(export.load(tmp_path / "m.tflite")(X) - of_logits).max() > 0.05


def test_int8_ensemble_keeps_small_probabilities(tmp_path):
    posterior = far(gain=4.0)
    report = export_posterior(posterior, tmp_path / "m.tflite", precision="int8", calibration=X)
    run = export.load(tmp_path / "m.tflite")
    found, expected = (np.concatenate([run(row[None]) for row in X]), posterior.predict(X, reduce="mean"))
    assert run.output_step("probabilities") == 1 / 32768
    assert report.ops["SOFTMAX"] == {"int16": 3}
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-3)
    best = expected.argmax(axis=1)[:, None]
    losses = [-np.log(np.take_along_axis(one, best, 1)).mean() for one in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize("mode", ["ensemble", "mean"])
def test_all_of_it_runs_on_an_npu(tmp_path, mode):
    posterior = near(count=3)
    how = {"target": "ethos-u55-128", "precision": "int8", "calibration": X}
    report = export_posterior(posterior, tmp_path / "m.tflite", mode=mode, **how)
    assert report.npu["cpu_ops"] == 0


def test_mean_is_the_network_at_the_mean_of_weights(tmp_path):
    posterior = near()
    before = [np.array(weight) for weight in posterior.model.get_weights()]
    export_posterior(posterior, tmp_path / "m.tflite", mode="mean")
    for weight, kept in zip(posterior.model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, kept)
    mean = [values.mean(axis=0, keepdims=True) for values in posterior.arrays()["trainable"]]
    expected = StackedPosterior(Members(posterior.model, mean)).predict(X, reduce="mean")
    np.testing.assert_allclose(export.load(tmp_path / "m.tflite")(X), expected, atol=1e-5)


@keras.saving.register_keras_serializable(package="tests")
class Gaussian(layers.Dense):
    """Draws its kernel, and says what a draw is."""

    def build(self, input_shape):
        super().build(input_shape)
        self.seeds = keras.random.SeedGenerator(5)

    def weights_of(self, seed):
        noise = keras.random.normal(self.kernel.shape, seed=seed)
        return keras.ops.convert_to_tensor(self.kernel) + 0.2 * noise

    def call(self, inputs, training=None):
        return self.activation(keras.ops.matmul(inputs, self.weights_of(self.seeds)) + self.bias)

    def deploy(self):
        return self._with(self.kernel)

    def drawn(self, seed):
        return self._with(self.weights_of(keras.random.SeedGenerator(seed)))

    def _with(self, kernel):
        layer = layers.Dense.from_config(self.get_config())
        layer.build(self.get_build_config()["input_shape"])
        layer.set_weights([keras.ops.convert_to_numpy(one) for one in (kernel, self.bias)])
        return layer


@keras.saving.register_keras_serializable(package="tests")
class AlwaysDropout(layers.Dropout):
    def call(self, inputs, training=None):
        return super().call(inputs, training=True)

    def deploy(self):
        return layers.Dropout.from_config(self.get_config())


def drawing(drop=False):
    keras.utils.set_random_seed(4)
    inputs = keras.Input((12,))
    x = Gaussian(16, activation="relu", name="hidden")(inputs)
    if drop:
        x = AlwaysDropout(0.3)(x)
    return StochasticPosterior(keras.Model(inputs, Gaussian(4, name="last")(x)), 4)


def expected_of(posterior, x):
    """Mean of many draws."""
    many = StochasticPosterior(posterior.model, 1000) if posterior.kind == "stochastic" else posterior
    return many.predict(x, reduce="mean")


def seeds_in(path):
    import onnx

    nodes = [node for node in onnx.load(path).graph.node if node.op_type.startswith("Random")]
    return [one.name for node in nodes for one in node.attribute if one.name == "seed"]


def mean_of_runs(run, x, count=60):
    """Each row as often in a run, in runs of their own."""
    return np.mean([run(np.repeat(x, 20, axis=0)).reshape(len(x), 20, -1).mean(axis=1) for _ in range(count)], axis=0)


@pytest.mark.parametrize("suffix", [".tflite", ".onnx"])
@pytest.mark.parametrize("kind", ["members", "layers", "dropout"])
def test_sample_draws_at_every_run(tmp_path, suffix, kind):
    posterior = far() if kind == "members" else drawing(kind == "dropout")
    keras.utils.set_random_seed(1)  # must not be the file's seed
    path = tmp_path / f"m{suffix}"
    report = export_posterior(posterior, path, mode="sample")
    assert sum(sum(types.values()) for name, types in report.ops.items() if "random" in name.lower()) == 1
    run, other = export.load(path), export.load(path)
    answers = [run(X[:2]) for _ in range(20)]
    assert len({one.tobytes() for one in answers}) > 1
    if suffix == ".tflite":
        assert [one.tobytes() for one in answers] != [other(X[:2]).tobytes() for _ in range(20)]
    else:  # sessions of one process share a seed that the clock gave
        assert seeds_in(path) == []
    rows = run(np.repeat(X[:1], 30, axis=0))
    if kind == "members":
        assert len({row.tobytes() for row in answers}) <= 3
        assert abs(rows - rows[0]).max() < 1e-6
        each = posterior.predict(X[:2])
        assert all(min(abs(each - one).max(axis=(1, 2))) < 1e-5 for one in answers)
        assert "one member" in run.metadata["posterior"]["drawn"]
    else:
        assert abs(rows - rows[0]).max() > 0.01
        assert "each row" in run.metadata["posterior"]["drawn"]
    expected = expected_of(posterior, X[:4])
    runs = 8000 if kind == "members" else 200
    np.testing.assert_allclose(mean_of_runs(run, X[:4], runs), expected, atol=0.03)


def test_spreads_are_standard_deviations_of_weights():
    posterior = near(count=5)
    members = posterior.members
    found = spreads(members.network(index) for index in range(5))
    assert found
    by_name = {
        variable.path: stacked
        for variable, stacked in zip(members.model.trainable_variables, members.trainable, strict=True)
    }
    for name, values in found.items():
        layer = members.model.get_layer(name)
        for weight, value in zip(layer.weights, values, strict=True):
            stacked = np.asarray(by_name[weight.path].value)
            assert value == pytest.approx(stacked.std(axis=0, ddof=1), rel=1e-4, abs=1e-7)


def test_noise_is_an_input(tmp_path):
    posterior = near(count=100, spread=0.2)
    export_posterior(posterior, tmp_path / "m.tflite", mode="noise_input")
    run = export.load(tmp_path / "m.tflite")
    random = np.random.default_rng(0)
    x = np.repeat(X[:4], 3000, axis=0)
    found = run([x, draw_noise(run.metadata, len(x), random)]).reshape(4, 3000, -1)
    each = posterior.predict(X[:4])
    np.testing.assert_allclose(found.mean(axis=1), each.mean(axis=0), atol=0.03)
    np.testing.assert_allclose(found.std(axis=1), each.std(axis=0), atol=0.05)


def test_int8_noise_runs_on_an_npu(tmp_path):
    posterior = drawing()
    how = {"precision": "int8", "calibration": X}
    export_posterior(posterior, tmp_path / "m.tflite", mode="noise_input", **how)
    report = export_posterior(posterior, tmp_path / "n.tflite", mode="noise_input", target="ethos-u55-128", **how)
    assert report.npu["cpu_ops"] == 0
    run, random = export.load(tmp_path / "m.tflite"), np.random.default_rng(0)
    each = [run([X[:1], draw_noise(run.metadata, 1, random)])[0] for _ in range(2000)]
    np.testing.assert_allclose(np.mean(each, axis=0), expected_of(posterior, X[:1])[0], atol=0.03)


def test_draws_of_layers_are_those_of_predict(tmp_path):
    posterior = drawing()
    export_posterior(posterior, tmp_path / "m.tflite", mode="ensemble")
    np.testing.assert_allclose(export.load(tmp_path / "m.tflite")(X), posterior.predict(X, reduce="mean"), atol=1e-5)
    with pytest.raises(WrongArgument, match="for each row"):
        export_posterior(drawing(True), tmp_path / "n.tflite", mode="ensemble")


def test_a_file_that_lost_its_chance_is_refused(tmp_path, monkeypatch):
    import tensorflow as tf

    from keras_efficient.bayes import noise

    monkeypatch.setattr(noise, "_uniform", lambda shape: tf.fill(shape, 0.4))
    with pytest.raises(ConversionError, match="0 operators that draw"):
        export_posterior(drawing(), tmp_path / "m.tflite", mode="sample")
    assert not (tmp_path / "m.tflite").exists()


def test_what_cannot_be_is_refused(tmp_path):
    path = tmp_path / "m.tflite"
    with pytest.raises(WrongArgument, match="networks of their own"):
        export_posterior(far(), path, mode="mean")
    with pytest.raises(UnknownName):
        export_posterior(far(), path, mode="means")
    with pytest.raises(WrongArgument, match="1 to 3"):
        export_posterior(far(), path, mode="ensemble", members=4)
    with pytest.raises(WrongArgument, match="of an ensemble"):
        export_posterior(near(), path, mode="mean", members=4)
    for wrong in ({"target": "ethos-u55-128"}, {"precision": "int8"}):
        with pytest.raises(WrongArgument, match="in floats, on a processor"):
            export_posterior(far(), path, mode="sample", calibration=X, **wrong)
    with pytest.raises(WrongArgument, match="nothing to draw"):
        export_posterior(far(), path, mode="sample", members=1)
    with pytest.raises(UnsupportedLayer, match="batch_norm"):
        export_posterior(with_other_scales(), path, mode="noise_input")
    with pytest.raises(WrongArgument, match="no noise"):
        draw_noise({}, 1, RNG)
    assert not path.exists()


def with_other_scales():
    posterior = near(image_network, count=3)
    arrays = posterior.arrays()
    arrays["non_trainable"] = [values * np.array([1, 2, 3]).reshape(3, 1) for values in arrays["non_trainable"]]
    return StackedPosterior(Members(posterior.model, **arrays))
