"""QuickSRNet (Berger et al., 2023): plain convolutions that start as an identity, for comparison with SESR."""

from __future__ import annotations

import keras
import numpy as np
from keras import layers, ops

__all__ = ["QUICKSRNET_VARIANTS", "QuickSRNet"]

# variant: (features, 3×3 convolutions between the first and the last)
QUICKSRNET_VARIANTS = {"small": (32, 2), "medium": (32, 5), "large": (64, 11)}


def QuickSRNet(scale=2, variant="small", *, channels=1, input_shape=(None, None), name=None):
    """QuickSRNet as a functional model: images in [0, 1] in, `scale` times larger out.

    ```
    h = min(max(conv3x3(h), 0), 1)   1 + depth times;   y = min(max(depth_to_space(conv3x3(h), scale), 0), 1)
    ```

    No skip connection: every kernel starts with an identity, so that the untrained network is nearest-neighbour
    upscaling.

    Args:
        scale: 2, 3 or 4.
        variant: `"small"` (32 features, 2 convolutions between), `"medium"` (32, 5) or `"large"` (64, 11).
        channels: 1 (luma) or 3 (RGB).
        input_shape: `(height, width)`, either may be `None`.
        name: of the model.

    Input shape: `(batch, height, width, channels)`. Output shape: `(batch, scale·height, scale·width, channels)`.

    Raises:
        ValueError: an argument outside of the lists above.

    Source: QuickSRNet, arXiv 2303.04336, section 3.
    """
    if variant not in QUICKSRNET_VARIANTS:
        known = ", ".join(QUICKSRNET_VARIANTS)
        raise ValueError(f"`variant` must be one of {known}. Received: variant={variant!r}.")
    if scale not in (2, 3, 4):
        raise ValueError(f"`scale` must be 2, 3 or 4. Received: scale={scale!r}.")
    features, depth = QUICKSRNET_VARIANTS[variant]
    image = keras.Input((*input_shape, channels), name="y" if channels == 1 else "rgb")
    convolutions = [layers.Conv2D(features, 3, padding="same", name=f"conv_{i}") for i in range(depth + 1)]
    last = layers.Conv2D(channels * scale**2, 3, padding="same", name="last")
    x = image
    for index, convolution in enumerate(convolutions):
        x = layers.ReLU(max_value=1.0, name=f"conv_{index}_activation")(convolution(x))
    x = layers.ReLU(max_value=1.0, name="clip")(last(x))
    x = ops.depth_to_space(x, scale)
    model = keras.Model(image, layers.Identity(name="upscaled")(x), name=name or f"quicksrnet_{variant}_x{scale}")
    for convolution in (*convolutions, last):
        _add_identity(convolution, channels)
    return model


def _add_identity(convolution, channels):
    kernel, bias = (np.array(w) for w in convolution.get_weights())
    inputs, outputs = kernel.shape[2:]
    if outputs % channels == 0 and convolution.name == "last":
        # Output o of the last layer is colour o mod channels of its pixel.
        kernel[1, 1, np.arange(outputs) % channels, np.arange(outputs)] += 1
    else:
        shared = np.arange(min(inputs, outputs))
        kernel[1, 1, shared, shared] += 1
    convolution.set_weights([kernel, bias])
