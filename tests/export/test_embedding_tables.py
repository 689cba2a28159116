"""Embedding tables in exported files: read row by row, in no more bytes than the layer has; wrong ids raise."""

from __future__ import annotations

import keras
import numpy as np
import onnx
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from keras import layers as L
from keras import ops

from keras_efficient import export
from keras_efficient.deploy import deploy
from keras_efficient.errors import ConversionError, UnsupportedLayer, WrongArgument
from keras_efficient.export import flatbuffer, verify
from keras_efficient.export.graph import Graph
from keras_efficient.export.lowerings.embedding_lookup import embedding_lookup
from keras_efficient.export.lowerings.flat_dense import flat_dense
from keras_efficient.export.lowerings.integer_table import integer_table
from keras_efficient.export.signature import input_specs
from keras_efficient.export.targets import Request, registry, tflite
from keras_efficient.layers import CompressedEmbedding, MEmComEmbedding

ENTITIES, COLUMNS = 600, 16
EXTRA_BYTES = 6 * 1024  # of the graph, its names and our metadata
# Of keras.ops.take, of a table that is widened as a whole, and of shapes that are computed.
FORBIDDEN = {"LESS", "SELECT", "SELECT_V2", "DEQUANTIZE", "SHAPE"}


def memcom(**options) -> keras.layers.Layer:
    return MEmComEmbedding(ENTITIES, COLUMNS, **{"hash_size": 60, "name": "table", **options})


def other(method: str, **options) -> keras.layers.Layer:
    return CompressedEmbedding(ENTITIES, COLUMNS, method=method, name="table", **options)


# Each with the number formats of the tables that EMBEDDING_LOOKUP reads.
LAYERS = {
    "stock": (lambda: L.Embedding(ENTITIES, COLUMNS, name="table"), []),
    "memcom": (memcom, []),
    "memcom 8": (lambda: memcom(bits=8, scalar_bits=8), []),
    "memcom 4": (lambda: memcom(bits=4), ["int4"]),
    "memcom 2": (lambda: memcom(bits=2), ["int2"]),
    "subspace 2": (lambda: memcom(hash_size=12, form="subspace", bits=2), ["int2"]),
    "subspace 2, rows that end inside a byte": (lambda: memcom(hash_size=11, form="subspace", bits=2), ["int2"]),
    "subspace 1": (lambda: memcom(hash_size=12, form="subspace", bits=1), ["int2"]),  # of the 256 bytes' signs
    "codebooks": (lambda: memcom(hash_size=5, form="codebooks"), []),
    "codebooks 8": (lambda: memcom(hash_size=4, form="codebooks", bits=8), []),
    "quotient_remainder 8": (lambda: other("quotient_remainder", size=40, bits=8), []),
    "factorised 4": (lambda: other("factorised", size=5, bits=4), ["int4"]),
    "reduced 16": (lambda: other("reduced", size=8, bits=16), []),
}


def network(layer: keras.layers.Layer, shape=(8,), batch: int | None = None, weighted: bool = False) -> keras.Model:
    """A model that is the layer; scalars, which begin as ones, are made different, as training would."""
    keras.utils.set_random_seed(1)
    ids = keras.Input(shape, batch_size=batch, dtype="int32", name="ids")
    inputs = [ids, keras.Input(shape, batch_size=batch, name="weights")] if weighted else ids
    model = keras.Model(inputs, layer(inputs))
    generator = np.random.default_rng(2)
    for weight in layer.weights:
        if not weight.trainable:  # the choices of codebooks
            continue
        noise = generator.normal(0, 0.3, weight.shape)
        weight.assign(weight + (noise if weight.shape else 0.1))
    return model


def nbytes(layer: keras.layers.Layer) -> int:
    return getattr(layer, "nbytes", 4 * ENTITIES * COLUMNS)


