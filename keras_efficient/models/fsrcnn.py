"""FSRCNN (Dong et al., ECCV 2016): the small super-resolution network that SESR is compared with."""

from __future__ import annotations

import keras
from keras import layers

__all__ = ["FSRCNN"]


def FSRCNN(scale=2, *, features=56, shrunk=12, depth=4, channels=1, input_shape=(None, None), name=None):
    """FSRCNN as a functional model: extract, shrink, map `depth` times, expand, and one 9×9 transposed convolution.

    Images in [0, 1] in, `scale` times larger out; with the published sizes (56, 12, 4) 12,464 weights for one channel.
    The transposed convolution works at the output's resolution: 54 GMAC for 1080p to 4K, where SESR-M5 takes 28.

    Args:
        scale: Integer ≥ 2.
        features, shrunk, depth: d, s and m of the paper.
        channels: of the image.
        input_shape: `(height, width)`, either may be `None`.
        name: of the model.

    Input shape: `(batch, height, width, channels)`. Output shape: `(batch, scale·height, scale·width, channels)`.

    Raises:
        ValueError: a scale below 2.

    Source: Accelerating the Super-Resolution Convolutional Neural Network, ECCV 2016, section 3.2. The clip is ours.
    """
    if not isinstance(scale, int) or scale < 2:
        raise ValueError(f"`scale` must be an integer of at least 2. Received: scale={scale!r}.")

    def convolution(x, filters, size, name):
        x = layers.Conv2D(filters, size, padding="same", kernel_initializer="he_normal", name=name)(x)
        slopes = keras.initializers.Constant(0.25)
        return layers.PReLU(shared_axes=[1, 2], alpha_initializer=slopes, name=f"{name}_activation")(x)

    image = keras.Input((*input_shape, channels), name="y" if channels == 1 else "rgb")
    x = convolution(image, features, 5, "extract")
    x = convolution(x, shrunk, 1, "shrink")
    for index in range(depth):
        x = convolution(x, shrunk, 3, f"map_{index}")
    x = convolution(x, features, 1, "expand")
    # The paper starts the last layer with a small normal distribution.
    start = keras.initializers.RandomNormal(stddev=1e-3)
    x = layers.Conv2DTranspose(channels, 9, strides=scale, padding="same", kernel_initializer=start, name="enlarge")(x)
    x = layers.ReLU(max_value=1.0, name="clip")(x)
    return keras.Model(image, layers.Identity(name="upscaled")(x), name=name or f"fsrcnn_x{scale}")
