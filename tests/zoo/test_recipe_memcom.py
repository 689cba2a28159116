"""The recipe that makes the recommender: a smoke run on data that it makes, up to a zoo that can be loaded."""

import numpy as np
import pytest

from keras_efficient import layers, zoo
from keras_efficient.zoo.golden import compare_with_golden
from keras_efficient.zoo.recipes import memcom as recipe

ITEMS = 4000


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Users with runs of neighbouring items; the last item is the most frequent one."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    lists = {"train": [], "test": []}
    for user in range(300):
        items = (random.integers(ITEMS) + np.arange(15)) % (ITEMS - 1)
        lists["train"].append([user, ITEMS - 1, *items[:12]])
        lists["test"].append([user, *items[12:]])
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(" ".join(map(str, line)) for line in lines))
    return folder


@pytest.fixture(scope="module")
def published(data, tmp_path_factory):
    """A zoo of the one model, the whole table's model, and the two parts of the data."""
    folder = tmp_path_factory.mktemp("published")
    for name in ("cards", "weights"):
        (folder / "zoo" / name).mkdir(parents=True)
    train, test = recipe.read(data)
    whole = recipe.train_whole(train, folder / "run", epochs=2)
    recipe.publish(whole, train, test, folder / "zoo")
    return folder, whole, train, test


def test_the_most_frequent_item_comes_first(data):
    train, test = recipe.read(data)
    assert train.num_items == test.num_items == ITEMS
    assert train.counts()[0] == 300
    assert (np.diff(train.counts()) <= 0).all()


def test_the_published_model_is_the_compressed_one(published):
    folder, whole, train, test = published
    model = zoo.load(recipe.NAME, folder=folder / "zoo")
    table = model.get_layer("embedding")
    assert isinstance(table, layers.MEmComEmbedding)
    assert table.frozen
    assert table.compression_ratio >= recipe.EMBEDDING["compression"]
    kernel = np.asarray(whole.get_layer("logits").kernel)
    np.testing.assert_array_equal(model.get_layer("logits").kernel, kernel.astype("float16"))
    card = zoo.card(recipe.NAME, folder=folder / "zoo")
    assert compare_with_golden(model, folder / "zoo" / "weights" / card.golden) <= 1e-5
    found = recipe.measure(model, train, test)
    assert [(m.name, m.value) for m in card.metrics] == [
        ("nDCG@20", round(found.ndcg, 4)),
        ("Recall@20", round(found.recall, 4)),
    ]
    assert {export.target: export.error < 1e-4 for export in card.exports} == {"tflite": True, "onnx": True}


def test_golden_inputs_hold_every_kind_of_id():
    ids = recipe.histories(ITEMS)
    assert {0, 1, ITEMS} <= set(ids.ravel().tolist())
    assert ids.min() == 0
    assert ids.max() == ITEMS


def test_a_finished_training_is_not_trained_again(published):
    folder, whole, train, _ = published
    again = recipe.train_whole(train, folder / "run", epochs=2)
    for one, two in zip(whole.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_the_table_comes_near_to_the_whole_one(published):
    _, whole, train, _ = published
    matrix = whole.get_layer("embedding").embeddings()
    near = recipe.compressed(whole, train).get_layer("embedding").embeddings()
    counts = np.append(0, train.counts())[:, None]
    assert (counts * np.square(near - matrix)).sum() < 0.5 * (counts * np.square(matrix)).sum()
