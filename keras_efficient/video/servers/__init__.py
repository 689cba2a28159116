"""The networks at a server: what they find in frames, and how far from that they are, with a gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from keras_efficient.errors import UnknownName, WrongArgument
from keras_efficient.video.onnx_graph import OnnxGraph
from keras_efficient.video.servers.base import PREPROCESSING, Preprocessing, Server
from keras_efficient.video.servers.detection import Detections, DetectionServer
from keras_efficient.video.servers.heads import AnchorHead, Head, QueryHead, YoloxHead
from keras_efficient.video.servers.keras_models import keras_server
from keras_efficient.video.servers.keypoints import KeypointServer
from keras_efficient.video.servers.segmentation import SegmentationServer

__all__ = [
    "PREPROCESSING",
    "AnchorHead",
    "DetectionServer",
    "Detections",
    "Head",
    "KeypointServer",
    "Preprocessing",
    "QueryHead",
    "SegmentationServer",
    "Server",
    "YoloxHead",
    "keras_server",
    "onnx_server",
]

TASKS = ("detection", "segmentation", "keypoints")


def onnx_server(path: str | Path, task: str, preprocess: str | Preprocessing, **options: Any) -> Server:
    """The network of an ONNX file as a server.

    ```python
    server = video.onnx_server("yolox_nano.onnx", "detection", "yolox")
    ```

    Args:
        path: the file.
        task: `"detection"`, `"segmentation"` or `"keypoints"`; detectors and segmenters have one output.
        preprocess: a name of `PREPROCESSING`, or one of your own.
        **options: of `DetectionServer`, `SegmentationServer` or `KeypointServer`.

    Raises:
        FileProblem, UnsupportedLayer: as `OnnxGraph`.
        UnknownName: another task, or another name of a preprocessing.
    """
    graph = OnnxGraph(path)
    if isinstance(preprocess, str):
        if preprocess not in PREPROCESSING:
            raise UnknownName("preprocessing", preprocess, PREPROCESSING)
        preprocess = PREPROCESSING[preprocess]
    if task == "keypoints":
        return KeypointServer(graph, preprocess, answer=graph.run, **options)
    if task not in TASKS:
        raise UnknownName("task", task, TASKS)
    if len(graph.output_names) != 1:
        raise WrongArgument(f"{path} has {len(graph.output_names)} outputs: {', '.join(graph.output_names)}.")
    name = graph.output_names[0]
    kind: Callable[..., Server] = DetectionServer if task == "detection" else SegmentationServer
    return kind(lambda x: graph(x)[name], preprocess, answer=lambda x: graph.run(x)[name], **options)
