"""Compressed embeddings: formulas against NumPy, sizes, storage, growing, bad input."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_efficient import layers
from keras_efficient.deploy import deploy
from keras_efficient.errors import UnsupportedLayer
from keras_efficient.layers.embedding.fit import weighted_error
from keras_efficient.layers.embedding.hashing import MOST_BUCKETS, mix
from keras_efficient.layers.embedding.plans import METHODS
from keras_efficient.layers.table import Table, fake_quantize, pack, quantize, scales, unpack

pytestmark = pytest.mark.contract

RNG = np.random.default_rng(0)

# Arguments under which a method makes small tables for 500 entities of 24 columns.
SMALL = {
    "memcom": {"compression": 4},
    "codebooks": {"size": 5},
    "naive": {"compression": 4, "hash": "mix"},
    "truncate": {"compression": 4},
    "double": {"compression": 4},
    "quotient_remainder": {"compression": 4},
    "hash_embedding": {"compression": 4, "bits": 8},
    "reduced": {"compression": 4, "bits": 4},
    "factorised": {"compression": 4, "bits": 4},
    "tensor_train": {"compression": 4},
    "deep_hash": {"size": 8, "hashes": 16},
    "robe": {"compression": 4, "block": 8},
}


def array(tensor) -> np.ndarray:
    return ops.convert_to_numpy(tensor)


def built(cls=layers.MEmComEmbedding, *args, **options):
    keras.utils.set_random_seed(0)
    layer = cls(*args, **options)
    layer.build((None, None))
    return layer


# Formulas


def test_the_golden_vectors():
    """n = 10, m = 3, d = 4, U = 0 … 11, V = 1 + i / 10, W = −i."""
    layer = built(input_dim=10, output_dim=4, hash_size=3, bias=True)
    layer._state["rows"].assign(np.arange(12.0).reshape(3, 4))
    layer._state["scalars"].assign(1 + np.arange(10.0)[:, None] / 10)
    layer._state["shifts"].assign(np.zeros((10, 1)))
    found = array(layer(np.array([7, 9])))
    np.testing.assert_allclose(found, [[6.8, 8.5, 10.2, 11.9], [0, 1.9, 3.8, 5.7]], rtol=1e-6)
    layer._state["shifts"].assign(-np.arange(10.0)[:, None])
    np.testing.assert_allclose(array(layer(np.array([7])))[0], [-0.2, 1.5, 3.2, 4.9], rtol=1e-5)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
@pytest.mark.parametrize("groups", [1, 4])
def test_the_formula_for_ids_of_any_rank(shape, dtype, groups):
    layer = built(input_dim=100, output_dim=8, hash_size=7, bias=True, scalars=groups)
    rows, v, w = (RNG.normal(size=array(x).shape).astype("float32") for x in layer._state.values())
    for variable, value in zip(layer._state.values(), (rows, v, w), strict=True):
        variable.assign(value)
    ids = RNG.integers(0, 100, shape).astype(dtype)
    spread = np.repeat(np.arange(groups), 8 // groups)
    expected = rows[ids % 7] * v[ids][..., spread] + w[ids][..., spread]
    np.testing.assert_allclose(array(layer(ids)), expected, rtol=1e-6)


def test_codebooks_by_hand():
    """Eight columns in three stretches of 3, 3 and 2; the hashes are stored, and not trained."""
    layer = built(input_dim=300, output_dim=8, hash_size=3, form="codebooks", bits=32)
    choices, rows = array(layer._state["choices"]), array(layer._state["rows"]).reshape(3, 256, 3)
    assert choices.dtype == np.uint8
    assert [weight.name for weight in layer.trainable_weights] == ["rows"]
    found = array(layer(np.array([7, 299])))
    for vector, (a, b, c) in zip(found, choices[[7, 299]], strict=True):
        np.testing.assert_array_equal(vector, np.concatenate([rows[0, a], rows[1, b], rows[2, c, :2]]))


def test_own_rows_of_frequent_entities():
    layer = built(input_dim=20, output_dim=4, hash_size=3, own_rows=5)
    rows = array(layer._state["rows"])
    assert rows.shape == (8, 4)
    expected = np.concatenate([rows[:5], rows[5 + np.arange(15) % 3]])
    np.testing.assert_array_equal(layer.embeddings(), expected)


def test_training_begins_as_naive_hashing():
    layer = built(input_dim=20, output_dim=4, hash_size=6)
    np.testing.assert_array_equal(layer.embeddings(), array(layer._state["rows"])[np.arange(20) % 6])


def test_a_table_as_large_as_the_original_is_an_embedding():
    layer = built(input_dim=30, output_dim=4, hash_size=30)
    stock = keras.layers.Embedding(30, 4)
    stock.build()
    stock.set_weights([array(layer._state["rows"])])
    ids = RNG.integers(0, 30, (4, 6))
    np.testing.assert_array_equal(array(layer(ids)), array(stock(ids)))


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("naive", "truncate", "double")])
def test_every_entity_has_a_vector_of_its_own(method):
    layer = built(layers.CompressedEmbedding, 500, 24, method=method, **SMALL[method])
    for variable in layer.trainable_variables:  # not the choices of codebooks, which are hashes
        if variable.shape:
            variable.assign(array(variable) + RNG.normal(size=variable.shape).astype("float32"))
    vectors = layer.embeddings()
    assert len(np.unique(vectors.round(6), axis=0)) == len(vectors)


def test_bucket_mates_are_collinear_without_bias_only():
    def cosine(bias):
        random = np.random.default_rng(1)
        layer = built(input_dim=30, output_dim=8, hash_size=5, bias=bias)
        for variable in layer._state.values():
            variable.assign(array(variable) + random.normal(size=variable.shape))
        a, b = layer.embeddings([3, 28])
        return abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b)

    assert cosine(False) == pytest.approx(1.0, abs=1e-6)
    assert cosine(True) < 0.999


# Sizes


@pytest.mark.parametrize(
    ("n", "d", "compression", "options", "size"),
    [
        (40_981, 64, 16, {}, 1_920),
        (40_981, 64, 16, {"bias": True}, 1_280),
        (480_000, 128, 16, {}, 26_250),
        (480_000, 128, 25, {}, 15_450),
        (480_000, 128, 100, {"bits": 8, "scalar_bits": 8}, 14_981),
    ],
)
def test_rows_that_a_budget_buys(n, d, compression, options, size):
    layer = layers.MEmComEmbedding(n, d, compression=compression, **options)
    assert layer.hash_size == size
    assert layer.compression_ratio >= compression
    larger = layers.MEmComEmbedding(n, d, hash_size=size + 1, **options)
    assert larger.compression_ratio < compression


@pytest.mark.parametrize(("bias", "largest"), [(False, "63.9"), (True, "31.97")])
def test_the_largest_compression_is_told(bias, largest):
    with pytest.raises(ValueError, match=f"largest possible here is {largest}"):
        layers.MEmComEmbedding(40_981, 64, compression=64, bias=bias)


@pytest.mark.parametrize("method", METHODS)
def test_the_deployed_form_is_equal_and_as_large_as_it_says(method):
    inputs = keras.Input((None,), dtype="int32")
    layer = layers.CompressedEmbedding(500, 24, method=method, **SMALL[method])
    model = keras.Model(inputs, layer(inputs))
    deployed = deploy(model)
    ids = RNG.integers(0, 500, (3, 7)).astype("int32")
    np.testing.assert_allclose(array(deployed(ids)), array(model(ids)), rtol=1e-5, atol=1e-6)
    stored = sum(array(v).nbytes for v in deployed.variables)
    scales = 4 * sum(t.has_scale and t.scale == "table" for t in layer.plan.tables().values())
    assert stored + scales == layer.nbytes


# Storage


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([16, 8, 4, 2, 1]), st.integers(1, 9), st.integers(1, 19))
def test_packing_and_back(bits, rows, columns):
    table = Table(rows, columns, bits)
    codes = np.random.default_rng(rows).integers(table.least, table.most + 1, (rows, columns))
    stored = pack(table, codes.astype(np.int16))
    assert stored.shape == (rows, table.packed_columns)
    assert stored.dtype == table.stored_dtype
    np.testing.assert_array_equal(array(unpack(table, ops.convert_to_tensor(stored))), codes)


@pytest.mark.parametrize("bits", [16, 8, 4, 2, 1])
@pytest.mark.parametrize("scale", ["row", "table"])
def test_rounding_by_hand(bits, scale):
    table = Table(3, 50, bits, scale)
    values = RNG.normal(size=(3, 50)).astype("float32")
    tensor = ops.convert_to_tensor(values)
    found = array(fake_quantize(table, tensor, scales(table, tensor)))
    stored, step = quantize(table, values)
    again = (array(unpack(table, ops.convert_to_tensor(stored))) + table.offset) * step
    np.testing.assert_allclose(found, again, rtol=1e-6)
    levels = np.unique(np.round(found / step - table.offset))
    assert levels.min() >= table.least
    assert levels.max() <= table.most
    if bits == 2:
        assert set(levels) <= {-2, -1, 0, 1}
    if bits >= 8:
        np.testing.assert_allclose(found, values, atol=float(np.max(step)) * 0.51)
    else:  # the error of the best quantiser of normal values is 0.0118, 0.1188, 0.363 (Max, 1960)
        assert np.mean((found - values) ** 2) < {4: 0.02, 2: 0.15, 1: 0.45}[bits] * np.mean(values**2)


@pytest.mark.parametrize("method", METHODS)
def test_frozen_layers_compute_the_same(method, tmp_path):
    inputs = keras.Input((None,), dtype="int32")
    layer = layers.CompressedEmbedding(500, 24, method=method, combiner="mean", mask_zero=True, **SMALL[method])
    model = keras.Model(inputs, layer(inputs))
    ids = RNG.integers(0, 500, (4, 9)).astype("int32")
    before = array(model(ids))
    layer.freeze()
    np.testing.assert_allclose(array(model(ids)), before, rtol=1e-5, atol=1e-6)
    assert not layer.trainable_variables
    model.save_weights(tmp_path / "frozen.weights.h5")
    overhead = 30_000  # of HDF5, by variable
    assert (tmp_path / "frozen.weights.h5").stat().st_size < layer.nbytes + overhead
    model.save(tmp_path / "frozen.keras")
    again = keras.saving.load_model(tmp_path / "frozen.keras")
    np.testing.assert_array_equal(array(again(ids)), array(model(ids)))


def test_weights_of_the_other_form_are_refused(tmp_path):
    def model(frozen):
        inputs = keras.Input((None,), dtype="int32")
        return keras.Model(
            inputs, layers.MEmComEmbedding(50, 8, compression=4, bits=4, frozen=frozen, name="e")(inputs)
        )

    model(True).save_weights(tmp_path / "frozen.weights.h5")
    with pytest.raises(ValueError, match="frozen"):
        model(False).load_weights(tmp_path / "frozen.weights.h5")


def test_fake_quantisation_trains():
    """Two bits and a learned step fit a target that two bits can fit."""
    inputs = keras.Input((), dtype="int32")
    layer = layers.CompressedEmbedding(64, 8, method="reduced", bits=2)
    model = keras.Model(inputs, layer(inputs))
    model.compile(keras.optimizers.Adam(0.02), "mse")
    target = RNG.choice([-1.5, -0.5, 0.5, 1.5], (64, 8)).astype("float32") * 0.2
    model.fit(np.arange(64), target, epochs=150, batch_size=64, verbose=0)
    assert np.mean((array(model(np.arange(64))) - target) ** 2) < 0.1 * np.mean(target**2)


# Pooling and masks


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
@pytest.mark.parametrize("method", ["memcom", "factorised"])
def test_pooling_by_hand(combiner, method):
    layer = built(layers.CompressedEmbedding, 50, 8, method=method, size=6, combiner=combiner, mask_zero=True)
    ids = np.array([[3, 0, 7, 0], [0, 0, 0, 0], [1, 2, 3, 4]])
    vectors, present = layer.embeddings(ids.ravel()).reshape(3, 4, 8), (ids > 0).astype("float32")
    count = np.maximum(present.sum(1, keepdims=True), 1)
    divisor = {"sum": 1.0, "mean": count, "sqrtn": np.sqrt(count)}[combiner]
    expected = (vectors * present[..., None]).sum(1) / divisor
    found = array(layer(ids))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert not found[1].any()


def test_weighted_pooling_by_hand():
    layer = built(input_dim=50, output_dim=8, hash_size=9, combiner="mean")
    ids, weights = RNG.integers(0, 50, (3, 5)), RNG.uniform(-1, 1, (3, 5)).astype("float32")
    vectors = layer.embeddings(ids.ravel()).reshape(3, 5, 8)
    expected = (vectors * weights[..., None]).sum(1) / np.abs(weights).sum(1, keepdims=True)
    np.testing.assert_allclose(array(layer([ids, weights])), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="ragged tensors are TensorFlow's")
def test_ragged_ids():
    import tensorflow as tf

    layer = built(input_dim=50, output_dim=8, hash_size=9, combiner="mean")
    found = array(layer(tf.ragged.constant([[0, 3, 7], [], [5]])))
    vectors = layer.embeddings()
    np.testing.assert_allclose(found[0], vectors[[0, 3, 7]].mean(0), rtol=1e-5)
    assert not found[1].any()
    np.testing.assert_allclose(found[2], vectors[5], rtol=1e-6)
    weighted = array(layer([tf.ragged.constant([[3, 7], [5]]), tf.ragged.constant([[1.0, 3.0], [2.0]])]))
    with pytest.raises(ValueError, match="rows as long as those of the ids"):
        layer([tf.ragged.constant([[3, 7], [5]]), tf.ragged.constant([[1.0], [3.0, 2.0]])])
    np.testing.assert_allclose(weighted[0], (vectors[3] + 3 * vectors[7]) / 4, rtol=1e-5)
    with pytest.raises(ValueError, match="combiner"):
        built(input_dim=50, output_dim=8, hash_size=9)(tf.ragged.constant([[0, 3], [1]]))
    deep = array(layer(tf.ragged.constant([[[0, 3, 7], [5]], [[2, 4]]])))
    np.testing.assert_allclose(deep[0, 0], vectors[[0, 3, 7]].mean(0), rtol=1e-5)
    np.testing.assert_allclose(deep[1, 0], vectors[[2, 4]].mean(0), rtol=1e-5)
    assert not deep[1, 1].any()


@pytest.mark.parametrize("shape", [(3,), (2, 1), (2, 3, 1)])
def test_weights_have_the_shape_of_the_ids(shape):
    layer = built(input_dim=50, output_dim=8, hash_size=9, combiner="mean")
    with pytest.raises(ValueError, match="Weights must have the shape of the ids"):
        layer([np.ones((2, 3), "int32"), np.ones(shape, "float32")])
    with pytest.raises(ValueError, match="Weights must have the shape of the ids"):
        layer([keras.Input((3,), dtype="int32"), keras.Input((4,))])


def test_the_batch_is_not_pooled():
    layer = built(input_dim=50, output_dim=8, hash_size=9, combiner="mean")
    with pytest.raises(ValueError, match="must not be the batch"):
        layer(np.array([1, 2, 3]))
    with pytest.raises(ValueError, match="must not be the batch"):
        layer(keras.Input((), dtype="int32"))


def test_masks_reach_the_next_layer_in_both_forms():
    inputs = keras.Input((6,), dtype="int32")
    vectors = layers.MEmComEmbedding(30, 4, hash_size=5, mask_zero=True)(inputs)
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling1D()(vectors))
    ids = np.array([[3, 4, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]])
    expected = model.layers[1].embeddings([3, 4]).mean(0)
    np.testing.assert_allclose(array(model(ids))[0], expected, rtol=1e-5)
    np.testing.assert_allclose(array(deploy(model)(ids)), array(model(ids)), rtol=1e-5)


def _embedded(name):
    return layers.MEmComEmbedding(30, 4, hash_size=5, mask_zero=True, name=name)


def _sequential():
    return keras.Sequential([keras.Input((6,), dtype="int32"), _embedded("table"), keras.layers.LSTM(3)])


def _sequential_without_input():
    model = keras.Sequential([_embedded("table"), keras.layers.LSTM(3)])
    model(np.zeros((1, 6), "int32"))
    return model


def _nested(inner, last):
    inputs = keras.Input((6,), dtype="int32")
    return keras.Model(inputs, last(inner(inputs)))


def _functional_in_functional():
    return _nested(_nested(_embedded("table"), keras.layers.Dropout(0.1)), keras.layers.LSTM(3))


def _sequential_in_functional():
    inner = keras.Sequential([keras.Input((6,), dtype="int32"), _embedded("table"), keras.layers.Dense(4)])
    return _nested(inner, keras.layers.Bidirectional(keras.layers.LSTM(3)))


def _functional_in_sequential():
    inner = _nested(_embedded("table"), keras.layers.Dropout(0.1))
    pooling = keras.layers.GlobalAveragePooling1D()
    return keras.Sequential([keras.Input((6,), dtype="int32"), inner, pooling])


def _twice_nested():
    return _nested(
        _nested(_nested(_embedded("table"), keras.layers.Dense(4)), keras.layers.Dense(4)), keras.layers.GRU(3)
    )


def _two_of_a_model():
    inputs = keras.Input((6,), dtype="int32")
    vectors = _embedded("table")(inputs)
    both = keras.Model(inputs, [keras.layers.Dense(3)(vectors), keras.layers.Dense(2)(vectors)])
    outer = keras.Input((6,), dtype="int32")
    left, right = both(outer)
    return keras.Model(outer, [keras.layers.LSTM(3)(left), keras.layers.LSTM(3)(right)])


def _into_a_model():
    inner = keras.Sequential([keras.Input((6, 4)), keras.layers.LSTM(3)])
    return _nested(_embedded("table"), inner)


def _attention():
    inputs = keras.Input((6,), dtype="int32")
    vectors = _nested(_embedded("table"), keras.layers.Dense(4))(inputs)
    attended = keras.layers.MultiHeadAttention(1, 4)(vectors, vectors)
    return keras.Model(inputs, keras.layers.GlobalAveragePooling1D()(attended))


@pytest.mark.parametrize(
    "make",
    [
        _sequential,
        _sequential_without_input,
        _functional_in_functional,
        _sequential_in_functional,
        _functional_in_sequential,
        _twice_nested,
        _two_of_a_model,
        _into_a_model,
        _attention,
    ],
)
def test_masks_reach_the_next_layer_wherever_the_table_sits(make, tmp_path):
    model = make()
    ids = np.array([[3, 4, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]], "int32")
    other = np.where(ids == 0, 7, ids)
    expected, unmasked = (keras.tree.flatten(model(x)) for x in (ids, other))
    assert np.abs(array(expected[0])[0] - array(unmasked[0])[0]).max() > 1e-4
    deployed = deploy(model)
    deployed.save(tmp_path / "model.keras")
    for form in (deployed, deploy(deployed), keras.saving.load_model(tmp_path / "model.keras")):
        for left, right in zip(keras.tree.flatten(form(ids)), expected, strict=True):
            np.testing.assert_allclose(array(left), array(right), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["clip", "wrap"])
def test_the_mask_of_the_deployed_form_knows_the_policies(policy):
    inputs = keras.Input((4,), dtype="int32")
    vectors = layers.MEmComEmbedding(30, 4, hash_size=5, mask_zero=True, out_of_range=policy)(inputs)
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling1D()(vectors))
    ids = np.array([[3, -4, 0, 35], [-1, 0, 0, 5]])
    np.testing.assert_allclose(array(deploy(model)(ids)), array(model(ids)), rtol=1e-5)


def test_arguments_that_are_refused():
    with pytest.raises(ValueError, match=r"build the layer .* before `embeddings\(\)`"):
        layers.MEmComEmbedding(500, 8, compression=4).embeddings([0])
    with pytest.raises(ValueError, match="`frozen` must be one of"):
        layers.MEmComEmbedding(500, 8, compression=4, frozen="yes")
    with pytest.raises(TypeError, match=r"no option 'foo'\. It has: .*combiner, compression, .*form, .*hash_size"):
        layers.MEmComEmbedding(500, 8, foo=1)
    with pytest.raises(ValueError, match="a table as small as this has none"):
        layers.MEmComEmbedding(1, 1)
    with pytest.raises(TypeError, match=r"Ids must be integers\. Received: None"):
        built(layers.MEmComEmbedding, 500, 8, compression=4)(None)


# From a trained table


def test_sources_that_are_refused():
    convert, matrix = layers.MEmComEmbedding.from_embedding, RNG.normal(size=(40, 6))
    with pytest.raises(ValueError, match=r"An Embedding or a matrix is needed\. Received: a layer Dense"):
        convert(keras.layers.Dense(4))
    with pytest.raises(ValueError, match="compressed already"):
        convert(convert(matrix, compression=2))
    with pytest.raises(ValueError, match="`counts` must be numbers"):
        convert(matrix, counts=["a"] * 40, compression=2)
    with pytest.raises(ValueError, match="The source says what `input_dim` is"):
        convert(matrix, input_dim=5, compression=2)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("hash_embedding", "tensor_train", "deep_hash")])
@pytest.mark.parametrize("counted", [False, True])
def test_fits_are_better_than_shared_means(method, counted):
    n, d = 500, 24
    counts = 1 / (1 + np.arange(n)) if counted else None
    matrix = RNG.normal(size=(n, 8)) @ RNG.normal(size=(8, d)) + 0.3 * RNG.normal(size=(n, d))
    weights = np.ones(n) if counts is None else counts
    layer = layers.CompressedEmbedding.from_embedding(matrix, counts=counts, method=method, **SMALL[method])
    naive = layers.CompressedEmbedding.from_embedding(matrix, counts=counts, method="naive", compression=4)
    error = weighted_error(matrix, layer.embeddings(), weights)
    assert error < 1
    if method in ("memcom", "codebooks", "quotient_remainder", "factorised"):
        assert error < weighted_error(matrix, naive.embeddings(), weights)


@pytest.mark.parametrize("method", ["hash_embedding", "tensor_train"])
def test_fits_by_gradients_do_not_ask_whether_the_layer_trains(method):
    matrix = RNG.normal(size=(200, 3)) @ RNG.normal(size=(3, 24))
    options = {"method": method, "size": 20, "steps": 100}
    errors = []
    for other in ({}, {"trainable": False, "embeddings_regularizer": "l2"}):
        keras.utils.set_random_seed(0)
        layer = layers.CompressedEmbedding.from_embedding(matrix, **options, **other)
        errors.append(weighted_error(matrix, layer.embeddings(), np.ones(200)))
    assert errors[1] == pytest.approx(errors[0], rel=1e-5)
    assert not layer.trainable_weights


def test_the_rank_one_fit_is_the_singular_value_decomposition():
    n, d, m = 400, 12, 40
    matrix, counts = RNG.normal(size=(n, d)).astype("float32"), RNG.uniform(0.5, 2, n).astype("float32")
    layer = layers.MEmComEmbedding.from_embedding(matrix, counts=counts, hash_size=m)
    left = 0.0
    for bucket in range(m):
        members = np.arange(n) % m == bucket
        values = np.linalg.svd(np.sqrt(counts[members])[:, None] * matrix[members], compute_uv=False)
        left += np.sum(values[1:] ** 2)
    expected = left / np.sum(counts[:, None] * matrix**2)
    assert weighted_error(matrix, layer.embeddings(), counts) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "options", [{"hash_size": 60}, {"hash_size": 1, "scalars": 12}, {"hash_size": 5, "form": "codebooks", "bits": 32}]
)
def test_fits_that_are_exact(options):
    matrix = RNG.normal(size=(60, 12)).astype("float32")
    layer = layers.MEmComEmbedding.from_embedding(matrix, **options)
    np.testing.assert_allclose(layer.embeddings(), matrix, atol=1e-5)


def test_more_codebooks_lose_less_and_counts_are_weights():
    matrix, counts = RNG.normal(size=(2000, 12)).astype("float32"), 1.0 / np.arange(1, 2001)
    errors, weighted = [], []
    for size in (1, 2, 5, 12):
        for found, seen in ((errors, None), (weighted, counts)):
            layer = layers.MEmComEmbedding.from_embedding(matrix, counts=seen, hash_size=size, form="codebooks")
            found.append(weighted_error(matrix, layer.embeddings(), counts))
    assert errors == sorted(errors, reverse=True)
    assert weighted == sorted(weighted, reverse=True)
    assert all(a < 0.8 * b for a, b in zip(weighted[:2], errors[:2], strict=True))


def test_codebooks_of_many_entities_come_from_a_sample(monkeypatch):
    matrix, counts = RNG.normal(size=(6000, 12)).astype("float32"), 1.0 / np.arange(1, 6001)
    errors = []
    for sample in (10_000, 3000):
        monkeypatch.setattr("keras_efficient.layers.embedding.fit.SAMPLE", sample)
        layer = layers.MEmComEmbedding.from_embedding(matrix, counts=counts, hash_size=4, form="codebooks")
        errors.append(weighted_error(matrix, layer.embeddings(), counts))
    assert errors[0] < errors[1] < 1.5 * errors[0]


def test_from_a_stock_layer():
    stock = keras.layers.Embedding(40, 6, mask_zero=True, name="words")
    with pytest.raises(ValueError, match="not built"):
        layers.MEmComEmbedding.from_embedding(stock, compression=3)
    stock.build()
    layer = layers.MEmComEmbedding.from_embedding(stock, hash_size=40)
    assert (layer.name, layer.mask_zero) == ("words", True)
    np.testing.assert_allclose(layer.embeddings(), array(stock.embeddings), atol=1e-6)


@pytest.mark.parametrize("counts", [np.ones(39), np.full(40, -1.0), np.full(40, np.nan), np.zeros(40)])
def test_wrong_counts(counts):
    with pytest.raises(ValueError, match="counts"):
        layers.MEmComEmbedding.from_embedding(np.ones((40, 6)), counts=counts, compression=2)


# Growing


@pytest.mark.parametrize("method", [m for m in METHODS if m != "tensor_train"])
@pytest.mark.parametrize("frozen", [False, True])
def test_growing_leaves_the_old_vectors(method, frozen, tmp_path):
    inputs = keras.Input((None,), dtype="int32")
    layer = layers.CompressedEmbedding(500, 24, method=method, **SMALL[method])
    model = keras.Model(inputs, layer(inputs))
    if frozen:
        layer.freeze()
    old, size = layer.embeddings(), layer.plan.size
    layer.grow(650)
    assert (layer.input_dim, layer.plan.size) == (650, size)
    np.testing.assert_allclose(layer.embeddings()[:500], old, rtol=1e-5, atol=1e-7)
    assert np.isfinite(layer.embeddings()).all()
    model.save(tmp_path / "grown.keras")
    again = keras.saving.load_model(tmp_path / "grown.keras").layers[1]
    np.testing.assert_allclose(again.embeddings()[:500], old, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="650 entities already"):
        layer.grow(600)
    for wrong in (700.5, "x", float("nan"), True):
        with pytest.raises(ValueError, match="`input_dim` must be an integer"):
            layer.grow(wrong)


def test_new_integers_are_the_last_ones_with_its_scale():
    matrix = RNG.normal(size=(40, 8)) * np.arange(1, 41)[:, None]
    layer = layers.CompressedEmbedding.from_embedding(matrix, method="reduced", bits=8, frozen=True)
    layer.grow(42)
    np.testing.assert_array_equal(layer.embeddings([40, 41]), layer.embeddings([39, 39]))


def test_a_tensor_train_cannot_grow():
    layer = built(layers.CompressedEmbedding, 500, 24, method="tensor_train", size=4)
    with pytest.raises(ValueError, match="would all change"):
        layer.grow(600)


# Hashes


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31 - 2), st.integers(1, 100_000), st.integers(0, 5))
def test_the_hash_is_the_same_without_overflow(number, buckets, seed):
    found = int(array(mix(ops.convert_to_tensor([number], dtype="int32"), buckets, seed))[0])
    exact = int(mix(np.array([number], np.int64), buckets, seed)[0])
    assert found == exact
    assert 0 <= found < buckets


def test_the_hash_fills_its_buckets():
    found = array(mix(ops.arange(100_000, dtype="int32"), 1000))
    counts = np.bincount(found, minlength=1000)
    # Of independent draws: mean 100, deviation 10; five deviations in a thousand buckets are one chance in 2,000.
    assert counts.min() > 50
    assert counts.max() < 150
    other = array(mix(ops.arange(100_000, dtype="int32"), 1000, 1))
    assert np.mean(found == other) < 0.002


# Bad input


@pytest.mark.parametrize("ids", [np.array([1.0]), np.array([True]), [[0.5]]])
def test_ids_must_be_integers(ids):
    with pytest.raises(TypeError, match="integers"):
        built(input_dim=10, output_dim=4, hash_size=3)(np.asarray(ids))


def test_symbolic_ids_must_be_integers():
    with pytest.raises(TypeError, match="integers"):
        layers.MEmComEmbedding(10, 4, hash_size=3)(keras.Input((3,), dtype="bool"))


@pytest.mark.parametrize("wrong", [-1, 10, 2**31 - 1])
@pytest.mark.parametrize("method", METHODS)
def test_ids_out_of_range(wrong, method):
    layer = built(
        layers.CompressedEmbedding,
        10,
        8,
        method=method,
        **{**SMALL[method], "compression": None, "size": 2 if method == "tensor_train" else 8},
    )
    with pytest.raises(ValueError, match=f"from 0 to 9. Received: {wrong}"):
        layer(np.array([0, wrong]))


def test_policies_for_ids_out_of_range():
    for policy, places in {"clip": [0, 9, 9], "wrap": [9, 0, 7]}.items():
        layer = built(input_dim=10, output_dim=4, hash_size=10, out_of_range=policy)
        np.testing.assert_array_equal(
            array(layer(np.array([-1, 10, 17 if policy == "wrap" else 99]))), layer.embeddings(places)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_dim": 0}, "input_dim"),
        ({"output_dim": 2.5}, "output_dim"),
        ({"compression": 4, "hash_size": 3}, "not both"),
        ({"compression": "much"}, "number from 1 on"),
        ({"compression": -2}, "number from 1 on"),
        ({"hash_size": 11}, "out of range"),
        ({"scalars": 3}, "divide"),
        ({"bits": 3}, "bits"),
        ({"scalar_bits": 4}, "scalar_bits"),
        ({"hash": "md5"}, "hash"),
        ({"own_rows": 10}, "own_rows"),
        ({"own_rows": 2.5}, "own_rows"),
        ({"bits": 8.0}, "bits"),
        ({"scalar_bits": 8.0}, "scalar_bits"),
        ({"hash_size": True}, "positive integer"),
        ({"combiner": "max"}, "combiner"),
        ({"out_of_range": "ignore"}, "out_of_range"),
        ({"form": "square"}, "form"),
        ({"form": "subspace", "bias": True}, "scaled form"),
        ({"form": "codebooks", "own_rows": 3, "hash_size": 2}, "scaled form"),
        ({"form": "codebooks", "bits": 4, "hash_size": 2}, "32, 16 or 8 bits"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        layers.MEmComEmbedding(**{"input_dim": 10, "output_dim": 4, **options})


@pytest.mark.parametrize(
    ("method", "options"), [("robe", {"block": 0}), ("deep_hash", {"hashes": 0}), ("double", {"own_rows": 1.5})]
)
def test_wrong_arguments_of_methods(method, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        layers.CompressedEmbedding(1000, 16, method=method, size=20, **options)


@pytest.mark.parametrize(
    "options",
    [{"method": "robe"}, {"method": "naive", "hash": "mix"}, {"method": "hash_embedding"}, {"method": "double"}],
)
def test_no_more_buckets_than_a_hash_has(options):
    layer = layers.CompressedEmbedding(2**30, 64, compression=1, **options)  # would be 256 GB, and is not built
    assert layer.plan.size <= MOST_BUCKETS


def test_half_precision_has_no_scale_of_zero():
    layer = built(input_dim=100, output_dim=8, hash_size=9, bias=True, scalar_bits=8, dtype="float16")
    assert np.isfinite(layer.embeddings()).all()
    zeros = layers.MEmComEmbedding.from_embedding(np.zeros((100, 8)), hash_size=9, bits=8, dtype="float16")
    assert not zeros.embeddings().any()


def test_vectors_of_ids_of_any_shape():
    layer = built(input_dim=50, output_dim=8, hash_size=9)
    assert layer.embeddings(5).shape == (8,)
    np.testing.assert_array_equal(layer.embeddings([[5, 6], [7, 8]]), layer.embeddings()[[[5, 6], [7, 8]]])


def test_unknown_options_and_methods():
    with pytest.raises(TypeError, match="no option 'bias'"):
        layers.CompressedEmbedding(10, 4, method="naive", bias=True)
    with pytest.raises(ValueError, match="quotient_remainder"):
        layers.CompressedEmbedding(10, 4, method="magic")
    with pytest.raises(ValueError, match="build"):
        layers.MEmComEmbedding(10, 4, hash_size=3).freeze()


# What a reviewer found


@pytest.mark.parametrize("combiner", [None, "mean"])
def test_a_fitted_layer_deploys_for_the_shape_that_it_is_called_with(combiner):
    layer = layers.MEmComEmbedding.from_embedding(RNG.normal(size=(40, 6)), compression=2, combiner=combiner)
    inputs = keras.Input((5,), dtype="int32")
    model = keras.Model(inputs, layer(inputs))
    ids = RNG.integers(0, 40, (3, 5))
    np.testing.assert_allclose(array(deploy(model)(ids)), array(model(ids)), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_a_regularizer_is_the_mean_over_vectors_in_any_precision(dtype):
    """A sum of half a million squares leaves float16's range."""
    initializer = keras.initializers.RandomNormal(stddev=1.0, seed=0)
    layer = layers.MEmComEmbedding(500, 64, initializer, keras.regularizers.L2(1.0), hash_size=400, dtype=dtype)
    ids = RNG.integers(0, 500, (512, 64))
    layer(ids, training=True)
    expected = np.square(layer.embeddings(ids)).sum() / ids.size
    assert float(layer.losses[0]) == pytest.approx(expected, rel=0.02)


