"""Classifiers that end in a HALOSOutput: what goes in and out, training on sparse points, sampled losses."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from keras_efficient import extreme, models
from keras_efficient.deploy import deploy
from keras_efficient.errors import UnsupportedLayer, WrongArgument

RNG = np.random.default_rng(0)


def test_the_first_layer_is_a_product_with_the_sparse_vector():
    model = models.ExtremeClassifier(20, 30, hidden=8, normalize=False)
    ids = np.array([[3, 7, 0], [20, 0, 0]], "int32")
    weights = np.array([[2.0, -1.0, 5.0], [0.5, 9.0, 9.0]], "float32")
    table = model.get_layer("embedding").embeddings()
    pooled = np.stack([2 * table[3] - table[7], 0.5 * table[20]])
    hidden, logits = model.get_layer("hidden"), model.get_layer("logits")
    want = np.maximum(pooled @ np.asarray(hidden.kernel) + np.asarray(hidden.bias), 0) @ np.asarray(logits.kernel).T
    found = keras.ops.convert_to_numpy(model({"ids": ids, "weights": weights}))
    np.testing.assert_allclose(found, want + np.asarray(logits.bias), atol=1e-6)


def test_sparse_points_are_learned(data_dir):
    file = extreme.SparseFile(data_dir / "xml" / "bibtex" / "train.txt.gz")
    keras.utils.set_random_seed(0)
    model = models.ExtremeClassifier(file.num_features, file.num_labels, hidden=32, output={"k": 5, "bits": 8})
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss)
    model.fit(extreme.SparseBatches(file, label=True, shuffle=True, length=128), epochs=4, verbose=0)
    points = extreme.SparseBatches(file, length=128)
    learned = extreme.learn_index(model, points, budget=0.4, method="cells")
    assert learned.measures.full_precision[1] > 0.5
    assert learned.measures.kept() > 0.9
    logits, classes = deploy(model)(points[0][0])
    assert logits.shape == classes.shape == (256, 5)


def test_the_next_word():
    model = models.NextWord(40, dim=8, units=12, output={"k": 3})
    words = RNG.integers(1, 40, size=(6, 5)).astype("int32")
    assert model(words).shape == (6, 40)
    logits, classes = deploy(model)(words)
    assert logits.shape == (6, 3)
    np.testing.assert_array_equal(classes, np.argsort(-np.asarray(model(words)), axis=1)[:, :3])


def test_a_recommender_with_candidates():
    model = models.SequenceClassifier(41, 40, dim=8, hidden=(8,), output={"k": 3})
    ids = RNG.integers(1, 41, size=(4, 6)).astype("int32")
    assert model(ids).shape == (4, 40)
    assert deploy(model)(ids)[1].shape == (4, 3)


def batch(drawn, targets, weights, expected):
    hits = np.where(targets >= 0, 1.0, 0.0).astype("float32")  # each class is drawn once
    drawn = {"negatives": drawn, "log_expected": np.log(expected), "hits": hits}
    return {**drawn, "targets": targets, "weights": weights}


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_with_all_classes_drawn_losses_are_exact(loss):
    model = models.SequenceClassifier(41, 40, dim=8, hidden=(8,), output={})
    trained = models.SampledSoftmax(model, loss=loss)
    ids = RNG.integers(1, 41, size=(4, 6)).astype("int32")
    targets = np.array([[1, 2], [3, -1], [4, 5], [39, -1]])
    weights = np.array([1.0, 2.0, 1.0, 0.5], "float32")
    x = {"inputs": ids, **batch(np.arange(40), targets, weights, np.ones(40, "float32"))}
    hidden = trained(x)
    found = float(trained.compute_loss(x, None, hidden))
    logits = np.asarray(model(ids), np.float64)
    there, total, mass = targets >= 0, 0.0, 0.0
    for row in range(4):
        labels = targets[row][there[row]]
        mass += weights[row] * len(labels)
        if loss == "softmax":
            normaliser = np.log(np.exp(logits[row]).sum())
            total += weights[row] * sum(normaliser - logits[row, label] for label in labels)
        else:
            wrong = np.setdiff1d(np.arange(40), labels)
            total += weights[row] * np.log1p(np.exp(logits[row, wrong])).sum()
            total += weights[row] * np.log1p(np.exp(-logits[row, labels])).sum()
    assert found == pytest.approx(total / mass, rel=1e-5)


def test_losses_that_are_refused():
    model = models.SequenceClassifier(41, 40, dim=8, output={})
    with pytest.raises(WrongArgument, match='`loss` must be "softmax" or "sigmoid"'):
        models.SampledSoftmax(model, loss="hinge")
    inputs = keras.Input((3,))
    with pytest.raises(UnsupportedLayer, match="must be a HALOSOutput, or an EinsumDense"):
        models.SampledSoftmax(keras.Model(inputs, keras.layers.Dense(3)(inputs)))


def test_options_of_the_output():
    model = models.ExtremeClassifier(30, 40, output={"k": 7, "name": "classes"})
    assert model.get_layer("classes").k == 7
    with pytest.raises(ValueError, match="An output's options are a dict"):
        models.NextWord(30, output=8)
