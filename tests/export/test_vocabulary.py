"""Recommenders with their vocabulary in the file: raw ids or words in, found as Keras' own lookup layers find them."""

from __future__ import annotations

import keras
import numpy as np
import onnx
import pytest

from keras_efficient import export, layers, models
from keras_efficient.cli.bench import _inputs
from keras_efficient.errors import CalibrationError, KerasEfficientError
from keras_efficient.export import flatbuffer, verify
from keras_efficient.export.signature import input_specs

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="lookup layers work on TensorFlow only")

RNG = np.random.default_rng(0)
WORDS = np.array([f"wörd {i}" for i in range(60)])


def vocabulary(size: int) -> np.ndarray:
    """Keys in no order, negative ones among them; 0 and 5 are unknown."""
    keys = np.setdiff1d(RNG.integers(-1000, 2**31 - 1, 2 * size), [0, 5])
    keys[0] = np.iinfo(np.int32).min
    return RNG.permutation(keys[:size])


def probes(keys: np.ndarray, mask_token: int | None = None, known_only: bool = False) -> np.ndarray:
    """All keys, repeated; what lies beside the first, the last and others; and numbers that are no keys. Rows of 6."""
    others = [0, 5, -2000, -1, 2**31 - 1, mask_token or 0]
    near = np.clip(np.concatenate([keys - 1, keys + 1]), -(2**31), 2**31 - 1)
    raw = keys if known_only else np.concatenate([keys, near, others])
    return np.concatenate([raw, keys[:1].repeat(-len(raw) % 6)]).reshape(-1, 6)


def classifier(lookup: keras.layers.Layer, dtype: str, batch: int | None = None) -> keras.Model:
    """A whole recommender behind its vocabulary."""
    raw = keras.Input((6,), dtype=dtype, name="raw", batch_size=batch)
    options = {"hash_size": 4, "form": "subspace", "bits": 2}
    network = models.SequenceClassifier(lookup.vocabulary_size(), 30, dim=16, hidden=(8,), embedding=options)
    return keras.Model(raw, network(lookup(raw)))


def found(lookup: keras.layers.Layer, dtype: str = "int32") -> keras.Model:
    raw = keras.Input((6,), dtype=dtype, name="raw")
    return keras.Model(raw, lookup(raw))


def expected(model: keras.Model, values: np.ndarray) -> np.ndarray:
    import tensorflow as tf

    return np.asarray(model(tf.constant(values)))


def assert_builtin(path) -> None:
    """Only operators of the format's own."""
    if path.suffix == ".tflite":
        assert not any(operator.custom for operator in flatbuffer.operators(path.read_bytes()))
    else:
        assert {node.domain for node in onnx.load(path).graph.node} <= {"", "ai.onnx"}


@pytest.mark.parametrize("suffix", [".tflite", ".onnx"])
@pytest.mark.parametrize(
    ("size", "options", "dtype"),
    [
        (1, {}, "int32"),
        (2, {"mask_token": 0}, "int32"),
        (64, {"mask_token": -7, "num_oov_indices": 3}, "int32"),
        (77, {"num_oov_indices": 2}, "int64"),
        (33, {"num_oov_indices": 0}, "int32"),
        (33, {"num_oov_indices": 0, "mask_token": 5}, "int64"),
    ],
)
def test_every_index_is_that_of_keras(tmp_path, suffix, size, options, dtype):
    keys = vocabulary(size)
    lookup = keras.layers.IntegerLookup(vocabulary=keys, **options)
    mask_token, known_only = options.get("mask_token"), options.get("num_oov_indices") == 0
    raw = probes(keys, mask_token, known_only).astype(dtype)
    if known_only and mask_token is not None:
        raw[-1] = mask_token
    model, path = found(lookup, dtype), tmp_path / f"m{suffix}"
    export.save(model, path)
    np.testing.assert_array_equal(export.load(path)(raw), expected(model, raw))
    assert_builtin(path)