def test_a_fitted_layer_inside_a_wrapper_deploys():
    """It was built before, and the wrapper's calls leave no trace on it."""
    layer = layers.MEmComEmbedding.from_embedding(RNG.normal(size=(40, 6)), compression=2, combiner="mean")
    inputs = keras.Input((2, 3, 4), dtype="int32")
    model = keras.Model(inputs, keras.layers.TimeDistributed(layer)(inputs))
    ids = RNG.integers(0, 40, (5, 2, 3, 4))
    np.testing.assert_allclose(array(deploy(model)(ids)), array(model(ids)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["memcom", "codebooks", "factorised"])
def test_a_shared_layer_deploys_for_all_lengths_and_ranks(method):
    """An item and a history of items, as recommenders have them: the tables stay shared."""
    layer = layers.CompressedEmbedding(400, 6, method=method, size=3, bits=8)
    a, b, c = (keras.Input(shape, dtype="int32") for shape in ((), (5,), (2, 3)))
    model = keras.Model([a, b, c], [layer(a), layer(b), layer(c)])
    assert deploy(model).count_params() == deploy(keras.Model(b, layer(b))).count_params()
    ids = [RNG.integers(0, 400, (3, *x.shape[1:])) for x in (a, b, c)]
    for left, right in zip(deploy(model)(ids), model(ids), strict=True):
        np.testing.assert_allclose(array(left), array(right), rtol=1e-5, atol=1e-6)
    alone = keras.Sequential([keras.Input((5,), dtype="int32"), layer])  # has the ranks of all its calls
    np.testing.assert_allclose(array(deploy(alone)(ids[1])), array(alone(ids[1])), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"mask_zero": True}, {"combiner": "mean", "mask_zero": True}])
