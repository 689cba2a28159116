"""The network on a camera: a frame to how much each of its macroblocks matters to a server's network."""

from __future__ import annotations

import keras
from keras import layers

from keras_efficient.layers import FakeQuantize, MacroblockSaliencyHead
from keras_efficient.models.yolox import LEVELS, YOLOX, yolox_nano

__all__ = ["AccModel", "with_frozen_trunk", "without_shrink"]

SHRINKS, COLUMNS = (1, 2, 4, 8), 320
TRUNKS = ("small", "yolox-nano")
SHRINKING, SHRUNK = "shrink", "rescale"  # names of the layer that shrinks frames, and of the first that takes these


def AccModel(
    frame_size=(720, 1280),
    *,
    shrink=None,
    width=1.0,
    trunk="small",
    backbone=None,
    stride=None,
    int8_aware=False,
    name=None,
):
    """A frame to one score for each of its macroblocks of 16×16 pixels: what a better quality of it is worth.

    ```
    "small":       x = mean of shrink × shrink pixels, /127.5 − 1 → conv3x3 → inverted residuals at strides of
                       4, 8 and 16 pixels of what is left → sums, upwards → MacroblockSaliencyHead
    "yolox-nano":  x = mean of shrink × shrink pixels, /255 → YOLOX-nano but for its classes, at strides of
                       8, 16 and 32 pixels of what is left → sums, upwards → MacroblockSaliencyHead
    ```

    The second has seen many objects where its weights come from the detector's, and needs few videos to learn more.

    Scores are logarithms, base 2; they are compared inside of a frame. The same weights serve frames of any size.

    Args:
        frame_size: `(height, width)` of frames.
        shrink: 1, 2, 4 or 8; `None`: so that about 320 columns are left.
        width: factor of the channels, of what is no YOLOX.
        trunk: `"small"` or `"yolox-nano"`.
        backbone: `None`, or a model or function that maps shrunk pixels in [−1, 1] to features.
        stride: pixels of the shrunk frame from one feature of `backbone` to the next.
        int8_aware: Boolean. Fake-quantises activations, for an int8 file. `video.teach_accmodel` finds their ranges
            and trains it; before that it gives nothing of use. A `backbone` is not rounded.
        name: of the model.

    Input shape: `(batch, height, width, 3)`, RGB, 0 to 255. Output shape: `(batch, height / 16, width / 16)`, rounded
    up.

    Raises:
        ValueError: another `shrink` or `trunk`, or a backbone without its stride.

    Source: AccMPEG: Optimizing Video Encoding for Accurate Video Analytics, MLSys 2022, section 4.
    """
    height, columns = frame_size
    if shrink is None:
        shrink = min(SHRINKS, key=lambda factor: abs(columns / factor - COLUMNS))
    if shrink not in SHRINKS:
        raise ValueError(f"`shrink` must be 1, 2, 4 or 8. Received: shrink={shrink!r}.")
    if trunk not in TRUNKS:
        raise ValueError(f"`trunk` must be one of {TRUNKS}. Received: trunk={trunk!r}.")
    if backbone is not None and stride is None:
        raise ValueError("Give the `stride` of the backbone: pixels from one of its features to the next.")
    frame = keras.Input((height, columns, 3), name="frame")
    x = layers.AveragePooling2D(shrink, padding="same", name=SHRINKING)(frame) if shrink > 1 else frame
    of_yolox = backbone is None and trunk == "yolox-nano"
    scale, offset = (1 / 255, 0.0) if of_yolox else (1 / 127.5, -1.0)
    x = layers.Rescaling(scale, offset=offset, name=SHRUNK)(x)
    make = _Making(width, int8_aware)
    if backbone is not None:
        x = backbone(x)
    else:
        x, stride = (_detector(x, make), LEVELS[0]) if of_yolox else (_trunk(x, make), 4)
    scores = MacroblockSaliencyHead(shrink * stride, make.channels(32), frame_size=frame_size, name="head")(x)
    return keras.Model(frame, scores, name=name or "accmodel")


def without_shrink(model):
    """An `AccModel` that takes frames as small as its own layer would shrink them, for callers that shrink them first.

    Args:
        model: an `AccModel`; its weights are shared. Any other model is given back as it is.
    """
    if not {SHRINKING, SHRUNK} <= {layer.name for layer in model.layers}:
        return model
    return keras.Model(model.get_layer(SHRUNK).input, model.output, name=model.name)


