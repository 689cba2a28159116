"""The networks at a server: what they find in frames, and how far from that they are, with a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from keras import ops

from keras_efficient.errors import UnknownName, UnsupportedLayer, WrongArgument
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
TOLERANCE = 1e-3  # of the largest value, between the graph's output and ONNX Runtime's


def onnx_server(path: str | Path, task: str, preprocess: str | Preprocessing, **options: Any) -> Server:
    """The network of an ONNX file as a server; it is tried with one frame of noise.

    ```python
    server = video.onnx_server("yolox_nano.onnx", "detection", "yolox")
    ```

    Args:
        path: the file.
        task: `"detection"`, `"segmentation"` or `"keypoints"`; detectors and segmenters have one output.
        preprocess: a name of `PREPROCESSING`, or one of your own.
        **options: of `DetectionServer`, `SegmentationServer` or `KeypointServer`.

    Raises:
        FileProblem, UnsupportedLayer: as `OnnxGraph`; or its output is not that of ONNX Runtime.
        UnknownName: another task, or another name of a preprocessing.
        WrongArgument: the network takes other inputs than the preprocessing makes, or gives no such outputs as the
            task has.
    """
    graph = OnnxGraph(path)
    if isinstance(preprocess, str):
        if preprocess not in PREPROCESSING:
            raise UnknownName("preprocessing", preprocess, PREPROCESSING)
        preprocess = PREPROCESSING[preprocess]
    if task == "keypoints":
        people = KeypointServer(graph, preprocess, answer=graph.run, **options)
        return _tried(people, graph, path, task, (people.heat, people.points))
    if task not in TASKS:
        raise UnknownName("task", task, TASKS)
    if len(graph.output_names) != 1:
        raise WrongArgument(f"{path} has {len(graph.output_names)} outputs: {', '.join(graph.output_names)}.")
    name = graph.output_names[0]
    kind: Callable[..., Server] = DetectionServer if task == "detection" else SegmentationServer
    server = kind(lambda x: graph(x)[name], preprocess, answer=lambda x: graph.run(x)[name], **options)
    return _tried(server, graph, path, task, (name,))


def _tried(server: Any, graph: OnnxGraph, path: str | Path, task: str, outputs: Sequence[str]) -> Server:
    """The server, if its network gives what ONNX Runtime does, and what its task needs."""
    noise = np.random.default_rng(0).integers(0, 256, (1, *server.preprocessing.size, 3))
    try:
        x = ops.convert_to_numpy(server.preprocessing(noise))
        found, wanted = graph(x, outputs), graph.run(x, outputs)
        for name, want in wanted.items():
            array = ops.convert_to_numpy(found[name])
            most = TOLERANCE * max(float(np.abs(want).max()), TOLERANCE)
            if array.shape != want.shape or not np.allclose(array, want, rtol=0.0, atol=most, equal_nan=True):
                raise UnsupportedLayer(
                    f"{path}: {name}",
                    "this output is not the one of ONNX Runtime: an operator is understood in another way.",
                    hint="Export the network anew, with opset 13 or later.",
                )
        server.predict(noise)
        server.reference(noise)
    except WrongArgument as error:
        hint = f"Is it a network for task {task!r}, and the preprocessing its own?"
        raise WrongArgument(f"{path}: {error.message}", hint=hint) from error
    checked: Server = server
    return checked