def test_a_model_deployed_for_several_ranks_is_read_from_its_file(options, tmp_path):
    """With a second layer whose name begins alike, as Keras names them, and a call by keyword."""
    first, second = (layers.MEmComEmbedding(400, 6, hash_size=30, name=name, **options) for name in ("e", "e_1"))
    a, b = keras.Input((5,), dtype="int32"), keras.Input((2, 3), dtype="int32")
    model = keras.Model([a, b], [first(a), first(inputs=b), second(a)])
    ids = [RNG.integers(0, 400, (3, *x.shape[1:])) for x in (a, b)]
    deployed = deploy(model)
    deployed.save(tmp_path / "deployed.keras")
    for other in (deployed, keras.saving.load_model(tmp_path / "deployed.keras")):
        for left, right in zip(other(ids), model(ids), strict=True):
            np.testing.assert_allclose(array(left), array(right), rtol=1e-5, atol=1e-6)


def test_other_lengths_than_were_seen_when_the_model_was_made():
    layer = layers.MEmComEmbedding(400, 6, hash_size=30)
    a, b, c = (keras.Input(shape, dtype="int32") for shape in ((5,), (2, 3), (2, 6)))
    each = keras.layers.TimeDistributed
    model = keras.Model([a, b, c], [layer(a), each(layer)(b), each(layer)(c)])
    ids = [RNG.integers(0, 400, (3, *x.shape[1:])) for x in (a, b, c)]
    for left, right in zip(deploy(model)(ids), model(ids), strict=True):
        np.testing.assert_allclose(array(left), array(right), rtol=1e-5)
    line = keras.Sequential([layers.MEmComEmbedding(400, 6, hash_size=30)])
    line(ids[0])
    longer = RNG.integers(0, 400, (3, 9))
    np.testing.assert_allclose(array(deploy(line)(longer)), array(line(longer)), rtol=1e-5)


