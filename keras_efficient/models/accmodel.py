"""The network on a camera: a frame to how much each of its macroblocks matters to a server's network."""

from __future__ import annotations

import keras
from keras import layers

from keras_efficient.layers import MacroblockSaliencyHead
from keras_efficient.models.yolox import LEVELS, YOLOX, yolox_nano

__all__ = ["AccModel", "with_frozen_trunk", "without_shrink"]

SHRINKS, COLUMNS = (1, 2, 4, 8), 320
TRUNKS = ("small", "yolox-nano")
SHRUNK = "rescale"  # name of the first layer that takes shrunk frames


def AccModel(
    frame_size=(720, 1280),
    *,
    shrink=None,
    width=1.0,
    trunk="small",
    backbone=None,
    stride=None,
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
    x = layers.AveragePooling2D(shrink, padding="same", name="shrink")(frame) if shrink > 1 else frame
    of_yolox = backbone is None and trunk == "yolox-nano"
    scale, offset = (1 / 255, 0.0) if of_yolox else (1 / 127.5, -1.0)
    x = layers.Rescaling(scale, offset=offset, name=SHRUNK)(x)
    if backbone is not None:
        x = backbone(x)
    else:
        x, stride = (_detector(x, width), LEVELS[0]) if of_yolox else (_trunk(x, width), 4)
    scores = MacroblockSaliencyHead(shrink * stride, _channels(32, width), frame_size=frame_size, name="head")(x)
    return keras.Model(frame, scores, name=name or "accmodel")


def without_shrink(model):
    """An `AccModel` that takes frames as small as its own layer would shrink them, for callers that shrink them first.

    Args:
        model: an `AccModel`; its weights are shared. Any other model is given back as it is.
    """
    names = [layer.name for layer in model.layers]
    return keras.Model(model.get_layer(SHRUNK).input, model.output, name=model.name) if SHRUNK in names else model


def with_frozen_trunk(model):
    """An `AccModel` whose trunk keeps what it knows while the rest is trained: few videos would spoil a detector's.

    Args:
        model: with the trunk `"yolox-nano"`; it is changed. In others nothing is frozen.
    """
    for layer in model.layers:
        if layer.name.startswith(f"{YOLOX}_"):
            layer.trainable = False
    return model


def _channels(number, width):
    return max(8, round(number * width / 8) * 8)


def _trunk(x, width):
    """Features of every fourth pixel, which have seen those of every 16th."""

    def c(number):
        return _channels(number, width)

    x = _convolution(x, c(16), 2, "stem")
    x = _residual(x, c(32), 2, 3, "down")
    for index in range(2):
        x = _residual(x, c(32), 1, 3, f"block_{index}")
    fine = x
    x = _residual(x, c(64), 2, 3, "deep_down")
    for index in range(3):
        x = _residual(x, c(64), 1, 3, f"deep_{index}")
    coarse = x
    x = _residual(x, c(96), 2, 3, "deepest_down")
    for index in range(3):
        x = _residual(x, c(96), 1, 3, f"deepest_{index}")
    x = _merged(x, coarse, c(64), "coarse")
    x = _residual(x, c(64), 1, 2, "coarse_mix")
    x = _merged(x, fine, c(32), "fine")
    return _residual(x, c(32), 1, 2, "fine_mix")


def _detector(x, width):
    """Features of every eighth pixel, from those of a detector."""
    missing = [-side % LEVELS[-1] for side in x.shape[1:3]]
    if any(missing):
        x = layers.ZeroPadding2D(tuple((0, some) for some in missing), name="pad")(x)
    filters = _channels(64, width)
    fine, coarse, x = yolox_nano(x)
    x = _residual(x, filters, 1, 2, "deepest_mix")
    for name, level in (("coarse", coarse), ("fine", fine)):
        x = _merged(x, level, filters, name)
        x = _residual(x, filters, 1, 2, f"{name}_mix")
    beyond = [some // LEVELS[0] for some in missing]
    return layers.Cropping2D(tuple((0, some) for some in beyond), name="unpad")(x) if any(beyond) else x


def _convolution(x, filters, stride, name, size=3):
    x = layers.Conv2D(filters, size, strides=stride, padding="same", use_bias=False, name=f"{name}_conv")(x)
    x = layers.BatchNormalization(momentum=0.95, name=f"{name}_norm")(x)
    return layers.ReLU(6.0, name=f"{name}_relu6")(x)


def _residual(x, filters, stride, expansion, name):
    """An inverted residual of MobileNetV2."""
    inside = x.shape[-1] * expansion
    y = _convolution(x, inside, 1, f"{name}_expand", size=1)
    y = layers.DepthwiseConv2D(3, strides=stride, padding="same", use_bias=False, name=f"{name}_depthwise")(y)
    y = layers.ReLU(6.0, name=f"{name}_relu6")(layers.BatchNormalization(momentum=0.95, name=f"{name}_norm")(y))
    y = layers.Conv2D(filters, 1, use_bias=False, name=f"{name}_project")(y)
    y = layers.BatchNormalization(momentum=0.95, name=f"{name}_out_norm")(y)
    return layers.Add(name=f"{name}_add")([x, y]) if stride == 1 and x.shape[-1] == filters else y


def _merged(deep, fine, filters, name):
    """Deep features, twice as large and cropped, added to finer ones."""
    x = layers.Conv2D(filters, 1, name=f"{name}_from_deep")(deep)
    x = layers.UpSampling2D(2, interpolation="bilinear", name=f"{name}_enlarge")(x)
    more = [have - want for have, want in zip(x.shape[1:3], fine.shape[1:3], strict=True)]
    if any(more):
        x = layers.Cropping2D(tuple((0, some) for some in more), name=f"{name}_crop")(x)
    side = layers.Conv2D(filters, 1, name=f"{name}_from_fine")(fine)
    return layers.Add(name=f"{name}_add")([x, side])
