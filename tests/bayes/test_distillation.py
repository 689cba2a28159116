"""A student says what its teacher's members say on the average, and how unsure they are."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from keras_efficient import export
from keras_efficient.bayes import Data, load_posterior, tasks
from keras_efficient.bayes.exporting import export_posterior
from keras_efficient.bayes.inference import METHODS, DeepEnsemble, Distillation
from keras_efficient.bayes.inference.distillation import distilled_uncertainty
from keras_efficient.errors import UnsupportedLayer, WrongArgument


def network():
    inputs = keras.Input((64,))
    return keras.Model(inputs, layers.Dense(10)(layers.Dense(32, activation="relu")(inputs)))


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = ((x[order] - 8) / 8).astype("float32"), y[order]
    return Data(x[:1300], y[:1300], 10), x[1300:], y[1300:]


@pytest.fixture(scope="module")
def both(digits):
    data, _, _ = digits
    teacher = DeepEnsemble(epochs=10, batch_size=32, members=3).fit(network, data, seed=0)
    method = Distillation(epochs=25, batch_size=32, learning_rate=5e-3, noise_sd=0.2)
    return teacher, method.distil(teacher, network, data, seed=1), method


@pytest.mark.contract
def test_student_follows_the_teacher(digits, both):
    _, x, y = digits
    teacher, student, _ = both
    taught, learned = teacher.predict(x), student.predict(x)
    assert learned.shape == (1, len(x), 10)
    assert tasks.prediction(learned, y)["error"] < tasks.prediction(taught, y)["error"] + 0.02
    assert tasks.prediction(learned, y)["nll"] < tasks.prediction(taught, y)["nll"] + 0.05
    expected, found = tasks.uncertainty(taught), distilled_uncertainty(student, x)
    for kind in ("total", "aleatoric"):
        assert np.corrcoef(expected[kind], found[kind])[0, 1] > 0.8
        assert found[kind].mean() == pytest.approx(expected[kind].mean(), rel=0.35)
    assert (found["epistemic"] >= 0).all()


def test_a_seed_is_a_run(digits, both):
    data, x, _ = digits
    teacher, _, _ = both
    first, again, other = (
        Distillation(epochs=1, batch_size=128).distil(teacher, network, data, seed=seed).logits(x[:20])
        for seed in (1, 1, 2)
    )
    np.testing.assert_allclose(first, again, atol=1e-4)
    assert not np.allclose(first, other, atol=1e-2)


def test_fit_has_a_teacher_of_its_own(digits):
    data, x, _ = digits
    method = METHODS["Distillation"](teacher=DeepEnsemble(epochs=2, members=2), epochs=2)
    assert method.fit(network, data, seed=0).predict(x).shape == (1, len(x), 10)


def test_student_in_files(tmp_path, digits, both):
    data, x, _ = digits
    _, student, _ = both
    student.save(tmp_path / "student.zip")
    again = load_posterior(tmp_path / "student.zip")
    np.testing.assert_allclose(again.predict(x), student.predict(x), atol=1e-6)
    export_posterior(again, tmp_path / "m.tflite", mode="distilled")
    probabilities, entropy = export.load(tmp_path / "m.tflite")(x)
    np.testing.assert_allclose(probabilities, student.predict(x, reduce="mean"), atol=1e-5)
    expected = np.minimum(entropy[:, 0], distilled_uncertainty(student, x)["total"])
    np.testing.assert_allclose(expected, distilled_uncertainty(student, x)["aleatoric"], atol=1e-5)
    how = {"target": "ethos-u55-128", "precision": "int8", "calibration": data.x[:100]}
    assert export_posterior(again, tmp_path / "n.tflite", mode="distilled", **how).npu["cpu_ops"] == 0


def test_what_cannot_be_is_refused(tmp_path, digits, both):
    data, x, _ = digits
    teacher, student, _ = both
    with pytest.raises(WrongArgument, match="1 output"):
        export_posterior(teacher, tmp_path / "m.tflite", mode="distilled")
    with pytest.raises(WrongArgument, match="2 output"):
        export_posterior(student, tmp_path / "m.tflite", mode="mean")
    with pytest.raises(WrongArgument, match="no output for"):
        distilled_uncertainty(teacher, x)
    for wrong in ({"epochs": 0}, {"noise_sd": -1.0}, {"learning_rate": 0.0}, {"noise_sd": float("nan")}):
        with pytest.raises(WrongArgument):
            Distillation(**wrong).distil(teacher, network, data, seed=0)
    inputs = keras.Input((64,))
    sure = keras.Model(inputs, layers.Dense(10, activation="softmax")(inputs))
    with pytest.raises(UnsupportedLayer):
        Distillation(epochs=1).distil(teacher, lambda: sure, data, seed=0)