def test_a_layer_of_several_ranks_deploys_inside_of_models_and_not_of_wrappers():
    layer = layers.MEmComEmbedding(40, 6, hash_size=5, name="items")
    a, b = keras.Input((5,), dtype="int32"), keras.Input((2, 5), dtype="int32")
    inner = keras.Model([a, b], [layer(a), layer(b)], name="inner")
    model = keras.Model([a, b], [*inner([a, b]), layer(a)])
    ids = [RNG.integers(0, 40, (3, *x.shape[1:])) for x in (a, b)]
    deployed = deploy(model)
    assert deployed.count_params() == deploy(keras.Model(a, layer(a))).count_params()
    for left, right in zip(deployed(ids), model(ids), strict=True):
        np.testing.assert_allclose(array(left), array(right), rtol=1e-5)
    wrapped = keras.Model([a, b], [layer(a), keras.layers.TimeDistributed(layer, name="each")(b), layer(b)])
    with pytest.raises(UnsupportedLayer, match=r"each.*cannot be called as it is"):
        deploy(wrapped)


def test_a_layer_that_is_given_floats_and_integers_of_several_ranks_deploys():
    layer = layers.MEmComEmbedding(40, 6, hash_size=5, name="items")
    line = keras.Sequential([layer])  # without an Input: its ids are floats
    line(np.zeros((1, 4), "int32"))
    a, b = keras.Input((4,)), keras.Input((), dtype="int32")
    model = keras.Model([a, b], [line(a), layer(b)])
    ids = [RNG.integers(0, 40, (3, 4)).astype("float32"), RNG.integers(0, 40, 3)]
    for left, right in zip(deploy(model)(ids), model(ids), strict=True):
        np.testing.assert_allclose(array(left), array(right), rtol=1e-5)


