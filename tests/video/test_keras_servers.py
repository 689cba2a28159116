"""Keras models as servers: KerasHub's detectors and segmenters, and what is none of them."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from keras_efficient import video
from keras_efficient.errors import UnknownName, WrongArgument
from keras_efficient.video.servers import AnchorHead, QueryHead, YoloxHead

RNG = np.random.default_rng(0)
SIZE = (128, 192)


def frames(height=90, width=150):
    return RNG.integers(0, 256, (2, height, width, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def hub():
    return pytest.importorskip("keras_hub", reason="keras-hub is not installed")


def encoder(hub):
    return hub.models.ResNetBackbone([64], [7], [64, 64, 64, 64], [1, 1, 1, 1], [1, 2, 2, 2], "basic_block")


@pytest.fixture(scope="module")
def retinanet(hub):
    keras.utils.set_random_seed(0)
    backbone = hub.models.RetinaNetBackbone(encoder(hub), min_level=3, max_level=5, use_p5=True)
    converter = hub.layers.RetinaNetImageConverter(
        image_size=SIZE, scale=[1 / 255, 1 / 250, 1 / 245], offset=[-0.5, -0.4, -0.6], crop_to_aspect_ratio=False
    )
    preprocessor = hub.models.RetinaNetObjectDetectorPreprocessor(image_converter=converter)
    return hub.models.RetinaNetObjectDetector(
        backbone, num_classes=3, bounding_box_format="xyxy", preprocessor=preprocessor, activation=None
    )


def test_boxes_of_a_retinanet_are_its_own(retinanet):
    server = video.keras_server(retinanet, "detection", threshold=0.0)
    assert server.preprocessing.size == SIZE
    picture = RNG.integers(0, 256, (1, *SIZE, 3)).astype(np.uint8)
    inputs = retinanet.preprocessor.image_converter(picture)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(server.preprocessing(picture)), inputs, atol=1e-4)
    places = np.concatenate([RNG.normal(0, 0.3, (1, 4)).astype("float32")] * server.head._anchors.shape[0])
    wanted = retinanet.decode_predictions(
        {
            "bbox_regression": keras.ops.convert_to_tensor(places[None]),
            "cls_logits": keras.ops.convert_to_tensor(RNG.normal(size=(1, len(places), 3)).astype("float32")),
        },
        keras.ops.convert_to_tensor(inputs),
    )
    mine = server.head.boxes(places, slice(None))
    count = int(wanted["num_detections"][0])
    assert count
    for box in np.asarray(wanted["boxes"][0])[:count]:
        assert np.abs(mine - box).max(axis=1).min() < 1e-2


@pytest.mark.parametrize("score", ["likelihood", "hits"])
def test_a_retinanet_has_a_gradient(retinanet, score):
    server = video.keras_server(retinanet, "detection", score=score, threshold=0.02)
    high = frames()
    (found, _) = server.predict(high)
    assert len(found)
    assert (found.boxes >= 0).all()
    assert (found.boxes <= [150, 90, 150, 90]).all()
    gains = video.accuracy_gradient(server, high, high // 2)
    assert gains.shape == (2, 6, 10)
    assert gains.min(axis=(1, 2)).all()


def test_a_segmenter(hub):
    backbone = hub.models.DeepLabV3Backbone(
        encoder(hub), spatial_pyramid_pooling_key="P4", upsampling_size=8, dilation_rates=[6, 12, 18]
    )
    segmenter = hub.models.DeepLabV3ImageSegmenter(backbone, num_classes=4)
    with pytest.raises(WrongArgument, match="does not say how frames become its input"):
        video.keras_server(segmenter, "segmentation")
    server = video.keras_server(segmenter, "segmentation", video.Preprocessing((64, 96), scale=1 / 255))
    found, _ = server.predict(frames())
    assert found.shape == (64, 96)
    assert set(np.unique(found)) <= set(range(4))
    assert video.accuracy_gradient(server, frames(), frames()).min(axis=(1, 2)).all()


def stand_in(outputs):
    """A detector with the outputs that are asked for."""
    x = keras.Input((*SIZE, 3))
    y = layers.Reshape((-1, 8))(layers.Conv2D(8, 16, 16)(x))
    return keras.Model(x, outputs(y))


def test_boxes_that_are_shares_of_the_picture():
    model = stand_in(lambda y: {"logits": y[..., 4:], "pred_boxes": layers.Activation("sigmoid")(y[..., :4])})
    server = video.keras_server(model, "detection", video.Preprocessing(SIZE), threshold=0.1)
    assert isinstance(server.head, QueryHead)
    places = np.array([[0.5, 0.5, 1.0, 1.0], [0.25, 0.5, 0.5, 0.25]], "float32")
    np.testing.assert_allclose(server.head.boxes(places, slice(None)), [[0, 0, 192, 128], [0, 48, 96, 80]])
    assert len(server.predict(frames())) == 2


def test_which_head_is_taken():
    server = video.keras_server(stand_in(lambda y: y), "detection", video.Preprocessing(SIZE))
    assert isinstance(server.head, YoloxHead)
    with pytest.raises(WrongArgument, match="not known how to read boxes"):
        video.keras_server(stand_in(lambda y: {"boxes": y}), "detection", video.Preprocessing(SIZE))
    with pytest.raises(WrongArgument, match="not known how to read boxes"):
        video.keras_server(stand_in(lambda y: {"cls_logits": y, "bbox_regression": y}), "detection", "deeplab")
    with pytest.raises(UnknownName, match="task"):
        video.keras_server(stand_in(lambda y: y), "detect", "yolox")
    with pytest.raises(UnknownName, match="preprocessing"):
        video.keras_server(stand_in(lambda y: y), "detection", "yolo")


def test_no_boxes_are_an_array_too():
    head = AnchorHead.__new__(AnchorHead)
    assert head.boxes(np.zeros((3, 4), "float32"), np.zeros(0, int)).shape == (0, 4)
