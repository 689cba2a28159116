"""Recommenders: deployed, saved and trained in reduced precision; tables that are too small to be compressed."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_efficient import models
from keras_efficient.deploy import deploy
from keras_efficient.layers import CompressedEmbedding, MEmComEmbedding

pytestmark = pytest.mark.contract

RNG = np.random.default_rng(0)
USERS, ITEMS = 300, 400


def integers(high, *shape):
    return RNG.integers(0, high, shape).astype("int32")


CASES = {
    "classifier": (
        lambda: models.SequenceClassifier(ITEMS + 1, ITEMS, dim=8, normalize=True, embedding={"compression": 2}),
        integers(ITEMS, 4, 6),
        (4, ITEMS),
    ),
    "ranker": (
        lambda: models.PointwiseRanker(USERS, ITEMS, dim=8, dropout=0.1, embedding={"compression": 2, "bits": 8}),
        {"user": integers(USERS, 4), "items": integers(ITEMS, 4, 6)},
        (4, 6),
    ),
    "rating": (
        lambda: models.RatingModel(
            USERS,
            ITEMS,
            dim=16,
            user_embedding={"compression": 2},
            item_embedding={"form": "subspace", "compression": 4},
        ),
        {"user": integers(USERS, 4), "item": integers(ITEMS, 4)},
        (4, 1),
    ),
    "dlrm": (
        lambda: models.DLRM([3000, 5], 3, dim=8, embedding={"compression": 4, "bits": 4}),
        {
            "dense": RNG.normal(size=(4, 3)).astype("float32"),
            "categories": np.stack([integers(3000, 4), integers(5, 4)], 1),
        },
        (4, 1),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_deployed_and_read_they_give_the_same(name, tmp_path):
    make, inputs, shape = CASES[name]
    model = make()
    expected = ops.convert_to_numpy(model(inputs))
    assert expected.reshape(shape).shape == shape
    model.save(tmp_path / "m.keras")
    deploy(model).save(tmp_path / "deployed.keras")
    for file in ("m.keras", "deployed.keras"):
        found = keras.saving.load_model(tmp_path / file)(inputs)
        np.testing.assert_allclose(ops.convert_to_numpy(found), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_they_train_in_half_precision(name):
    make, inputs, shape = CASES[name]
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = make()
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile("adam", "mse")
    history = model.fit(inputs, np.ones(shape, "float32"), epochs=2, verbose=0).history["loss"]
    assert np.isfinite(history).all()


def test_ratings_stay_in_their_range():
    make, inputs, _ = CASES["rating"]
    found = ops.convert_to_numpy(make()(inputs))
    assert ((found > 0) & (found < 5)).all()


@pytest.mark.parametrize(
    "options",
    [{"hash_size": 20}, {"own_rows": 20, "hash_size": 8}, {"method": "tensor_train", "size": 8}, {"compression": 16}],
)
def test_small_vocabularies_keep_their_whole_table(options):
    model = models.DLRM([5000, 5], 3, dim=32, embedding=options)
    large, small = (model.get_layer(f"embedding_{index}") for index in range(2))
    assert large.compression_ratio > 2
    assert isinstance(large, CompressedEmbedding if "method" in options else MEmComEmbedding)
    assert (small.method, small.compression_ratio) == ("reduced", 1.0)


def test_a_compression_that_no_vocabulary_allows_is_refused():
    with pytest.raises(ValueError, match="one category at least"):
        models.DLRM([], 3)
    with pytest.raises(ValueError, match="options are a dict"):
        models.PointwiseRanker(1000, 1000, embedding=16)
    with pytest.raises(ValueError, match=r"the largest possible here is 7\.98"):
        models.DLRM([5000, 5], 3, dim=8, embedding={"compression": 16})