def test_a_shared_layer_deploys_for_calls_with_and_without_weights():
    layer = layers.MEmComEmbedding(40, 6, hash_size=5, combiner="mean")
    a, w = keras.Input((4,), dtype="int32"), keras.Input((4,))
    model = keras.Model([a, w], [layer(a), layer([a, w])])
    values = [RNG.integers(0, 40, (3, 4)), RNG.random((3, 4)).astype("float32")]
    for left, right in zip(deploy(model)(values), model(values), strict=True):
        np.testing.assert_allclose(array(left), array(right), rtol=1e-5)


def test_a_shared_layer_deploys_for_all_lengths():
    layer = layers.MEmComEmbedding(40, 6, hash_size=5, combiner="mean")
    a, b = keras.Input((5,), dtype="int32"), keras.Input((7,), dtype="int32")
    model = keras.Model([a, b], [layer(a), layer(b)])
    ids = [RNG.integers(0, 40, (3, 5)), RNG.integers(0, 40, (3, 7))]
    for left, right in zip(deploy(model)(ids), model(ids), strict=True):
        np.testing.assert_allclose(array(left), array(right), rtol=1e-5)


@pytest.mark.parametrize("begin", [[], [keras.Input((6,))], [keras.Input((6,), dtype="int32")]])
def test_a_sequential_model_begins_with_it_as_with_an_embedding(begin, tmp_path):
    """Without an Input, or with one without a dtype, Keras makes floats of the ids before the layer sees them."""
    model = keras.Sequential([*begin, layers.MEmComEmbedding(500, 8, hash_size=5, combiner="mean", mask_zero=True)])
    ids = RNG.integers(0, 500, (4, 6))
    model.compile("sgd", "mse")
    model.fit(ids, np.zeros((4, 8), "float32"), verbose=0)
    expected = array(model(ids))
    np.testing.assert_allclose(array(deploy(model)(ids)), expected, rtol=1e-5)
    model.save(tmp_path / "model.keras")
    np.testing.assert_allclose(array(keras.models.load_model(tmp_path / "model.keras")(ids)), expected, rtol=1e-6)
    if not begin or begin[0].dtype == "float32":
        with pytest.raises(TypeError, match=r"integers. Received: 1\.5"):
            model(np.full((4, 6), 1.5, "float32"))


