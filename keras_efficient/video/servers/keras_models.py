"""Keras models, those of KerasHub too, as servers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_efficient.errors import UnknownName, WrongArgument
from keras_efficient.video.servers.base import PREPROCESSING, Preprocessing, Server
from keras_efficient.video.servers.detection import DetectionServer
from keras_efficient.video.servers.heads import AnchorHead, Head, QueryHead
from keras_efficient.video.servers.keypoints import KeypointServer
from keras_efficient.video.servers.segmentation import SegmentationServer

__all__ = ["keras_server"]

KINDS: dict[str, Callable[..., Server]] = {
    "detection": DetectionServer,
    "segmentation": SegmentationServer,
    "keypoints": KeypointServer,
}


def keras_server(
    model: keras.Model, task: str, preprocess: str | Preprocessing | None = None, **options: Any
) -> Server:
    """A Keras model as a server.

    ```python
    model = keras_hub.models.RetinaNetObjectDetector.from_preset("retinanet_resnet50_fpn_coco")
    server = video.keras_server(model, "detection")
    ```

    Args:
        model: a detector as YOLOX, KerasHub's RetinaNet or D-FINE; a segmenter to (batch, rows, columns, classes); a
            finder of key points. It is run for inference.
        task: `"detection"`, `"segmentation"` or `"keypoints"`.
        preprocess: a name of `PREPROCESSING`, or one of your own; `None`: size, scale and offset of the model's own
            preprocessor, as KerasHub's have one. A letterbox has its free part at the bottom and at the right, and
            nothing is cut off.
        **options: of `DetectionServer`, `SegmentationServer` or `KeypointServer`.

    Raises:
        UnknownName: another task, or another name of a preprocessing.
        WrongArgument: a model without a preprocessor, or a detector that is none of these.
    """
    if task not in KINDS:
        raise UnknownName("task", task, KINDS)
    if isinstance(preprocess, str) and preprocess not in PREPROCESSING:
        raise UnknownName("preprocessing", preprocess, PREPROCESSING)
    if isinstance(preprocess, str):
        preprocess = PREPROCESSING[preprocess]
    elif preprocess is None:
        preprocess = _own(model)
    if task == "detection" and "head" not in options:
        options = {**options, "head": _head(model, preprocess.size)}
    plain = keras.Model(model.inputs, model.output)  # KerasHub's own `predict` gives boxes, not what they come from

    def network(x: Any) -> Any:
        return plain(x, training=False)

    def answer(x: Any) -> Any:
        return plain.predict_on_batch(x)

    return KINDS[task](network, preprocess, answer=answer, **options)


def _own(model: keras.Model) -> Preprocessing:
    """As the model's preprocessor says."""
    converter = getattr(getattr(model, "preprocessor", None), "image_converter", None)
    size = () if converter is None else tuple(converter.image_size or model.input_shape[1:3])
    if converter is None or None in size:
        raise WrongArgument(
            f"Model {model.name!r} does not say how frames become its input.",
            hint="Give preprocess=video.Preprocessing((height, width), …).",
        )
    scale, offset = (
        tuple(np.ravel(value).astype(float).tolist()) if value is not None else default
        for value, default in ((converter.scale, 1.0), (converter.offset, 0.0))
    )
    return Preprocessing(size, letterbox=bool(converter.pad_to_aspect_ratio), fill=0.0, scale=scale, offset=offset)


def _head(model: keras.Model, size: tuple[int, int]) -> Head | None:
    """Of the raw output that the model has; `None`: YOLOX's."""
    output = model.output
    names = set(output) if isinstance(output, dict) else set()
    if {"cls_logits", "bbox_regression"} <= names and hasattr(model, "anchor_generator"):
        return AnchorHead(model, size, of_logits=getattr(model, "activation", None) != keras.activations.sigmoid)
    if {"logits", "pred_boxes"} <= names:
        return QueryHead(size)
    if names or not hasattr(output, "shape") or len(output.shape) != 3:
        raise WrongArgument(
            f"It is not known how to read boxes from the output of model {model.name!r}.", hint="Give a head=."
        )
    return None