def lookups(path) -> list[str]:
    """Number formats of the tables that EMBEDDING_LOOKUP reads."""
    operators = flatbuffer.operators(path.read_bytes())
    return [op.inputs[1].dtype for op in operators if op.name == "EMBEDDING_LOOKUP"]


def every_id(batch: int | None = None) -> list[np.ndarray]:
    ids = np.arange(ENTITIES, dtype=np.int32).reshape(-1, 8)
    return np.split(ids, len(ids) // batch) if batch else [ids]


def assert_equal(path, model: keras.Model, inputs: list) -> None:
    """1e-5: sums of the same float32 products in another order."""
    run = export.load(path)
    for sample in inputs:
        np.testing.assert_allclose(run(sample), np.asarray(model(sample)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch", [None, 3])
def test_a_file_is_as_small_as_its_layer_and_reads_only_rows(tmp_path, name, batch):
    make, formats = LAYERS[name]
    model, path = network(layer := make(), batch=batch), tmp_path / "m.tflite"
    report = export.save(model, path)
    assert not FORBIDDEN & set(report.ops)
    if not name.startswith("codebooks"):  # they add where a codebook begins
        assert "int32" not in report.ops.get("ADD", {})
    assert report.bytes <= nbytes(layer) * 1.02 + EXTRA_BYTES
    assert lookups(path) == formats
    assert any("EMBEDDING_LOOKUP" in note for note in report.notes) == bool(formats)
    assert_equal(path, model, every_id(batch))


@pytest.mark.parametrize("combiner", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_pooled_vectors(tmp_path, combiner, weighted):
    layer = memcom(bits=4, combiner=combiner)
    model, path = network(layer, weighted=weighted), tmp_path / "m.tflite"
    report = export.save(model, path)
    assert not {"LESS", "SELECT", "DEQUANTIZE"} & set(report.ops)  # SELECT_V2 guards the sum of the weights
    assert lookups(path) == ["int4"]
    ids = every_id()[0]
    weights = np.random.default_rng(3).random(ids.shape, dtype=np.float32)
    assert_equal(path, model, [[ids, weights] if weighted else ids])


@pytest.mark.parametrize(("shape", "sample"), [((), (7,)), ((3, 5), (2, 3, 5)), ((None,), (2, 9))])
@pytest.mark.parametrize("bits", [4, 1])
def test_ids_of_any_shape(tmp_path, shape, sample, bits):
    model, path = network(memcom(bits=bits), shape), tmp_path / "m.tflite"
    report = export.save(model, path)
    assert ("SHAPE" in report.ops) == (shape == (None,))  # two free axes are more than constants can say
    assert not {"LESS", "SELECT_V2"} & set(report.ops)
    assert_equal(path, model, [np.random.default_rng(4).integers(0, ENTITIES, sample).astype(np.int32)])


@pytest.mark.parametrize("suffix", [".tflite", ".onnx"])
@pytest.mark.parametrize("name", ["stock", "memcom", "memcom 8", "memcom 4"])
def test_ids_out_of_range_raise(tmp_path, suffix, name):
    path = tmp_path / f"m{suffix}"
    export.save(network(LAYERS[name][0]()), path)
    run = export.load(path)
    ids = np.zeros((1, 8), np.int32)
    for wrong in (-1, ENTITIES, -ENTITIES, np.iinfo(np.int32).min):
        ids[0, 5] = wrong
        with pytest.raises(Exception, match=r"out of (data )?bounds"):
            run(ids)
    ids[0, 5] = ENTITIES - 1
    assert np.isfinite(run(ids)).all()


def test_64_bit_ids_and_the_mask_of_a_stock_embedding(tmp_path):
    ids = keras.Input((6,), dtype="int64", name="ids")
    pooled = L.GlobalAveragePooling1D()(L.Embedding(50, 4, mask_zero=True)(ids))
    model, path = keras.Model(ids, pooled), tmp_path / "m.tflite"
    report = export.save(model, path)
    assert report.lowerings == ("plain-gather",)
    assert report.ops["GATHER"] == {"int64": 1}
    assert_equal(path, model, [np.array([[3, 49, 0, 0, 7, 0], [1, 2, 3, 4, 5, 6]])])


def test_a_layer_that_is_called_twice_and_one_inside_a_wrapper(tmp_path):
    first, second = (keras.Input((6,), dtype="int32", name=name) for name in "ab")
    layer = memcom(bits=4)
    wrapped = L.TimeDistributed(L.Embedding(ENTITIES, COLUMNS))(first[..., None])
    model, path = keras.Model([first, second], layer(first) + layer(second) + wrapped[:, :, 0]), tmp_path / "m.tflite"
    report = export.save(model, path)
    assert lookups(path) == ["int4", "int4"]
    assert not {"LESS", "SELECT_V2"} & set(report.ops)
    ids = np.random.default_rng(4).integers(0, ENTITIES, (2, 3, 6)).astype(np.int32)
    assert_equal(path, model, [list(ids)])


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_that_is_called_with_several_ranks(tmp_path, bits):
    item, history = keras.Input((), dtype="int32", name="item"), keras.Input((6,), dtype="int32", name="history")
    layer = MEmComEmbedding(20_000, COLUMNS, hash_size=100, bits=bits, scalar_bits=8)
    model, path = (
        keras.Model([item, history], ops.sum(layer(item)[:, None] * layer(history), -1)),
        tmp_path / "m.tflite",
    )
    report = export.save(model, path, precision="float32")
    assert lookups(path) == (["int4", "int4"] if bits == 4 else [])
    assert report.bytes < 1.5 * layer.nbytes
    generator = np.random.default_rng(4)
    ids = [generator.integers(0, ENTITIES, shape).astype(np.int32) for shape in ((3,), (3, 6))]
    assert_equal(path, model, [ids])
    if bits == 8:
        export.save(model, tmp_path / "int8.tflite", precision="int8", calibration={"item": ids[0], "history": ids[1]})


def test_ids_that_come_as_floats_are_drawn_whole(tmp_path):
    """Of an input that Keras gives no dtype: samples must be ids all the same."""
    model = keras.Sequential([keras.Input((6,)), memcom(), L.Flatten(), L.Dense(3)])
    report = export.save(model, tmp_path / "m.tflite")
    assert report.sqnr_db > 60


def test_a_file_with_a_loop_reads_its_table_alike(tmp_path):
    ids = keras.Input((None,), dtype="int32", name="ids")
    path = tmp_path / "m.tflite"
    report = export.save(keras.Model(ids, L.GRU(4)(memcom(bits=4)(ids))), path)
    assert "WHILE" in report.ops
    assert lookups(path) == ["int4"]


@pytest.mark.parametrize("precision", ["float16", "dynamic", "int8-weights", "int4-weights"])
def test_other_float_precisions_keep_the_integers(tmp_path, precision):
    layer = memcom(bits=4, hash_size=300)
    model, path = network(layer), tmp_path / "m.tflite"
    report = export.save(model, path, precision=precision)
    assert lookups(path) == ["int4"]
    assert report.bytes <= layer.nbytes * 1.02 + EXTRA_BYTES
    run, ids = export.load(path), every_id()[0]
    error = np.abs(run(ids) - np.asarray(model(ids)))
    # Half precision and eight bits of the row scales and of the scalars.
    assert error.max() <= {"float16": 2e-3, "dynamic": 3e-2}.get(precision, 1e-6) * np.abs(model(ids)).max()


def test_half_precision_widens_rows_and_no_table(tmp_path):
    model, path = network(L.Embedding(ENTITIES, COLUMNS)), tmp_path / "m.tflite"
    report = export.save(model, path, precision="float16")
    assert report.bytes <= 2 * ENTITIES * COLUMNS + EXTRA_BYTES
    gather, widening = flatbuffer.operators(path.read_bytes())
    assert (gather.name, gather.inputs[0].dtype, widening.name) == ("GATHER", "float16", "DEQUANTIZE")
    assert not widening.inputs[0].constant
    # The converter's own file, which does widen the table, is refused.
    request = Request(registry["tflite"], "float16", input_specs(model))
    tflite.convert_plainly(model, request, path)
    with pytest.raises(ConversionError, match=r"whole table \(float16, 600×16\)"):
        tflite.check(path, model, request)


def test_half_precision_holds_the_small_scales_of_16_bits(tmp_path):
    """A row of values around 1e-4 has the scale 3e-9, where float16 ends at 6e-8."""
    model = network(layer := other("reduced", size=COLUMNS, bits=16))
    layer.weights[0].assign(np.random.default_rng(0).normal(0, 1e-4, (ENTITIES, COLUMNS)))
    export.save(model, tmp_path / "m.tflite", precision="float16")
    ids = every_id()[0]
    error = export.load(tmp_path / "m.tflite")(ids) - np.asarray(model(ids))
    assert np.abs(error).max() < 1e-3 * 4e-4


@pytest.mark.parametrize("name", ["stock", "memcom", "memcom 8"])
def test_int8_files_gather_int8(tmp_path, name):
    ids = np.random.default_rng(0).integers(0, ENTITIES, (20, 8)).astype(np.int32)
    model = network(layer := LAYERS[name][0]())
    report = export.save(model, tmp_path / "m.tflite", precision="int8", calibration=ids)
    assert not FORBIDDEN & set(report.ops)
    assert report.bytes <= nbytes(layer) * 1.02 + EXTRA_BYTES


@pytest.mark.parametrize("bits", [4, 2, 1])
@pytest.mark.parametrize("precision", ["int8", "int16x8"])
def test_int8_files_refuse_tables_of_fewer_bits(tmp_path, bits, precision):
    ids = np.arange(32, dtype=np.int32).reshape(4, 8)
    with pytest.raises(UnsupportedLayer, match=rf"'table/rows': its table has {bits}-bit numbers"):
        export.save(network(memcom(bits=bits)), tmp_path / "m.tflite", precision=precision, calibration=ids)


def test_an_operator_that_the_quantiser_does_not_know_is_named_with_its_layer(tmp_path):
    ids = np.arange(32, dtype=np.int32).reshape(4, 8)
    with pytest.raises(ConversionError, match=r"layer 'table': .*FLOOR_MOD"):
        export.save(network(memcom()), tmp_path / "m.tflite", precision="int16x8", calibration=ids)


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("stock", "memcom 2")])
def test_onnx_keeps_integers_and_raises_no_size(tmp_path, name):
    model, path = network(layer := LAYERS[name][0]()), tmp_path / "m.onnx"
    report = export.save(model, path)
    assert "checked-gather" in report.lowerings
    file = onnx.load(path)
    assert file.opset_import[0].version == 18
    held = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in file.graph.initializer)
    assert held <= nbytes(layer) * 1.02 + 512
    assert_equal(path, model, every_id())


@pytest.mark.parametrize("suffix", [".tflite", ".onnx"])
def test_a_file_that_lost_its_integers_is_refused(tmp_path, suffix):
    model = network(other("reduced", size=COLUMNS, bits=8))
    less = network(CompressedEmbedding(20, COLUMNS, method="reduced", bits=8))
    path, target = tmp_path / f"m{suffix}", registry.find(None, tmp_path / f"m{suffix}")
    export.save(less, path)
    request = Request(target, "float32", input_specs(model))
    candidate = next(target.lower(deploy(model), request))
    with pytest.raises(ConversionError, match="alone"):
        target.check(path, candidate.model, request)


@pytest.mark.parametrize("bits", [32, 16, 8, 4, 2, 1])
def test_weights_count_as_they_are_stored(bits):
    model = network(layer := other("reduced", size=COLUMNS, bits=bits))
    request = Request(registry["tflite"], "float32", input_specs(model))
    candidate = next(tflite.lower(deploy(model), request))
    assert tflite.weight_bytes(candidate.model) == pytest.approx(layer.nbytes, abs=8)  # a scale of the whole table


def test_a_model_whose_values_lie_on_no_grid_is_left_alone():
    def nested(values) -> keras.Model:
        codes = keras.Input((8,), dtype="int32")
        table = L.Embedding(ENTITIES, 4, dtype="uint8", embeddings_initializer="ones")
        inner = keras.Model(codes, values(ops.cast(table(codes), "float32"), codes), name="rows")
        ids = keras.Input((8,), dtype="int32")
        return keras.Model(ids, inner(ids))

    on_grid = nested(lambda x, codes: (x - 3.0) * 0.25)
    assert integer_table(on_grid).get_layer("rows").step == 0.25
    others = [
        lambda x, codes: x / (x + 1.0),
        lambda x, codes: ops.sqrt(x),
        lambda x, codes: x[:, ::-1] * 0.25,
        lambda x, codes: x + L.Embedding(ENTITIES, 1, embeddings_initializer=keras.initializers.Constant(0.4))(codes),
        lambda x, codes: x * L.Embedding(ENTITIES, 1, embeddings_initializer="zeros")(codes),
    ]
    for values in others:
        model = nested(values)
        assert integer_table(model) is model


def converted(function) -> Graph:
    signature = [tf.TensorSpec((None,), tf.int32, name="ids")]
    concrete = tf.function(function, input_signature=signature).get_concrete_function()
    return Graph.from_bytes(tf.lite.TFLiteConverter.from_concrete_functions([concrete]).convert())


def test_wide_tables_and_those_read_in_another_way_as_well_are_left_alone():
    table = np.arange(-8, 8, dtype=np.int8).reshape(4, 4)
    wide = table * np.int8(2)  # faster as it is
    assert embedding_lookup(converted(lambda ids: tf.cast(tf.gather(wide, ids), tf.float32) * 0.5)) is None
    odd = table[:, :3]  # LiteRT finds no row that begins inside a byte
    assert embedding_lookup(converted(lambda ids: tf.cast(tf.gather(odd, ids), tf.float32) * 0.5)) is None
    scaled = converted(lambda ids: tf.cast(tf.gather(table, ids), tf.float32) * 0.5)
    assert [op.name for op in embedding_lookup(scaled).ops] == ["EMBEDDING_LOOKUP"]

    def twice(ids):
        rows = tf.gather(table, ids)
        return tf.cast(rows, tf.float32) * 0.5, tf.cast(rows, tf.int32)

    assert embedding_lookup(converted(twice)) is None
    flipped = converted(lambda ids: tf.cast(tf.gather(table, ids), tf.float32) * -0.5)  # no scale is negative
    assert [op.name for op in embedding_lookup(flipped).ops] == ["EMBEDDING_LOOKUP", "MUL"]


def test_two_scales_of_one_table_stay_behind_it():
    table = np.arange(-8, 8, dtype=np.int8).reshape(4, 4)

    def call(ids):
        return [tf.cast(tf.gather(table, place), tf.float32) * scale for place, scale in ((ids, 0.5), (ids + 1, 0.25))]

    rewritten = embedding_lookup(converted(call))
    names = [op.name for op in rewritten.ops]
    assert names.count("EMBEDDING_LOOKUP") == 2
    assert names.count("MUL") == 2
    interpreter = Interpreter(model_content=rewritten.to_bytes())
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], np.array([2], np.int32))
    interpreter.invoke()
    found = [interpreter.get_tensor(detail["index"])[0] for detail in interpreter.get_output_details()]
    wanted = [table[2] * 0.5, table[3] * 0.25]
    assert sorted(map(tuple, found)) == sorted(map(tuple, wanted))


