"""Nodes of ONNX files have the names of the Keras layers that they came from."""

from __future__ import annotations

import keras
import pytest
from keras import layers as L

from keras_efficient import export
from keras_efficient.export.bolt.advice import converted
from keras_efficient.export.bolt.bundle import Bundle
from keras_efficient.export.bolt.naming import layer_of
from keras_efficient.export.bolt.partition import partition

pytest.importorskip("onnx_ir", reason="kernels need the extra gpu")


@keras.saving.register_keras_serializable("tests_export_bolt_naming")
class Block(L.Layer):
    """A layer with layers of its own."""

    def __init__(self, **options):
        super().__init__(**options)
        self.one, self.two = L.Conv2D(8, 3, padding="same", name="one"), L.Conv2D(8, 3, padding="same", name="two")

    def build(self, shape):
        self.one.build(shape)
        self.two.build(shape)

    def call(self, x):
        return x + self.two(keras.ops.relu(self.one(x)))

    def compute_output_shape(self, shape):
        return shape


@pytest.fixture(scope="module")
def network():
    """Names that Keras gives, which end in numbers; a layer that is used twice; layers in layers and in models."""
    keras.backend.clear_session()
    within = keras.Input((8, 8, 8))
    inner = keras.Model(within, L.BatchNormalization()(L.Conv2D(8, 3, padding="same")(within)), name="inner")
    shared = L.Conv2D(8, 3, padding="same", name="shared")
    inputs = keras.Input((16, 16, 3))
    x = L.Conv2D(8, 3, padding="same", use_bias=False)(L.Conv2D(8, 3, padding="same")(inputs))
    x = L.BatchNormalization()(x)  # which goes into the convolution, and gives it its name
    x = shared(L.MaxPooling2D()(shared(L.PReLU(shared_axes=[1, 2])(x))))
    x = L.DepthwiseConv2D(3, padding="same")(inner(Block(name="block")(x)))
    x = L.Conv2DTranspose(8, 4, strides=2, padding="same")(x) * 2
    x = L.Dense(5)(L.Dense(4)(L.GlobalAveragePooling2D()(L.Softmax()(x))))
    model = keras.Model(inputs, x)
    for seed, weight in enumerate(model.weights):  # equal ones would be one
        weight.assign(keras.random.normal(weight.shape, seed=seed) ** 2 / 9)
    return model


def layers_of(network):
    found: list[str] = []
    for node in network.graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm"):
            found.append(node.name)
    return found


def test_layers_are_called_as_in_keras(network):
    proto, _ = converted(network)
    assert layers_of(proto) == [
        "conv2d_2",  # the inner one was made later
        "conv2d_1",
        "shared",
        "shared #2",
        "block/one",
        "block/two",
        "inner/conv2d",
        "depthwise_conv2d",
        "conv2d_transpose",
        "dense_1",
        "dense",
    ]
    names = [node.name for node in proto.graph.node]
    assert len(set(names)) == len(names)
    assert {"p_re_lu", "max_pooling2d", "softmax", "global_average_pooling2d"} <= set(names)


def test_a_layer_keeps_its_name_where_a_normalisation_went_into_it():
    """Of one without a shift tf2onnx' node is called as the normalisation."""
    inputs = keras.Input((8, 8, 3))
    x = L.Conv2D(4, 3, use_bias=False, name="weights")(inputs)
    assert layers_of(converted(keras.Model(inputs, L.BatchNormalization(name="statistics")(x)))[0]) == ["weights"]


def test_a_sequential_model_and_operations_outside_of_layers():
    keras.backend.clear_session()
    model = keras.Sequential([keras.Input((4,)), L.Dense(3), L.Dense(2, activation="softmax", name="last")])
    assert layers_of(converted(model)[0]) == ["dense", "last"]
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, L.Conv2D(2, 3, name="only")(keras.ops.exp(inputs)) ** 3)
    names = {node.op_type: node.name for node in converted(model)[0].graph.node}
    assert (names["Exp"], names["Conv"], names["Pow"]) == ("Exp before only", "only", "Pow")


def test_regions_keep_the_names(network):
    found = partition(converted(network)[0])
    names = [layer.name for region in found.regions for layer in region.layers]
    assert {"conv2d_1", "shared #2", "inner/conv2d", "conv2d_transpose", "dense"} <= set(names)
    assert {layer_of(one.node) for one in found.refusals} >= {"max_pooling2d", "softmax"}


def test_bundles_and_their_reports_have_them(network, tmp_path):
    report = export.save(network, tmp_path / "m.bolt", target="cuda-sm80", verify=False)
    assert any(note == "No kernel for max_pooling2d: MaxPool." for note in report.notes)
    assert b"inner/conv2d" in Bundle.load(tmp_path / "m.bolt").onnx
    assert layer_of("p_re_lu #12") == "p_re_lu"
