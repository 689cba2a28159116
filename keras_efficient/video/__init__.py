"""Video for a network at a server: bits go where it looks.

::

    from keras_efficient import video

    encoder = video.RoiEncoder(1280, 720, 30, base=38)
    packets = encoder.encode(frame, offsets)                # a QP offset for each macroblock of 16 × 16 pixels
"""

from keras_efficient.video.encoder import Packet, RoiEncoder, decoded, qp_map
from keras_efficient.video.frames import Video
from keras_efficient.video.gradient import accuracy_gradient
from keras_efficient.video.onnx_graph import OnnxGraph
from keras_efficient.video.servers import (
    PREPROCESSING,
    Detections,
    DetectionServer,
    KeypointServer,
    Preprocessing,
    SegmentationServer,
    Server,
    onnx_server,
)

__all__ = [
    "PREPROCESSING",
    "DetectionServer",
    "Detections",
    "KeypointServer",
    "OnnxGraph",
    "Packet",
    "Preprocessing",
    "RoiEncoder",
    "SegmentationServer",
    "Server",
    "Video",
    "accuracy_gradient",
    "decoded",
    "onnx_server",
    "qp_map",
]