@pytest.mark.parametrize("bits", [32, 4])
def test_samples_are_ids_that_the_model_knows(bits):
    model = network(memcom(bits=bits))
    for form, most in ((model, ENTITIES), (deploy(model), 60)):  # the deployed form shows the smallest of its tables
        drawn = verify.synthetic_samples(form, input_specs(model), 40)
        ids = np.concatenate([sample["ids"] for sample in drawn])
        assert 0.9 * most < ids.max() < most
        assert ids.min() >= 0


def test_a_dense_layer_of_one_free_axis_computes_no_shapes(tmp_path):
    inputs = keras.Input((5, 4), name="x")
    model, path = keras.Model(inputs, L.Dense(3, activation="softmax")(inputs)), tmp_path / "m.tflite"
    report = export.save(model, path)
    assert set(report.ops) == {"FULLY_CONNECTED", "RESHAPE", "SOFTMAX"}
    sample = np.random.default_rng(0).random((3, 5, 4), dtype=np.float32)
    assert_equal(path, model, [sample])
    free = keras.Input((None, 4))
    two_free = keras.Model(free, L.Dense(3)(free))
    export.save(two_free, path, overwrite=True)
    np.testing.assert_allclose(export.load(path)(sample), np.asarray(two_free(sample)), rtol=1e-5, atol=1e-6)
    inner = keras.Model(inputs, two_free(inputs))  # is given the sizes that it leaves free
    assert set(export.save(inner, path, overwrite=True).ops) == {"FULLY_CONNECTED", "RESHAPE"}
    flat = keras.Input((4,))
    two_axes = keras.Model(flat, L.Dense(3)(flat))
    assert flat_dense(two_axes) is two_axes


