"""The camera's network: frames of any size by the same weights, each frame for itself, other backbones."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

from keras_efficient import models
from keras_efficient.deploy import deploy, foreign_layers
from keras_efficient.layers import FakeQuantize

RNG = np.random.default_rng(0)


def frames(number, height, width):
    return RNG.integers(0, 256, (number, height, width, 3)).astype("float32")


@pytest.mark.parametrize("trunk", ["small", "yolox-nano"])
@pytest.mark.parametrize("size", [(720, 1280), (540, 960), (450, 800), (360, 640), (97, 64), (1080, 1920)])
def test_any_size_by_the_same_weights(size, trunk):
    model = models.AccModel(size, width=0.5, trunk=trunk)
    model.set_weights(models.AccModel(width=0.5, trunk=trunk).get_weights())
    assert model.output_shape == (None, -(-size[0] // 16), -(-size[1] // 16))
    assert ops.convert_to_numpy(model(frames(1, *size))).shape[1:] == model.output_shape[1:]


def test_a_frame_is_judged_by_itself():
    model = models.AccModel((96, 128), width=0.5)
    x = frames(3, 96, 128)
    together = model.predict(x, verbose=0)
    for index in (2, 0, 1):
        np.testing.assert_allclose(model.predict(x[index : index + 1], verbose=0)[0], together[index], atol=1e-4)


def test_frames_that_are_shrunk_before():
    model, x = models.AccModel((96, 128), width=0.5, shrink=4), frames(2, 96, 128)
    inner, small = models.without_shrink(model), x.reshape(2, 24, 4, 32, 4, 3).mean(axis=(2, 4))
    assert inner.input_shape == (None, 24, 32, 3)
    np.testing.assert_allclose(inner.predict(small, verbose=0), model.predict(x, verbose=0), atol=1e-4)
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    assert models.without_shrink(other) is other
    assert models.without_shrink(inner) is inner


def test_its_deployed_form():
    model, x = models.AccModel((97, 130), width=0.5), frames(2, 97, 130)
    deployed = deploy(model)
    assert foreign_layers(deployed) == ()
    np.testing.assert_allclose(deployed.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-4)


def test_the_trunk_of_yolox_is_the_detectors(data_dir):
    """From what it gives, the last convolutions of the network make the network's boxes."""
    import onnx
    from onnx import numpy_helper

    from keras_efficient.models.yolox import yolox_nano
    from keras_efficient.video import OnnxGraph
    from keras_efficient.zoo.recipes import accmodel

    path = data_dir / "models" / "yolox_nano.onnx"
    x = keras.Input((416, 416, 3))
    trunk = keras.Model(x, yolox_nano(x))
    layers = sorted((layer for layer in trunk.layers if layer.weights), key=lambda layer: layer.name)
    for layer, arrays in zip(layers, accmodel._trunk_weights(path), strict=True):
        layer.set_weights(arrays)
    graph = onnx.load_model(path).graph
    arrays = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    boxes = [arrays[node.input[1]][:, :, 0, 0] for node in graph.node if node.op_type == "Conv"]
    last = [kernel for kernel in boxes if len(kernel) == 4]
    bias = [arrays[node.input[2]] for node in graph.node if node.op_type == "Conv" and len(arrays[node.input[2]]) == 4]
    picture = frames(1, 26, 26).repeat(16, axis=1).repeat(16, axis=2)
    found = [y.reshape(-1, 64) for y in trunk.predict(picture / 255, verbose=0)]
    wanted = OnnxGraph(path).run(picture[..., ::-1].transpose(0, 3, 1, 2))["output"][0, :, :4]
    mine = np.concatenate([y @ kernel.T + more for y, kernel, more in zip(found, last, bias, strict=True)])
    np.testing.assert_allclose(mine, wanted, atol=1e-3)


def test_a_trunk_that_keeps_what_it_knows():
    model = models.with_frozen_trunk(models.AccModel((96, 128), width=0.5, trunk="yolox-nano"))
    trained = {id(variable) for variable in models.without_shrink(model).trainable_variables}
    for layer in model.layers:
        ours = {id(variable) for variable in layer.trainable_variables}
        assert ours <= trained
        assert not (ours and layer.name.startswith("yolox_"))
    assert len(trained) < len(model.weights) / 2
    assert models.with_frozen_trunk(models.AccModel((96, 128), width=0.5)).trainable_variables


@pytest.mark.parametrize("trunk", ["small", "yolox-nano"])
def test_one_that_rounds(trunk, tmp_path):
    """What training rounds is what stays the range of a tensor, but for kernels, and is near to the one in floats."""
    plain = models.AccModel((96, 128), width=0.5, shrink=2, trunk=trunk)
    model = models.AccModel((96, 128), width=0.5, shrink=2, trunk=trunk, int8_aware=True)
    known = {layer.name: layer for layer in plain.layers}
    for layer in model.layers:
        if layer.name in known:
            layer.set_weights([2.5 * weight for weight in known[layer.name].get_weights()])
            known[layer.name].set_weights(layer.get_weights())
    rounding = [layer for layer in model.layers if isinstance(layer, FakeQuantize)]
    assert len({layer.name for layer in rounding}) == len(rounding) > 30
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False  # it would take the batch's statistics
    x = frames(4, 96, 128)
    model(x, training=True)
    assert all(float(layer.range_max) > float(layer.range_min) for layer in rounding)
    wanted, found = (ops.convert_to_numpy(one(x)) for one in (plain, model))
    assert 0 < np.abs(found - wanted).mean() < 0.8 * wanted.std()
    deployed = deploy(model)
    assert foreign_layers(deployed) == ()
    np.testing.assert_allclose(deployed.predict(x, verbose=0), found, atol=0.05)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))


def test_another_backbone():
    def backbone(x):
        return keras.layers.Conv2D(8, 3, strides=8, padding="same", activation="relu")(x)

    model = models.AccModel((100, 200), shrink=2, backbone=backbone, stride=8)
    assert model.output_shape == (None, 7, 13)
    assert model(frames(1, 100, 200)).shape == (1, 7, 13)


def test_what_is_refused():
    with pytest.raises(ValueError, match="`shrink` must be 1, 2, 4 or 8"):
        models.AccModel(shrink=3)
    with pytest.raises(ValueError, match="`stride` of the backbone"):
        models.AccModel(backbone=lambda x: x)
