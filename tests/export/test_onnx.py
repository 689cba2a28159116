"""The onnx target: checked files, named axes, layouts, opsets, and what tf2onnx gets wrong."""

from __future__ import annotations

import json

import keras
import numpy as np
import onnx
import pytest
from keras import layers as L

from keras_efficient import export
from keras_efficient.errors import ConversionError, FileProblem
from keras_efficient.export.lowerings.grouped_convolution import depthwise_convolutions, split_grouped_convolutions
from keras_efficient.export.targets import onnx as target


def axes(value) -> list:
    return [dim.dim_param or dim.dim_value or None for dim in value.type.tensor_type.shape.dim]


def test_equal_at_several_sizes(saved, small_model):
    path, report = saved("float32", ".onnx")
    assert report.sqnr_db > 100
    run = export.load(path)
    for shape in ((1, 5, 7, 1), (3, 16, 9, 1)):
        x = np.random.default_rng(3).random(shape, "float32")
        np.testing.assert_allclose(run(x), small_model(x), atol=1e-5)


def test_report_and_metadata(saved):
    path, report = saved("float32", ".onnx")
    assert report.macs == 32 * 32 * (9 * 16 + 9 * 16 * 16 + 9 * 16 * 4)
    assert report.ops["Conv"] == {"float32": 3}
    assert "ONNX opset 18." in report.notes
    proto = onnx.load(path)
    assert proto.producer_name == "keras_efficient"
    assert json.loads(proto.metadata_props[0].value)["scale"] == 2
    assert export.load(path).scale == 2


def test_axes_have_names(saved):
    graph = onnx.load(saved("float32", ".onnx")[0]).graph
    assert axes(graph.input[0]) == ["batch", "height", "width", 1]
    assert [value.name for value in graph.input] == ["y"]
    assert axes(graph.output[0]) == ["batch", None, None, 1]


def test_layout_nchw(small_model, images, tmp_path):
    path = tmp_path / "m.onnx"
    report = export.save(small_model, path, layout="nchw", samples=images)
    graph = onnx.load(path).graph
    assert axes(graph.input[0]) == ["batch", 1, "height", "width"]
    assert not [node for node in graph.node if node.op_type == "Transpose"]
    assert any("N×C×H×W" in note for note in report.notes)
    np.testing.assert_allclose(export.load(path)(images), small_model(images), atol=1e-5)


@pytest.mark.parametrize("opset", [15, 17])
def test_opset(small_model, tmp_path, opset):
    export.save(small_model, tmp_path / "m.onnx", opset=opset, input_shape=(8, 8))
    assert [entry.version for entry in onnx.load(tmp_path / "m.onnx").opset_import if not entry.domain] == [opset]


def test_a_lost_axis_is_converted_again(small_model, tmp_path, monkeypatch):
    """tf2onnx's optimiser sometimes loses the last operator."""
    import tf2onnx

    convert, calls = tf2onnx.convert.from_graph_def, []

    def careless(*arguments, **options):
        proto, extra = convert(*arguments, **options)
        last = proto.graph.node[-1]
        if not calls and last.op_type == "Squeeze":
            proto.graph.node[-2].output[0] = last.output[0]
            del proto.graph.node[-1]
        calls.append(last.op_type)
        return proto, extra

    monkeypatch.setattr(tf2onnx.convert, "from_graph_def", careless)
    report = export.save(small_model, tmp_path / "m.onnx")
    assert report.sqnr_db > 100
    assert len(calls) >= 2


def test_bad_files(tmp_path, capfd):
    for data, words in ((b"", "empty"), (b"junk that is no protobuf", "cannot open")):
        (tmp_path / "m.onnx").write_bytes(data)
        with pytest.raises(FileProblem, match=words):
            export.load(tmp_path / "m.onnx")
    assert capfd.readouterr().out == ""  # ONNX Runtime would print its fallback
    with pytest.raises(FileProblem, match="no such file"):
        export.load(tmp_path / "none.onnx")


def random_model(layer, shape):
    """A layer alone with random weights, and a batch of two for it."""
    inputs = keras.Input(shape)
    model = keras.Model(inputs, layer(inputs))
    generator = np.random.default_rng(0)
    layer.set_weights([generator.normal(0, 1, w.shape) for w in layer.get_weights()])
    return model, generator.normal(0, 1, (2, *shape)).astype("float32")


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (L.Conv2D(6, 3, groups=2, strides=2, padding="same", activation="relu"), (9, 8, 4)),
        (L.Conv1D(4, 3, groups=4, use_bias=False), (9, 8)),
        (L.Conv2D(8, (1, 3), groups=2, dilation_rate=(1, 2), activation="softmax"), (9, 8, 4)),
    ],
)
def test_grouped_convolution_lowering_is_equal(layer, shape):
    model, x = random_model(layer, shape)
    lowered = split_grouped_convolutions(model)
    assert all(getattr(inner, "groups", 1) == 1 for inner in lowered._flatten_layers())
    np.testing.assert_allclose(lowered(x), model(x), atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (L.Conv2D(8, 3, groups=4, strides=2, padding="same", activation="relu"), (9, 8, 4)),
        (L.Conv1D(4, 3, groups=4, use_bias=False, dilation_rate=2), (9, 4)),
    ],
)
def test_depthwise_lowering_is_equal(layer, shape):
    model, x = random_model(layer, shape)
    lowered = depthwise_convolutions(model)
    assert "Depthwise" in type(lowered.layers[-1]).__name__
    np.testing.assert_allclose(lowered(x), model(x), atol=1e-5)


def test_other_inputs_than_the_models_are_refused(saved, small_model, tmp_path):
    path, _ = saved("float32", ".onnx")
    proto = onnx.load(path)
    extra = onnx.helper.make_tensor_value_info("captured", 1, [1])
    proto.graph.input.append(extra)
    onnx.save(proto, tmp_path / "m.onnx")
    request = type("R", (), {"inputs": [type("S", (), {"name": "y"})], "options": {"layout": "nhwc"}})
    with pytest.raises(ConversionError, match="captured"):
        target.check(tmp_path / "m.onnx", small_model, request)


def test_name_in_the_way_is_moved(images, tmp_path):
    """An inner tensor that has the name of an input or an output must not be mistaken for it."""
    inputs = keras.Input((8, 8, 1), name="Identity")
    model = keras.Model(inputs, L.Conv2D(2, 3, name="Identity_1")(inputs))
    export.save(model, tmp_path / "m.onnx")
    assert export.load(tmp_path / "m.onnx").input_names == ("Identity",)
