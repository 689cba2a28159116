"""A posterior in a file gives what `predict` gives."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from keras_efficient import export
from keras_efficient.bayes import Members, StackedPosterior
from keras_efficient.bayes.exporting import export_posterior
from keras_efficient.errors import UnknownName, WrongArgument

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
    assert not path.exists()
