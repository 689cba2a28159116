"""Softmaxes at the end of an int8 file, in 16 bits where that is asked for."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from keras_efficient import export
from keras_efficient.errors import WrongArgument

X = np.random.default_rng(0).normal(size=(60, 6)).astype("float32")


def network(inside=False):
    """Sure of itself; with `inside`, its probabilities are not the end."""
    keras.utils.set_random_seed(2)
    inputs = keras.Input((6,))
    p = layers.Softmax(name="p")(layers.Dense(5, name="logits")(inputs) * 8.0)
    return keras.Model(inputs, layers.Dense(3, name="more")(p) if inside else p)


def saved(model, path, **options):
    report = export.save(model, path, precision="int8", calibration=X, **options)
    run = export.load(path)
    return report, np.concatenate([run(row[None]) for row in X])


def test_small_probabilities_are_kept(tmp_path):
    model = network()
    expected = np.asarray(model(X))
    narrow, found = saved(model, tmp_path / "narrow.tflite")
    wide, better = saved(model, tmp_path / "wide.tflite", wide_probabilities=True)
    assert (narrow.ops["SOFTMAX"], wide.ops["SOFTMAX"]) == ({"int8": 1}, {"int16": 1})
    small = (expected < 1 / 1024) & (expected > 1 / 8192)
    assert small.any()
    assert (found[small] == 0).all()
    assert (better[small] > 0).all()
    assert any("16 bits" in note for note in wide.notes)


def test_other_ends_stay_and_are_told(tmp_path):
    report, _ = saved(network(inside=True), tmp_path / "m.tflite", wide_probabilities=True)
    assert report.ops["SOFTMAX"] == {"int8": 1}
    assert any("No output is a softmax" in note for note in report.notes)
    with pytest.raises(WrongArgument):
        saved(network(), tmp_path / "n.tflite", wide_probabilities="yes")
