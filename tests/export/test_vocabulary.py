"""Recommenders with their vocabulary in the file: raw ids in, found by a search where Keras has a hash table."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from keras_efficient import export, layers, models
from keras_efficient.errors import KerasEfficientError

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="lookup layers work on TensorFlow only")

RNG = np.random.default_rng(0)


def vocabulary(size: int) -> np.ndarray:
    """Keys in no order, negative ones among them; 0 and 5 are unknown."""
    keys = np.setdiff1d(RNG.integers(-1000, 2**31 - 1, 2 * size), [0, 5])
    return RNG.permutation(keys)[:size]


def recommender(keys: np.ndarray, mask_token: int | None, dtype: str) -> keras.Model:
    raw = keras.Input((6,), dtype=dtype, name="raw")
    ids = keras.layers.IntegerLookup(vocabulary=keys, mask_token=mask_token)(raw)
    options = {"hash_size": 4, "form": "subspace", "bits": 2}
    classifier = models.SequenceClassifier(len(keys) + 2, 30, dim=16, hidden=(8,), embedding=options)
    return keras.Model(raw, classifier(ids))


@pytest.mark.parametrize("suffix", [".tflite", ".onnx"])
@pytest.mark.parametrize(("size", "mask_token", "dtype"), [(1, None, "int32"), (64, 0, "int32"), (77, None, "int64")])
def test_raw_ids_find_their_rows_in_a_file(tmp_path, suffix, size, mask_token, dtype):
    keys = vocabulary(size)
    model = recommender(keys, mask_token, dtype)
    raw = np.concatenate([RNG.choice(keys, 12), [keys.min(), keys.max(), keys.max() - 1, 0, 5, -2000]]).reshape(3, 6)
    raw = raw.astype(dtype)
    report = export.save(model, tmp_path / f"m{suffix}", samples=raw)
    run = export.load(tmp_path / f"m{suffix}")
    np.testing.assert_allclose(run(raw), model.predict_on_batch(raw), rtol=1e-4, atol=1e-5)
    assert not any("HASH" in name.upper() or name.startswith("Flex") for name in report.ops)


def test_ids_of_64_bits_are_not_cut_to_a_key(tmp_path):
    raw = keras.Input((3,), dtype="int64", name="raw")
    places = keras.layers.IntegerLookup(vocabulary=[7, 9])(raw)
    model = keras.Model(raw, keras.layers.Embedding(3, 2)(places))
    ids = np.array([[7, 2**32 + 7, 9]])
    export.save(model, tmp_path / "m.tflite", samples=ids)
    found = export.load(tmp_path / "m.tflite")(ids)
    np.testing.assert_allclose(found, model.predict_on_batch(ids))


@pytest.mark.parametrize(
    ("layer", "dtype", "message"),
    [
        (lambda: keras.layers.StringLookup(vocabulary=["a", "b"]), "string", "takes text"),
        (lambda: keras.layers.IntegerLookup(vocabulary=[3, 4], num_oov_indices=2), "int32", "one index for unknown"),
        (lambda: keras.layers.IntegerLookup(vocabulary=[3, 4], num_oov_indices=0), "int32", "one index for unknown"),
        (lambda: keras.layers.IntegerLookup(vocabulary=[3, 2**40]), "int64", "32 bits"),
    ],
)
def test_lookups_that_no_file_can_hold(tmp_path, layer, dtype, message):
    raw = keras.Input((3,), dtype=dtype)
    model = keras.Model(raw, keras.layers.Embedding(4, 2)(layer()(raw)))
    with pytest.raises(KerasEfficientError, match=message):
        export.save(model, tmp_path / "m.tflite")


def test_words_and_open_vocabularies_by_keras_own_layers():
    """`StringLookup` sorts by falling frequency as hashing by modulus wants it; `Hashing` has no vocabulary at all."""
    words = np.array([["a", "b", "a"], ["a", "c", "b"]])
    lookup = keras.layers.StringLookup(mask_token="")
    lookup.adapt(words)
    assert lookup.get_vocabulary()[2:4] == ["a", "b"]
    for front, size in ((lookup, lookup.vocabulary_size()), (keras.layers.Hashing(50, mask_value=""), 50)):
        table = layers.MEmComEmbedding(size, 8, hash_size=3, mask_zero=True, combiner="mean")
        raw = keras.Input((3,), dtype="string")
        model = keras.Model(raw, keras.layers.Dense(1)(table(front(raw))))
        model.compile("adam", "mse")
        import tensorflow as tf

        model.fit(tf.constant(words), np.ones((2, 1)), verbose=0)
        assert np.isfinite(model.predict(tf.constant([["a", "never seen", ""]]), verbose=0)).all()
