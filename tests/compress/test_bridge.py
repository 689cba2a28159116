"""Keras 3 to tf_keras and back: outputs are equal, and a changed weight arrives."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_efficient.compress import _tfmot, prune
from keras_efficient.compress.bridge import to_tf_keras
from keras_efficient.errors import MissingDependency, UnsupportedLayer, WrongArgument


def convolutions():
    inputs = keras.Input((None, None, 3), name="image")
    x = layers.Conv2D(6, 3, padding="same", use_bias=False, name="conv")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.PReLU(shared_axes=[1, 2], name="prelu")(x)
    x = layers.DepthwiseConv2D(3, padding="same", activation="relu6", name="depthwise")(x)
    x = layers.SeparableConv2D(6, 3, padding="same", name="separable")(x) + x
    x = layers.LeakyReLU(negative_slope=0.1, name="leaky")(x)
    x = ops.clip(ops.pad(x[:, 1:], [[0, 0], [1, 0], [0, 0], [0, 0]]) * 0.5, -1.0, 1.0)
    x = layers.Conv2DTranspose(4, 2, strides=2, name="transposed")(layers.Identity(name="same")(x))
    return keras.Model(inputs, ops.depth_to_space(x, 2))


def sequences():
    ids = keras.Input((7,), dtype="int32", name="ids")
    x = layers.Embedding(11, 6, name="embedding")(ids)
    x = layers.Bidirectional(layers.LSTM(4, return_sequences=True), name="both")(x)
    x = layers.LayerNormalization(name="norm")(x)
    x = layers.MultiHeadAttention(2, 3, name="attention")(x, x) + x
    x = layers.TimeDistributed(layers.Dense(5, activation="gelu"), name="each")(x)
    return keras.Model(ids, layers.GRU(3, name="gru")(x))


def nested():
    block_input = keras.Input((6,))
    block = layers.Dense(6, activation="silu", name="dense")(block_input)
    block = keras.Model(block_input, layers.Add(name="sum")([block, block_input]), name="block")
    line = keras.Sequential([keras.Input((6,)), block, layers.Dropout(0.3), layers.Dense(3, name="dense")], name="line")
    inputs = keras.Input((6,), name="x")
    return keras.Model(inputs, line(block(block(inputs))))


def structured():
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    shared = layers.Dense(4, name="shared")
    outputs = {"second": shared(b), "first": [shared(a), layers.Multiply()([a, b])]}
    return keras.Model({"a": a, "b": b}, outputs)


def sequential():
    return keras.Sequential([keras.Input((6,)), layers.Dense(4, activation="tanh"), layers.Rescaling(2.0, 0.5)])


MODELS = (convolutions, sequences, nested, structured, sequential)


def samples(model, seed=1):
    rng = np.random.default_rng(seed)
    return [
        rng.integers(0, 11, (3, *t.shape[1:]))
        if t.dtype == "int32"
        else rng.normal(size=(3, *[n or 9 for n in t.shape[1:]]))
        for t in model.inputs
    ]


def run(model, inputs):
    return [np.asarray(y) for y in keras.tree.flatten(model(inputs, training=False))]


def run_keras_3(model, inputs):
    graph = getattr(model, "_functional", model)
    inputs = [ops.convert_to_tensor(x, t.dtype) for x, t in zip(inputs, model.inputs, strict=True)]
    return run(graph, keras.tree.pack_sequence_as(graph._inputs_struct, inputs))


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_outputs_are_equal_and_weights_come_back(build):
    keras.utils.set_random_seed(2)
    model = build()
    rng = np.random.default_rng(3)
    for weight in model.trainable_variables:
        weight.assign(weight + rng.normal(scale=0.1, size=weight.shape))
    inputs = samples(model)
    tf_inputs = [x.astype("int32" if x.dtype.kind == "i" else "float32") for x in inputs]
    tf_inputs = tf_inputs[0] if len(inputs) == 1 else tf_inputs
    bridge = to_tf_keras(model)
    for left, right in zip(run(bridge.model, tf_inputs), run_keras_3(model, inputs), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-6)
    for layer in bridge.model.layers:
        layer.set_weights([w + 0.05 for w in layer.get_weights()])
    back = bridge.back({layer.name: layer.get_weights() for layer in bridge.model.layers})
    changed = run(bridge.model, tf_inputs)
    for left, right, old in zip(run_keras_3(back, inputs), changed, run_keras_3(model, inputs), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-6)
        # Every output depends on a weight, but for the product of the inputs.
        assert np.abs(left - old).max() > 1e-3 or (build is structured and left.shape == (3, 6))


def test_masks_go_from_layer_to_layer():
    ids = keras.Input((6,), dtype="int32")
    x = layers.Embedding(9, 5, mask_zero=True)(ids)
    model = keras.Model(ids, layers.LSTM(4)(x))
    rows = np.array([[1, 2, 0, 0, 0, 0], [3, 0, 4, 0, 5, 6]])
    bridge = to_tf_keras(model)
    np.testing.assert_allclose(bridge.model(rows), model(rows), atol=1e-6)
    # The operation that makes the mask is no layer of the model.
    assert [twin.path for twin in bridge.twins] == [layer.path for layer in model.layers[1:]]


def test_layers_are_laid_out_flat_and_shared_ones_stay_shared():
    bridge = to_tf_keras(nested())
    calls = {twin.path: twin.calls for twin in bridge.twins}
    # The block is called twice from outside and once inside the line.
    assert calls["block/dense"] == 3
    assert sum(len(twin.weights) for twin in bridge.twins) == 4
    assert bridge.model.count_params() == nested().count_params()


@keras.saving.register_keras_serializable(package="compress_test")
class Own(layers.Layer):
    def call(self, inputs):
        return inputs

    def compute_output_shape(self, input_shape):
        return input_shape


class Subclassed(keras.Model):
    def call(self, inputs):
        return inputs


def one(layer, shape=(4, 6)):
    inputs = keras.Input(shape)
    return keras.Model(inputs, layer(inputs))


@pytest.mark.parametrize(
    "make",
    [
        lambda: one(Own(name="refused")),
        lambda: one(layers.Lambda(lambda x: x, name="refused")),
        lambda: one(layers.RNN(layers.LSTMCell(3), name="refused")),
        lambda: one(layers.Dense(3, activation="hard_sigmoid", name="refused")),
        lambda: one(layers.RMSNormalization(name="refused")),
        lambda: one(layers.Dense(3, activation=layers.LeakyReLU(), name="refused")),
        lambda: Subclassed(name="refused"),
    ],
    ids=["own", "lambda", "cells", "another-hard-sigmoid", "unknown-to-keras-2", "object", "subclassed"],
)
def test_what_cannot_cross_is_refused_by_path(make):
    with pytest.raises(UnsupportedLayer) as refusal:
        to_tf_keras(make())
    assert refusal.value.path == "refused"


def test_another_backend_is_refused(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(WrongArgument, match="KERAS_BACKEND=tensorflow"):
        prune(sequential())


@pytest.mark.parametrize("module", ["tf_keras", "tensorflow_model_optimization"])
def test_a_missing_package_is_named(module, monkeypatch):
    find = _tfmot.importlib.util.find_spec
    monkeypatch.setattr(_tfmot.importlib.util, "find_spec", lambda name: None if name == module else find(name))
    with pytest.raises(MissingDependency, match=r"keras-efficient\[compress\]"):
        prune(sequential())
