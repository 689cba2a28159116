"""Super-resolution: larger pictures and videos, and how good they are.

Works on callables: a Keras model, what `keras_efficient.export.load` returned, or any function from N×H×W×1 (Y in
[0, 1]) to N×sH×sW×1::

    from keras_efficient import superres, zoo

    model = zoo.load("sesr-m5-x2")
    superres.upscale_file("small.jpg", "large.png", model)
    superres.evaluate(model, "Set5", scale=2).psnr

Importing this package imports neither Keras nor TensorFlow.
"""

from keras_efficient.superres.calibration import calibration
from keras_efficient.superres.colour import from_unit, rgb_to_y, rgb_to_ycbcr, to_unit, ycbcr_to_rgb
from keras_efficient.superres.evaluation import Bicubic, Evaluation, ImageScore, Pair, evaluate, load_pairs
from keras_efficient.superres.files import FolderReport, upscale_file, upscale_folder
from keras_efficient.superres.image import Image, read_image, write_image
from keras_efficient.superres.metrics import psnr, ssim
from keras_efficient.superres.receptive_field import ReceptiveField, receptive_field
from keras_efficient.superres.resize import imresize
from keras_efficient.superres.tiling import tiled
from keras_efficient.superres.upscale import upscale
from keras_efficient.superres.video import upscale_video

__all__ = [
    "Bicubic",
    "Evaluation",
    "FolderReport",
    "Image",
    "ImageScore",
    "Pair",
    "ReceptiveField",
    "calibration",
    "evaluate",
    "from_unit",
    "imresize",
    "load_pairs",
    "psnr",
    "read_image",
    "receptive_field",
    "rgb_to_y",
    "rgb_to_ycbcr",
    "ssim",
    "tiled",
    "to_unit",
    "upscale",
    "upscale_file",
    "upscale_folder",
    "upscale_video",
    "write_image",
    "ycbcr_to_rgb",
]
