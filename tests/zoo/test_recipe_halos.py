"""The recipe that makes the recommender of candidates: a smoke run on data that it makes, up to a zoo with it."""

import gzip

import numpy as np
import pytest

from keras_efficient import zoo
from keras_efficient.deploy import deploy
from keras_efficient.zoo.golden import compare_with_golden
from keras_efficient.zoo.recipes import halos as recipe

ITEMS = 3000


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Users with runs of neighbouring items, in order."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    lines = []
    for user in range(1, 401):
        items = (random.integers(ITEMS) + np.arange(12)) % ITEMS + 1
        lines += [f"{user} " + " ".join(map(str, items))]
    (folder / "sequences.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return folder


@pytest.fixture(scope="module")
def published(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    for name in ("cards", "weights"):
        (folder / "zoo" / name).mkdir(parents=True)
    known, test = recipe.read(data)
    whole = recipe.train(known, folder / "run", epochs=2)
    recipe.publish(whole, known, test, folder / "zoo")
    return folder / "zoo", whole, known, test


def test_the_last_item_is_not_trained_on(data):
    known, test = recipe.read(data)
    assert len(known) == 400 * 11
    assert len(test) == 400


def test_what_is_published_is_loaded_again(published):
    folder, whole, known, test = published
    model, card = zoo.load(recipe.NAME, folder=folder), zoo.card(recipe.NAME, folder=folder)
    layer = model.get_layer("logits")
    assert layer.plan.neurons <= recipe.BUDGET * ITEMS
    kernel = np.asarray(whole.get_layer("logits").kernel)
    np.testing.assert_array_equal(layer.kernel, kernel.astype("float16"))
    for form in (model, deploy(model)):
        assert compare_with_golden(form, folder / "weights" / card.golden) <= 1e-5
    found = recipe.measure(model, known, test)
    assert [(m.name, m.value) for m in card.metrics] == [
        ("nDCG@20", round(found.ndcg, 4)),
        ("Recall@20", round(found.recall, 4)),
    ]
    assert {export.target: export.error < 1e-4 for export in card.exports} == {"tflite": True, "onnx": True}


def test_answers_are_the_best_candidates(published):
    folder, *_ = published
    model = zoo.load(recipe.NAME, folder=folder)
    ids = np.array([[1, 2, 3, 0], [7, 0, 0, 0]], np.int32)
    logits = np.asarray(model.predict_on_batch(ids))
    scores, classes = deploy(model).predict_on_batch(ids)
    np.testing.assert_allclose(scores, np.take_along_axis(logits, classes, axis=1), rtol=1e-4, atol=1e-4)