@pytest.mark.parametrize("suffix", [".tflite", ".onnx"])
@pytest.mark.parametrize(("batch", "dtype"), [(None, "int32"), (None, "int64"), (3, "int32")])
def test_a_recommender_takes_raw_ids(tmp_path, suffix, batch, dtype):
    keys = vocabulary(77)
    model = classifier(keras.layers.IntegerLookup(vocabulary=keys, mask_token=0), dtype, batch)
    path, raw = tmp_path / f"m{suffix}", probes(keys)[:12].astype(dtype)
    raw[1] = 0  # nothing but padding
    report = export.save(model, path, samples=raw)
    assert "vocabulary-lookup" in report.lowerings
    assert_builtin(path)
    run = export.load(path)
    for part in np.split(raw, 4) if batch else [raw, raw[:1], raw[:5]]:
        np.testing.assert_allclose(run(part), expected(model, part), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("suffix", [".tflite", ".onnx"])
def test_an_adapted_vocabulary(tmp_path, suffix):
    """`adapt` sorts by falling frequency and cuts at `max_tokens`."""
    lookup = keras.layers.IntegerLookup(max_tokens=4, mask_token=0)
    lookup.adapt(np.array([-3, -3, -3, 12, 12, 900, 900, 900, 900, 5, 0]))
    assert lookup.get_vocabulary() == [0, -1, 900, -3]
    model, path = found(lookup), tmp_path / f"m{suffix}"
    export.save(model, path)
    raw = np.array([[900, -3, 12, 5, 0, 900]], np.int32)
    np.testing.assert_array_equal(export.load(path)(raw), [[2, 3, 1, 1, 0, 2]])


@pytest.mark.parametrize("suffix", [".tflite", ".onnx"])
def test_ids_without_an_index_raise(tmp_path, suffix):
    """Keras raises as well where `num_oov_indices` is 0."""
    path = tmp_path / f"m{suffix}"
    export.save(found(keras.layers.IntegerLookup(vocabulary=[3, 7, 9], num_oov_indices=0)), path)
    run = export.load(path)
    np.testing.assert_array_equal(run(np.array([[3, 7, 9, 9, 7, 3]])), [[0, 1, 2, 2, 1, 0]])
    for wrong in (2, 4, 10, -(2**31)):
        with pytest.raises(Exception, match=r"out of (data )?bounds"):
            run(np.array([[3, 7, 9, wrong, 7, 3]]))


@pytest.mark.parametrize("suffix", [".tflite", ".onnx"])
def test_ids_of_64_bits_are_not_cut_to_a_key(tmp_path, suffix):
    model, path = (
        found(keras.layers.IntegerLookup(vocabulary=[7, -9], num_oov_indices=2), "int64"),
        tmp_path / f"m{suffix}",
    )
    ids = np.array([[7, 2**32 + 7, -9, 2**32 - 9, -(2**32) + 7, 2**63 - 1]])
    export.save(model, path)
    np.testing.assert_array_equal(export.load(path)(ids), expected(model, ids))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_narrow_ids_and_floats(tmp_path, dtype):
    model = found(keras.layers.IntegerLookup(vocabulary=[200, 3, 255, 7]), dtype)
    ids = np.array([[3, 200, 255, 0, 7, 100]]).astype(dtype)
    export.save(model, tmp_path / "m.tflite")
    np.testing.assert_array_equal(export.load(tmp_path / "m.tflite")(ids), expected(model, ids))


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_a_vocabulary_takes_eight_bytes_a_key(tmp_path, dtype):
    keys = vocabulary(40_000)
    report = export.save(found(keras.layers.IntegerLookup(vocabulary=keys), dtype), tmp_path / "m.tflite")
    assert 8 * len(keys) <= report.bytes <= 8 * len(keys) + 25_000
    assert report.ops["LESS_EQUAL"] == {"int32": 16}


@pytest.mark.parametrize("precision", ["float16", "dynamic", "int8-weights", "int8"])
def test_other_precisions_keep_the_keys(tmp_path, precision):
    keys, raw = vocabulary(300), keras.Input((6,), dtype="int32", name="raw")
    ids = keras.layers.IntegerLookup(vocabulary=keys)(raw)
    scores = keras.layers.Dense(4)(keras.layers.Flatten()(keras.layers.Embedding(301, 8)(ids)))
    real = {"calibration": probes(keys)} if precision == "int8" else {}
    report = export.save(keras.Model(raw, scores), tmp_path / "m.tflite", precision=precision, **real)
    assert report.ops["LESS_EQUAL"] == {"int32": 9}


def test_two_inputs_a_shared_lookup_and_a_nested_one(tmp_path):
    first, second = (keras.Input((6,), dtype="int32", name=name) for name in "ab")
    lookup = keras.layers.IntegerLookup(vocabulary=[40, 10, 30])
    inner_ids = keras.Input((6,), dtype="int32")
    inner = keras.Model(inner_ids, keras.layers.IntegerLookup(vocabulary=[11, 10], mask_token=40)(inner_ids))
    table = keras.layers.Embedding(5, 3)
    model = keras.Model([first, second], table(lookup(first)) + table(lookup(second)) * table(inner(first)))
    path = tmp_path / "m.tflite"
    export.save(model, path)
    values = [RNG.choice([10, 11, 30, 40], (2, 6)).astype(np.int32) for _ in range(2)]
    np.testing.assert_allclose(export.load(path)(values), np.asarray(model(values)), atol=1e-6)


@pytest.mark.parametrize("num_unknown", [0, 1])
def test_samples_are_of_the_vocabulary(num_unknown):
    """Numbers from 0 on would nearly all be unknown, or refused by Keras: a file would be verified on nothing."""
    keys = vocabulary(100)
    model = found(keras.layers.IntegerLookup(vocabulary=keys, num_oov_indices=num_unknown))
    drawn = np.concatenate([sample["raw"] for sample in verify.synthetic_samples(model, input_specs(model), 40)])
    assert np.isin(drawn, keys).mean() > (0.4 if num_unknown else 0.999)
    assert np.isin(drawn, keys).all() == (num_unknown == 0)


@pytest.mark.parametrize(
    ("layer", "dtype", "suffix", "message"),
    [
        (lambda: keras.layers.IntegerLookup(vocabulary=[3, 2**40]), "int64", ".onnx", "32 bits"),
        (lambda: keras.layers.IntegerLookup(vocabulary=[3], output_mode="multi_hot"), "int32", ".tflite", "indices of"),
        (
            lambda: keras.layers.IntegerLookup(vocabulary=[3], num_oov_indices=2, oov_method="farmhash"),
            "int32",
            ".tflite",
            "by their remainder",
        ),
        (lambda: keras.layers.StringLookup(vocabulary=["a"], num_oov_indices=2), "string", ".tflite", "one index"),
        (lambda: keras.layers.StringLookup(vocabulary=["a"], num_oov_indices=0), "string", ".tflite", "one index"),
        (lambda: keras.layers.StringLookup(vocabulary=["a"]), "string", ".onnx", "float32 files for 'onnx' cannot"),
        (lambda: keras.layers.Hashing(4), "string", ".tflite", "for a StringLookup only"),
    ],
)
def test_lookups_that_no_file_can_hold(tmp_path, layer, dtype, suffix, message):
    raw = keras.Input((3,), dtype=dtype)
    model = keras.Model(raw, keras.layers.Dense(2)(keras.ops.cast(layer()(raw), "float32")))
    with pytest.raises(KerasEfficientError, match=message):
        export.save(model, tmp_path / f"m{suffix}")


def words(model: keras.Model, path, samples: np.ndarray | None, **options) -> export.Report:
    """Exports a model that takes text, and compares it on known, unknown, repeated and empty words."""
    report = export.save(model, path, samples=samples, **options)
    run = export.load(path)
    assert run.input_dtypes == {"raw": "object"}
    assert_builtin(path)
    raw = np.array([[*WORDS[:3], "", "never seen", "[UNK]"], [*WORDS[-3:], WORDS[0], WORDS[0], "wörd"]])
    size = run.input_shapes["raw"][0]
    for part in [raw] if size else [raw, raw[:1], raw.astype(object), np.char.encode(raw, "utf-8")]:
        tolerance = 1e-2 if report.precision == "float16" else 1e-5
        np.testing.assert_allclose(run(part), expected(model, part), atol=tolerance)
    return report


@pytest.mark.parametrize("mask_token", [None, ""])
@pytest.mark.parametrize(("batch", "given"), [(None, True), (None, False), (2, True)])
def test_a_recommender_takes_words(tmp_path, mask_token, batch, given):
    model = classifier(keras.layers.StringLookup(vocabulary=WORDS, mask_token=mask_token), "string", batch)
    samples = np.array([[*WORDS[:5], "other"]]) if given else None
    report = words(model, tmp_path / "m.tflite", samples)
    assert "HASHTABLE_FIND" in report.ops
    assert "text-lookup" in report.lowerings


@pytest.mark.parametrize("precision", ["float16", "dynamic", "int8-weights"])
def test_words_in_other_precisions(tmp_path, precision):
    raw = keras.Input((None,), dtype="string", name="raw")
    table = keras.layers.Embedding(61, 8)
    model = keras.Model(raw, table(keras.layers.StringLookup(vocabulary=WORDS)(raw)))
    words(model, tmp_path / "m.tflite", None, precision=precision)
    assert _inputs("m.tflite", export.load(tmp_path / "m.tflite"), (4,))["raw"].shape == (1, 4)


def test_words_are_not_for_integer_files(tmp_path):
    model = classifier(keras.layers.StringLookup(vocabulary=WORDS), "string")
    with pytest.raises(KerasEfficientError, match="int8 files for 'tflite' cannot"):
        export.save(model, tmp_path / "m.tflite", precision="int8", calibration=WORDS[None, :6])
    with pytest.raises(CalibrationError, match="are no text"):
        export.save(model, tmp_path / "m.tflite", samples=np.zeros((1, 6)))


@pytest.mark.parametrize("combiner", [None, "mean"])
@pytest.mark.parametrize(
    "front",
    [
        lambda: keras.layers.StringLookup(mask_token=""),
        lambda: keras.layers.Hashing(50, mask_value=""),
    ],
)
def test_words_and_open_vocabularies_train_inside_a_model_and_in_front_of_it(front, combiner):
    """`StringLookup` sorts by falling frequency as hashing by modulus wants it; `Hashing` has no vocabulary at all."""
    import tensorflow as tf

    raw = np.array([["b", "a", "a"], ["a", "c", ""]])
    layer, size = front(), 50
    if isinstance(layer, keras.layers.StringLookup):
        layer.adapt(raw)
        size = layer.vocabulary_size()
        assert layer.get_vocabulary()[:3] == ["", "[UNK]", "a"]
    table = layers.MEmComEmbedding(size, 8, hash_size=3, mask_zero=True, combiner=combiner)

    ids = keras.Input((3,), dtype="int64")
    outside = keras.Model(ids, keras.layers.Dense(1)(table(ids)))
    text = keras.Input((3,), dtype="string")
    inside = keras.Model(text, outside(layer(text)))
    before = table.embeddings()
    for model, data in (
        (inside, tf.data.Dataset.from_tensor_slices(raw)),
        (outside, tf.data.Dataset.from_tensor_slices(raw).map(layer)),
    ):
        model.compile("adam", "mse")
        targets = tf.data.Dataset.from_tensor_slices(np.ones((2, 1) if combiner else (2, 3, 1)))
        model.fit(tf.data.Dataset.zip((data, targets)).batch(2), epochs=2, verbose=0)
    assert not np.array_equal(table.embeddings(), before)
    new = tf.constant([["a", "never seen", ""]])
    np.testing.assert_allclose(inside(new), outside(layer(new)), atol=1e-6)
    assert np.isfinite(inside(new)).all()


def test_integers_train_behind_an_adapted_lookup_and_go_into_a_file(tmp_path):
    raw = RNG.permutation(np.repeat(np.int32([70, -5, 31, 8]), [110, 45, 25, 12])).reshape(32, 6)
    lookup = keras.layers.IntegerLookup(mask_token=0)
    lookup.adapt(raw)
    assert lookup.get_vocabulary() == [0, -1, 70, -5, 31, 8]
    model = classifier(lookup, "int32")
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(raw, raw[:, 0] % 30, epochs=2, verbose=0)
    export.save(model, tmp_path / "m.tflite", samples=raw)
    raw[0, 1:3] = 0, 999
    np.testing.assert_allclose(export.load(tmp_path / "m.tflite")(raw), expected(model, raw), rtol=1e-4, atol=1e-5)