@pytest.mark.parametrize("suffix", [".tflite", ".onnx"])
def test_a_sum_in_a_batch_of_one_is_no_bias(tmp_path, suffix):
    ids, other = (keras.Input((5,), batch_size=1, dtype="int32", name=name) for name in ("ids", "other"))
    wide = keras.Input((5, 4), batch_size=1, name="wide")
    narrow = ops.cast(ops.expand_dims(ids + other, -1), "float32")
    model, path = keras.Model([ids, other, wide], wide + narrow), tmp_path / f"m{suffix}"
    report = export.save(model, path, verify=False)
    assert "plain-add" in report.lowerings
    values = [
        np.array([[1, 2, 3, 4, 5]], np.int32),
        np.array([[9, 8, 7, 6, 5]], np.int32),
        np.ones((1, 5, 4), "float32"),
    ]
    np.testing.assert_array_equal(export.load(path)(values), np.full((1, 5, 4), 11.0))


@pytest.mark.parametrize("name", ["subspace 2, rows that end inside a byte", "memcom 4", "subspace 1"])
def test_tables_of_a_model_read_from_a_file_are_known(tmp_path, name):
    """The way of the JAX backend: a process of its own converts what it reads."""
    make, formats = LAYERS[name]
    deploy(network(make())).save(tmp_path / "deployed.keras")
    export.save(keras.saving.load_model(tmp_path / "deployed.keras"), tmp_path / "read.tflite")
    assert lookups(tmp_path / "read.tflite") == formats


def test_ids_that_are_no_integers_are_refused(tmp_path):
    ids = keras.Input((4,), dtype="int32", name="ids")
    for suffix in (".tflite", ".onnx"):
        path = tmp_path / f"model{suffix}"
        export.save(keras.Model(ids, memcom()(ids)), path)
        run = export.load(path)
        with pytest.raises(WrongArgument, match=r"input 'ids' takes integers, received 1\.5"):
            run(np.full((1, 4), 1.5))
        np.testing.assert_array_equal(run(np.full((1, 4), 2.0)), run(np.full((1, 4), 2)))