def with_frozen_trunk(model):
    """An `AccModel` whose trunk keeps what it knows while the rest is trained: few videos would spoil a detector's.

    Args:
        model: with the trunk `"yolox-nano"`; it is changed. In others nothing is frozen.
    """
    for layer in model.layers:
        if layer.name.startswith(f"{YOLOX}_"):
            layer.trainable = False
    return model


class _Making:
    """Parts of a trunk, with their number of channels and their rounding."""

    def __init__(self, width, int8_aware):
        self.width, self.int8_aware = width, int8_aware

    def channels(self, number):
        return max(8, round(number * self.width / 8) * 8)

    def rounded(self, x, name):
        return FakeQuantize(momentum=1.0, name=f"{name}_int8")(x) if self.int8_aware else x

    def convolution(self, x, filters, stride, name, size=3):
        x = layers.Conv2D(filters, size, strides=stride, padding="same", use_bias=False, name=f"{name}_conv")(x)
        return self.normalised(x, name)

    def normalised(self, x, name):
        x = layers.BatchNormalization(momentum=0.95, name=f"{name}_norm")(x)
        return self.rounded(layers.ReLU(6.0, name=f"{name}_relu6")(x), name)

    def residual(self, x, filters, stride, expansion, name):
        """An inverted residual of MobileNetV2."""
        y = self.convolution(x, x.shape[-1] * expansion, 1, f"{name}_expand", size=1)
        y = layers.DepthwiseConv2D(3, strides=stride, padding="same", use_bias=False, name=f"{name}_depthwise")(y)
        y = self.normalised(y, name)
        y = layers.Conv2D(filters, 1, use_bias=False, name=f"{name}_project")(y)
        y = self.rounded(layers.BatchNormalization(momentum=0.95, name=f"{name}_out_norm")(y), f"{name}_out")
        if stride != 1 or x.shape[-1] != filters:
            return y
        return self.rounded(layers.Add(name=f"{name}_add")([x, y]), f"{name}_add")

    def merged(self, deep, fine, filters, name):
        """Deep features, twice as large and cropped, added to finer ones."""
        x = self.rounded(layers.Conv2D(filters, 1, name=f"{name}_from_deep")(deep), f"{name}_from_deep")
        x = layers.UpSampling2D(2, interpolation="bilinear", name=f"{name}_enlarge")(x)
        more = [have - want for have, want in zip(x.shape[1:3], fine.shape[1:3], strict=True)]
        if any(more):
            x = layers.Cropping2D(tuple((0, some) for some in more), name=f"{name}_crop")(x)
        side = self.rounded(layers.Conv2D(filters, 1, name=f"{name}_from_fine")(fine), f"{name}_from_fine")
        return self.rounded(layers.Add(name=f"{name}_add")([x, side]), f"{name}_add")


def _trunk(x, make):
    """Features of every fourth pixel, which have seen those of every 16th."""
    c = make.channels
    x = make.convolution(x, c(16), 2, "stem")
    x = make.residual(x, c(32), 2, 3, "down")
    for index in range(2):
        x = make.residual(x, c(32), 1, 3, f"block_{index}")
    fine = x
    x = make.residual(x, c(64), 2, 3, "deep_down")
    for index in range(3):
        x = make.residual(x, c(64), 1, 3, f"deep_{index}")
    coarse = x
    x = make.residual(x, c(96), 2, 3, "deepest_down")
    for index in range(3):
        x = make.residual(x, c(96), 1, 3, f"deepest_{index}")
    x = make.merged(x, coarse, c(64), "coarse")
    x = make.residual(x, c(64), 1, 2, "coarse_mix")
    x = make.merged(x, fine, c(32), "fine")
    return make.residual(x, c(32), 1, 2, "fine_mix")


def _detector(x, make):
    """Features of every eighth pixel, from those of a detector."""
    missing = [-side % LEVELS[-1] for side in x.shape[1:3]]
    if any(missing):
        x = layers.ZeroPadding2D(tuple((0, some) for some in missing), name="pad")(x)
    filters = make.channels(64)
    fine, coarse, x = yolox_nano(x, int8_aware=make.int8_aware)
    x = make.residual(x, filters, 1, 2, "deepest_mix")
    for name, level in (("coarse", coarse), ("fine", fine)):
        x = make.merged(x, level, filters, name)
        x = make.residual(x, filters, 1, 2, f"{name}_mix")
    beyond = [some // LEVELS[0] for some in missing]
    return layers.Cropping2D(tuple((0, some) for some in beyond), name="unpad")(x) if any(beyond) else x
