"""The tflite target: every precision, free sizes, metadata, and files that are not as they should be."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
from keras import layers as L

from keras_efficient import export
from keras_efficient.errors import ConversionError, FileProblem, WrongArgument
from keras_efficient.export import flatbuffer
from keras_efficient.export.lowerings.grouped_convolution import depthwise_convolutions, split_grouped_convolutions
from keras_efficient.export.lowerings.normalization import integer_normalization
from keras_efficient.export.lowerings.prelu import prelu_as_relu
from keras_efficient.export.lowerings.transposed_convolution import convolution_and_shuffle
from keras_efficient.export.lowerings.transposed_shuffle import transposed_shuffle
from keras_efficient.export.lowerings.unrolled_recurrence import unrolled_recurrence
from keras_efficient.export.runtime import LiteRTModel

PRECISIONS = export.targets["tflite"].precisions

# Least SQNR in dB on this network, about 6 dB (one bit) under what was measured: 127, 71, 40, 41, 47, 45, 22.
LEAST_SQNR = {
    "float32": 100,
    "float16": 62,
    "int8": 32,
    "int16x8": 34,
    "dynamic": 36,
    "int8-weights": 36,
    "int4-weights": 14,
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision(precision, saved, small_model, images):
    path, report = saved(precision)
    assert report.sqnr_db > LEAST_SQNR[precision]
    run = export.load(path)
    expected, found = small_model(images, training=False), run(images)
    assert found.dtype == np.float32
    assert found.shape == (12, 64, 64, 1)
    # The report's largest error was taken on these samples, and on larger ones besides.
    assert np.max(np.abs(found - expected)) <= report.max_error * 1.001 + 1e-6


@pytest.mark.parametrize("precision", ["int8-weights", "int4-weights"])
def test_large_weights_lie_behind_the_flatbuffer(precision, tmp_path):
    """The quantiser puts them there from about a megabyte on."""
    inputs = keras.Input((64,))
    model = keras.Model(inputs, keras.layers.Dense(20_000)(inputs))
    report = export.save(model, tmp_path / "large.tflite", precision=precision)
    assert report.sqnr_db > LEAST_SQNR[precision]
    assert report.bytes < 64 * 20_000 * (1 if precision == "int8-weights" else 0.5) + 300_000  # bias, scales
    assert flatbuffer.read_metadata((tmp_path / "large.tflite").read_bytes())["precision"] == precision


def test_weights_that_are_missing_behind_the_flatbuffer(tmp_path):
    from ai_edge_litert import schema_py_generated as schema

    inputs = keras.Input((4,))
    export.save(keras.Model(inputs, keras.layers.Dense(3)(inputs)), tmp_path / "m.tflite")
    model = flatbuffer.unpack((tmp_path / "m.tflite").read_bytes())
    weights = next(buffer for buffer in model.buffers if buffer.data is not None and len(buffer.data) == 48)
    weights.data, weights.offset, weights.size = None, 10**9, 48
    import flatbuffers

    builder = flatbuffers.Builder(1024)
    builder.Finish(schema.ModelT.Pack(model, builder), flatbuffer.IDENTIFIER)
    with pytest.raises(FileProblem, match="weights are missing"):
        flatbuffer.unpack(bytes(builder.Output()))


def test_smaller_numbers_make_smaller_files(saved):
    bytes_of = {precision: saved(precision)[1].bytes for precision in PRECISIONS}
    assert bytes_of["float32"] > bytes_of["float16"] > bytes_of["int8-weights"] > bytes_of["int4-weights"]


@pytest.mark.parametrize("precision", ["int8", "int16x8"])
def test_integer_precision_is_integers(precision, saved):
    _, report = saved(precision)
    assert {dtype for counts in report.ops.values() for dtype in counts} <= {"int8", "int16", "int32"}
    assert report.ops["CONV_2D"] == {"int8": 4} if precision == "int8" else {"int16": 3}  # one is doubled in int8


def test_int8_has_no_prelu(saved):
    """LiteRT runs an int8 PRELU outside XNNPACK and slower than float."""
    _, report = saved("int8")
    assert "PRELU" not in report.ops
    assert report.ops["MAXIMUM"] == {"int8": 1}
    assert any("maximum of two convolutions" in note for note in report.notes)


def test_int8_leaves_the_delegate_for_a_maximum_alone(saved):
    """XNNPACK has no MAXIMUM in integers; its partition before and the one behind it hold everything else."""
    path, _ = saved("int8")
    run = LiteRTModel(path)
    run(np.zeros((1, 32, 32, 1)))
    names = [detail["op_name"] for detail in run._interpreter._get_ops_details()]
    assert names.count("DELEGATE") == 2


def test_delegate_and_builtin_kernels_agree_to_two_steps(saved, images):
    """They round differently: one step in an inner layer may move an output by another one."""
    path, _ = saved("int8")
    fast, plain = LiteRTModel(path), LiteRTModel(path, delegate=False)
    steps = np.abs(fast(images) - plain(images)) / fast.output_step(fast.output_names[0])
    assert np.max(steps) < 2.01
    assert np.mean(steps) < 0.3


def test_free_sizes(saved, small_model):
    run = export.load(saved("float32")[0])
    assert run.input_shapes == {"y": (None, None, None, 1)}
    for shape in ((1, 5, 7, 1), (3, 16, 9, 1), (1, 5, 7, 1)):
        x = np.random.default_rng(3).random(shape, "float32")
        np.testing.assert_allclose(run(x), small_model(x), atol=1e-5)


def test_running_a_file_needs_neither_keras_nor_tensorflow(saved):
    code = """
        import sys, numpy as np
        from keras_efficient import export
        run = export.load(sys.argv[1])
        heavy = [name for name in ("keras", "tensorflow", "onnxruntime") if name in sys.modules]
        print(run(np.zeros((1, 8, 8, 1))).shape, heavy)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(saved("int8")[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(1, 16, 16, 1) []"


def test_fixed_size(small_model, tmp_path):
    report = export.save(small_model, tmp_path / "m.tflite", input_shape=(10, 12))
    run = export.load(tmp_path / "m.tflite")
    assert run.input_shapes == {"y": (1, 10, 12, 1)}
    assert report.macs == 10 * 12 * (9 * 16 + 9 * 16 * 16 + 9 * 16 * 4)
    with pytest.raises(WrongArgument, match=r"takes shape \(1, 10, 12, 1\)"):
        run(np.zeros((1, 10, 13, 1)))
    with pytest.raises(WrongArgument, match="received"):
        run({"z": np.zeros((1, 10, 12, 1))})


def test_metadata(saved):
    run = export.load(saved("int8")[0])
    assert run.scale == 2
    assert run.metadata["precision"] == "int8"
    assert run.metadata["lowerings"] == []
    assert run.metadata["inputs"] == ["y"]


def test_rewritten_metadata_replaces_and_harms_nothing(saved, images, tmp_path):
    path = tmp_path / "m.tflite"
    path.write_bytes(saved("float32")[0].read_bytes())
    before = export.load(path)(images[:1])
    size = path.stat().st_size
    for number in range(3):
        flatbuffer.write_metadata(path, {"n": number})
    assert flatbuffer.read_metadata(path.read_bytes()) == {"n": 2}
    assert path.stat().st_size <= size
    np.testing.assert_array_equal(export.load(path)(images[:1]), before)


def test_buffers_are_aligned(saved):
    """The schema demands 16 bytes; the generated Python writer aligns to one."""
    from ai_edge_litert import schema_py_generated as schema

    for precision in ("float32", "int8", "int4-weights"):
        model = schema.Model.GetRootAs(bytearray(saved(precision)[0].read_bytes()), 0)
        starts = [
            buffer._tab.Vector(buffer._tab.Offset(4)) % 16
            for buffer in map(model.Buffers, range(model.BuffersLength()))
            if not buffer.DataIsNone()
        ]
        assert len(starts) > 3
        assert set(starts) == {0}, precision


def test_operators_name_their_layers(saved, small_model):
    known = {layer.name for layer in small_model.layers}
    found = {operator.layer_among(known) for operator in flatbuffer.operators(saved("float32")[0].read_bytes())}
    assert {"first", "act", "middle", "last"} <= found


@pytest.mark.parametrize(
    ("name", "known", "path"),
    [
        ("functional_1/first_1/convolution;x/y", ("first",), "first"),
        ("functional_1/first_1/convolution", (), "first"),
        ("small/block/conv_2/convolution1", ("block", "conv_2"), "block/conv_2"),
        ("StatefulPartitionedCall:0", ("first",), ""),
    ],
)
def test_layer_path(name, known, path):
    assert flatbuffer.layer_path(name, known) == path


def test_bad_files(saved, tmp_path):
    whole = saved("float32")[0].read_bytes()
    cases = {
        "empty": (b"", "empty"),
        "junk": (b"no flatbuffer at all", "not a TFLite file"),
        "cut": (whole[:100], "damaged|cannot open"),
        "half": (whole[: len(whole) // 2], "damaged|cannot open"),
    }
    for name, (data, words) in cases.items():
        path = tmp_path / f"{name}.tflite"
        path.write_bytes(data)
        with pytest.raises(FileProblem, match=words):
            export.load(path)
    with pytest.raises(FileProblem, match="no such file"):
        export.load(tmp_path / "none.tflite")


def _no_such_operator(model):
    model.subgraphs[0].operators[0].opcodeIndex = 99


def _no_text(model):
    model.signatureDefs[0].inputs[0].name = b"\xff\xfe"


def _no_tensor(model):
    model.subgraphs[0].operators[0].inputs = [9999, 1, 2]


@pytest.mark.parametrize("damage", [_no_such_operator, _no_text, _no_tensor])
def test_damaged_files_that_still_unpack(saved, tmp_path, damage):
    model = flatbuffer.unpack(saved("float32")[0].read_bytes())
    damage(model)
    path = tmp_path / "m.tflite"
    path.write_bytes(flatbuffer.pack(model))
    with pytest.raises(FileProblem, match=r"m\.tflite: "):
        export.load(path)


def test_damage_names_the_file(saved, tmp_path):
    path = tmp_path / "m.tflite"
    path.write_bytes(saved("float32")[0].read_bytes()[:100])
    with pytest.raises(FileProblem, match=r"m\.tflite: (damaged|LiteRT)"):
        export.load(path)


def test_foreign_file_without_signature_and_metadata(tmp_path, small_model, images):
    import tensorflow as tf

    function = tf.function(lambda y: small_model(y, training=False)).get_concrete_function(
        tf.TensorSpec((1, 32, 32, 1), tf.float32)
    )
    path = tmp_path / "m.tflite"
    path.write_bytes(tf.lite.TFLiteConverter.from_concrete_functions([function]).convert())
    run = export.load(path)
    assert run.metadata == {}
    assert run.scale is None
    np.testing.assert_allclose(run(images[:1]), small_model(images[:1]), atol=1e-5)


def _with_prelu(slopes) -> keras.Model:
    inputs = keras.Input((6, 6, 8))
    layer = L.PReLU(shared_axes=[1, 2], name="act")
    model = keras.Model(inputs, layer(inputs))
    layer.set_weights([np.asarray(slopes, "float32").reshape(1, 1, 8)])
    return model


@pytest.mark.parametrize(
    ("slopes", "layers"),
    [
        ([0.25] * 8, {"LeakyReLU"}),
        (np.linspace(-0.5, 1, 8), {"DepthwiseConv2D", "Add"}),
        (np.linspace(-2, 3, 8), {"DepthwiseConv2D", "Add"}),
        ([-0.25] * 8, {"DepthwiseConv2D", "Add"}),
    ],
)
def test_prelu_lowering_is_equal(slopes, layers):
    model = _with_prelu(slopes)
    lowered = prelu_as_relu(model)
    x = np.random.default_rng(0).normal(0, 2, (2, 6, 6, 8)).astype("float32")
    # Two roundings of products of at most 6 each: 4 eps · 6.
    np.testing.assert_allclose(lowered(x), model(x), atol=4 * 1.2e-7 * 20)
    used = {type(layer).__name__ for layer in lowered._flatten_layers()} & {"LeakyReLU", "DepthwiseConv2D", "Add"}
    assert used == layers


@pytest.mark.parametrize("case", ["steep", "shared", "activated", "added"])
def test_prelus_that_cannot_be_doubled_become_relus(case, images, tmp_path):
    """A slope above 1, a convolution that others read or that has an activation, and no convolution at all."""
    inputs = keras.Input((32, 32, 1))
    convolution = L.Conv2D(8, 3, padding="same", activation="tanh" if case == "activated" else None, name="before")
    x = convolution(inputs)
    layer = L.PReLU(shared_axes=[1, 2], name="act")
    y = layer(x + 0.5 if case == "added" else x)
    model = keras.Model(inputs, L.Conv2D(2, 1)(y + x if case == "shared" else y))
    layer.set_weights([np.linspace(-0.5, 1.5 if case == "steep" else 0.9, 8, dtype="float32").reshape(1, 1, 8)])
    report = export.save(model, tmp_path / "m.tflite", precision="int8", calibration=images)
    assert not {"PRELU", "MAXIMUM"} & set(report.ops)
    assert "prelu-as-relu" in report.lowerings


def test_prelu_of_other_shapes_is_left_alone():
    inputs = keras.Input((6, 6, 8))
    model = keras.Model(inputs, L.PReLU()(inputs))
    assert prelu_as_relu(model) is model
    assert integer_normalization(model) is model
    assert transposed_shuffle(model) is model


@pytest.mark.parametrize(("dilation", "multiplier", "bias"), [(1, 1, True), (2, 2, False)])
def test_causal_grouped_convolution_lowering_is_equal(dilation, multiplier, bias):
    inputs = keras.Input((12, 4))
    layer = L.Conv1D(
        4 * multiplier, 3, groups=4, padding="causal", dilation_rate=dilation, use_bias=bias, activation="relu"
    )
    model = keras.Model(inputs, layer(inputs))
    layer.set_weights([np.random.default_rng(1).normal(size=w.shape) for w in layer.get_weights()])
    x = np.random.default_rng(0).random((2, 12, 4), "float32")
    for lowering in (depthwise_convolutions, split_grouped_convolutions):
        lowered = lowering(model)
        assert lowered is not model
        np.testing.assert_allclose(lowered(x), model(x), atol=1e-5)


@pytest.mark.parametrize("kind", [L.Conv2D, L.Conv2DTranspose, L.PReLU, L.LSTM])
def test_a_users_subclass_is_left_alone(kind):
    """It may compute something else than the layer that it comes from."""
    arguments = {
        L.Conv2D: {"filters": 4, "kernel_size": 3, "groups": 4},
        L.Conv2DTranspose: {"filters": 4, "kernel_size": 3, "strides": 2, "padding": "same"},
        L.PReLU: {"shared_axes": [1, 2]},
        L.LSTM: {"units": 3},
    }[kind]
    inputs = keras.Input((5, 4) if kind is L.LSTM else (8, 8, 4))
    model = keras.Model(inputs, type("Mine", (kind,), {})(**arguments)(inputs))
    for lowering in (
        depthwise_convolutions,
        split_grouped_convolutions,
        convolution_and_shuffle,
        prelu_as_relu,
        unrolled_recurrence,
    ):
        assert lowering(model) is model


def test_channels_first_is_left_alone():
    inputs = keras.Input((4, 12))
    model = keras.Model(inputs, L.Conv1D(4, 3, groups=4, data_format="channels_first")(inputs))
    assert depthwise_convolutions(model) is model
    assert split_grouped_convolutions(model) is model


def test_shuffle_lowering_is_exact():
    inputs = keras.Input((3, 5, 18))
    model = keras.Model(inputs, keras.ops.depth_to_space(inputs, 3))
    x = np.random.default_rng(0).random((2, 3, 5, 18), "float32")
    np.testing.assert_array_equal(transposed_shuffle(model)(x), model(x))


@pytest.mark.parametrize("layer", [L.LayerNormalization(), L.LayerNormalization(axis=[1, 2]), L.GroupNormalization(2)])
def test_normalization_lowering_is_equal(layer):
    inputs = keras.Input((5, 6, 8))
    model = keras.Model(inputs, layer(inputs))
    generator = np.random.default_rng(0)
    layer.set_weights([generator.uniform(-1, 1, w.shape) for w in layer.get_weights()])
    lowered = integer_normalization(model)
    assert lowered is not model
    x = generator.normal(1, 3, (2, 5, 6, 8)).astype("float32")
    np.testing.assert_allclose(lowered(x), model(x), atol=1e-5)


def test_idle_clips_are_left_out(images, tmp_path):
    """A clip to [0, 1] at the end is what the output's integers can hold: no pass over the image for it."""
    inputs = keras.Input((32, 32, 1), name="y")
    x = L.Conv2D(1, 3, padding="same", kernel_initializer="ones")(inputs) * 0.3 - 0.5
    model = keras.Model(inputs, L.ReLU(max_value=1.0)(x))
    report = export.save(model, tmp_path / "m.tflite", precision="int8", calibration=images, input_shape=(32, 32))
    assert not {"MINIMUM", "RELU", "MAXIMUM"} & set(report.ops)
    found, expected = export.load(tmp_path / "m.tflite")(images[:1]), np.asarray(model(images[:1]))
    assert 0 < np.mean(expected == 1) < 1
    assert found.min() >= 0
    assert found.max() <= 1
    np.testing.assert_allclose(found, expected, atol=0.03)


def test_operator_without_integer_kernel_is_named(tmp_path, images):
    inputs = keras.Input((32, 32, 1))
    x = keras.ops.sin(L.Conv2D(3, 3, name="before")(inputs))
    model = keras.Model(inputs, L.Conv2D(2, 3, name="after")(x))
    with pytest.raises(ConversionError, match=r"before.*SIN has no int8 kernel"):
        export.save(model, tmp_path / "m.tflite", precision="int8", calibration=images)
    with pytest.raises(ConversionError, match="SIN"):
        export.save(model, tmp_path / "m.tflite", precision="int16x8", calibration=images)


def test_operator_that_tflite_lacks_is_named(tmp_path):
    inputs = keras.Input((32, 32, 1))
    model = keras.Model(inputs, keras.ops.erf(L.Conv2D(3, 3, name="before")(inputs)))
    with pytest.raises(ConversionError, match="no operator for TensorFlow's Erf"):
        export.save(model, tmp_path / "m.tflite")


def test_small_weights_stay_float_and_the_report_says_so(tmp_path):
    inputs = keras.Input((8, 8, 1))
    model = keras.Model(inputs, L.Conv2D(2, 3)(inputs))
    report = export.save(model, tmp_path / "m.tflite", precision="dynamic")
    assert any("No weight was quantised" in note for note in report.notes)


def test_a_free_length_that_cannot_be_converted_has_a_hint(tmp_path):
    inputs = keras.Input((None,), dtype="int32", name="ids")
    x = L.Embedding(50, 8)(inputs)
    model = keras.Model(inputs, L.MultiHeadAttention(2, 4)(x, x, use_causal_mask=True))
    with pytest.raises(ConversionError, match="input_shape="):
        export.save(model, tmp_path / "m.tflite")


def test_wide_integers_are_noted(tmp_path):
    inputs = keras.Input((8,), dtype="int64", name="ids")
    model = keras.Model(inputs, L.Embedding(10, 3)(inputs))
    report = export.save(model, tmp_path / "m.tflite")
    assert any("64-bit integers" in note for note in report.notes)


def test_calibration_is_used(small_model, images, tmp_path):
    """Ranges from data ten times as large: steps ten times as coarse."""
    steps = []
    for number, factor in enumerate((1, 10)):
        path = tmp_path / f"{number}.tflite"
        export.save(small_model, path, precision="int8", calibration=images[:4] * factor)
        run = export.load(path)
        steps.append(run.output_step(run.output_names[0]))
    assert steps[1] > 5 * steps[0]
