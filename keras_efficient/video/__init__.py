"""Video for a network at a server: bits go where it looks.

::

    from keras_efficient import video, zoo

    camera = video.Camera(zoo.load("accmodel-yolox-nano"), 1280, 720, 30, base=38)
    packets = camera.encode(frame)                          # bits go where YOLOX looks

    encoder = video.RoiEncoder(1280, 720, 30, base=38)
    packets = encoder.encode(frame, offsets)                # a QP offset for each macroblock of 16 × 16 pixels
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from keras_efficient import lazy

if TYPE_CHECKING:
    from keras_efficient.video.allocation import graded_offsets, two_levels
    from keras_efficient.video.camera import Camera, Saliency
    from keras_efficient.video.delay import Link, delays
    from keras_efficient.video.encoder import Packet, RoiEncoder, decoded, qp_map
    from keras_efficient.video.evaluation import Evaluation, evaluate, saving
    from keras_efficient.video.frames import Appearance, Video, calibration
    from keras_efficient.video.gradient import accuracy_gradient
    from keras_efficient.video.labels import Coding
    from keras_efficient.video.onnx_graph import OnnxGraph
    from keras_efficient.video.schemes import Clip, Coded, Scheme, coding_schemes
    from keras_efficient.video.servers import (
        PREPROCESSING,
        Detections,
        DetectionServer,
        KeypointServer,
        Preprocessing,
        SegmentationServer,
        Server,
        keras_server,
        onnx_server,
    )
    from keras_efficient.video.training import TrainedCamera, teach_accmodel, train_accmodel

__all__ = [
    "PREPROCESSING",
    "Appearance",
    "Camera",
    "Clip",
    "Coded",
    "Coding",
    "DetectionServer",
    "Detections",
    "Evaluation",
    "KeypointServer",
    "Link",
    "OnnxGraph",
    "Packet",
    "Preprocessing",
    "RoiEncoder",
    "Saliency",
    "Scheme",
    "SegmentationServer",
    "Server",
    "TrainedCamera",
    "Video",
    "accuracy_gradient",
    "calibration",
    "coding_schemes",
    "decoded",
    "delays",
    "evaluate",
    "graded_offsets",
    "keras_server",
    "onnx_server",
    "qp_map",
    "saving",
    "teach_accmodel",
    "train_accmodel",
    "two_levels",
]

_HOMES = {
    "Appearance": "frames",
    "Camera": "camera",
    "Clip": "schemes",
    "Coded": "schemes",
    "Coding": "labels",
    "DetectionServer": "servers",
    "Detections": "servers",
    "Evaluation": "evaluation",
    "KeypointServer": "servers",
    "Link": "delay",
    "OnnxGraph": "onnx_graph",
    "PREPROCESSING": "servers",
    "Packet": "encoder",
    "Preprocessing": "servers",
    "RoiEncoder": "encoder",
    "Saliency": "camera",
    "Scheme": "schemes",
    "SegmentationServer": "servers",
    "Server": "servers",
    "TrainedCamera": "training",
    "Video": "frames",
    "accuracy_gradient": "gradient",
    "calibration": "frames",
    "decoded": "encoder",
    "delays": "delay",
    "evaluate": "evaluation",
    "graded_offsets": "allocation",
    "keras_server": "servers",
    "onnx_server": "servers",
    "qp_map": "encoder",
    "saving": "evaluation",
    "coding_schemes": "schemes",
    "teach_accmodel": "training",
    "train_accmodel": "training",
    "two_levels": "allocation",
}


# A camera that runs an exported file imports neither Keras nor TensorFlow.
__getattr__, __dir__ = lazy.names(__name__, _HOMES, __all__)