@pytest.mark.parametrize(("policy", "entities"), [("mixed_bfloat16", 257), ("mixed_float16", 2049), ("float32", 2**25)])
def test_a_model_that_makes_floats_of_ids_must_tell_them_apart(policy, entities):
    model = keras.Sequential([layers.MEmComEmbedding(entities, 8, hash_size=5, dtype=policy)])
    with pytest.raises(TypeError, match=r"keras.Input\(shape, dtype="):
        model(np.array([[1, 2]]))


@pytest.mark.parametrize("method", ["memcom", "codebooks", "tensor_train", "hash_embedding"])
def test_fits_of_frozen_and_of_pooling_layers(method):
    matrix = RNG.normal(size=(200, 24)).astype("float32")
    options = {**SMALL[method], "method": method}
    keras.utils.set_random_seed(0)
    plain = layers.CompressedEmbedding.from_embedding(matrix, **options)
    error = weighted_error(matrix, plain.embeddings(), np.ones(200))
    for changed in ({"frozen": True}, {"combiner": "mean"}):
        keras.utils.set_random_seed(0)
        layer = layers.CompressedEmbedding.from_embedding(matrix, **options, **changed)
        assert layer.frozen == ("frozen" in changed)
        assert weighted_error(matrix, layer.embeddings(), np.ones(200)) == pytest.approx(error, rel=0.05)


def test_fits_of_nothing_and_of_few():
    for method in ("codebooks", "factorised", "memcom", "quotient_remainder"):
        layer = layers.CompressedEmbedding.from_embedding(np.zeros((200, 24)), method=method, **SMALL[method])
        assert np.abs(layer.embeddings()).max() < 1e-6
    few = layers.CompressedEmbedding.from_embedding(RNG.normal(size=(4, 24)), method="factorised", size=10)
    assert np.isfinite(few.embeddings()).all()


def test_a_quantised_embedding_is_refused():
    stock = keras.layers.Embedding(40, 8)
    stock.build()
    stock.quantize("int8")
    with pytest.raises(ValueError, match="quantised"):
        layers.MEmComEmbedding.from_embedding(stock, compression=2)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="JAX has no integers of 64 bits by default")
def test_ids_of_64_bits_are_not_cut():
    ids = np.array([2**31 + 5, 2**32 + 3], np.int64)
    for policy, places in {"clip": [9, 9], "wrap": [3, 9]}.items():
        layer = built(input_dim=10, output_dim=4, hash_size=10, out_of_range=policy)
        np.testing.assert_array_equal(array(layer(ops.convert_to_tensor(ids))), layer.embeddings(places))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="JAX has no integers of 64 bits by default")
@pytest.mark.parametrize("policy", ["clip", "wrap"])
def test_ids_of_64_bits_are_not_cut_in_the_deployed_form(policy):
    inputs = keras.Input((2,), dtype="int64")
    model = keras.Model(inputs, layers.MEmComEmbedding(10, 4, hash_size=7, out_of_range=policy)(inputs))
    ids = np.array([[2**31 + 5, 2**32 + 3], [-(2**40), 4]], np.int64)
    np.testing.assert_array_equal(array(deploy(model)(ids)), array(model(ids)))


def test_the_mean_of_nothing_is_zero():
    layer = built(input_dim=10, output_dim=4, hash_size=3, combiner="mean")
    assert not array(layer(np.zeros((2, 0), "int32"))).any()


def test_tables_of_a_seeded_initializer_differ():
    initializer = keras.initializers.RandomNormal(seed=3)
    layer = built(layers.CompressedEmbedding, 50, 8, initializer, method="double", size=5)
    assert np.any(array(layer._state["first"]) != array(layer._state["second"]))


@pytest.mark.parametrize("size", [0, -1, 3.5])
def test_sizes_are_positive_integers(size):
    with pytest.raises(ValueError, match="positive integer"):
        layers.MEmComEmbedding(10, 4, hash_size=size)


@pytest.mark.parametrize("method", ["tensor_train", "deep_hash", "factorised"])
def test_methods_whose_largest_size_is_no_default(method):
    with pytest.raises(ValueError, match="needs `compression` or `size`"):
        layers.CompressedEmbedding(1000, 8, method=method)
