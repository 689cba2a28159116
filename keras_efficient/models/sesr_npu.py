"""SESR-NPU: collapsible linear blocks laid out for an NPU's memory, one wide tensor alive at a time."""

from __future__ import annotations

import keras
from keras import layers, ops

from keras_efficient.layers import CollapsibleLinearBlock, FakeQuantize
from keras_efficient.models.sesr import clip

__all__ = ["SESRNPU"]


def SESRNPU(
    scale=2,
    depth=5,
    *,
    features=16,
    last_kernel_size=3,
    expansion=64,
    sparsity=None,
    int8_aware=False,
    input_shape=(None, None),
    name=None,
):
    """A super-resolution network that an NPU can run almost without leaving its on-chip memory.

    ```
    h = relu(block5x5(x));   depth times:  h = relu(block3x3(h))     the identity lies in each kernel
    y = min(max(depth_to_space(block(h) + x, scale), 0), 1)          x under each of the scale² channels
    ```

    SESR without its feature residual: a wide tensor that waits for an addition is written to DRAM and read back, and
    DRAM traffic is what an NPU spends its time on. The image residual stays: it is one channel deep, and with it only
    the small correction is rounded in int8, not the picture.

    Args:
        scale: 2, 3 or 4.
        depth: Integer ≥ 0. 3×3 blocks between the first and the last.
        features: Integer. Channels; NPUs count in sixteens.
        last_kernel_size: 3 or 5.
        expansion: Integer. Channels inside the linear blocks.
        sparsity: `None` or `"2:4"`: at most two of four neighbouring input channels of a tap are kept in every block
            but the first, which an Ethos-U85 runs in about half the time.
        int8_aware: Boolean. Fake-quantises kernels and activations, for quantisation-aware training.
        input_shape: `(height, width)`, either may be `None`.
        name: of the model; `sesr_npu5_x2` and so on if `None`.

    Input shape: `(batch, height, width, 1)`. Output shape: `(batch, scale·height, scale·width, 1)`.

    Raises:
        ValueError: an argument outside of the lists above.

    Source: the blocks and the image residual of SESR (MLSys 2022); the rest is ours.
    """
    if scale not in (2, 3, 4):
        raise ValueError(f"`scale` must be 2, 3 or 4. Received: scale={scale!r}.")
    if not isinstance(depth, int) or depth < 0:
        raise ValueError(f"`depth` must be an integer of at least 0. Received: depth={depth!r}.")
    options = {"padding": "same", "expansion": expansion, "kernel_bits": 8 if int8_aware else None}

    def activated(x, name):
        x = layers.ReLU(name=f"{name}_activation")(x)
        return FakeQuantize(name=f"{name}_int8")(x) if int8_aware else x

    image = keras.Input((*input_shape, 1), name="y")
    y = FakeQuantize(minimum=0.0, maximum=1.0, name="image_int8")(image) if int8_aware else image
    x = CollapsibleLinearBlock(features, 5, residual=False, name="first", **options)(y)
    x = activated(x, "first")
    options["sparsity"] = sparsity
    for index in range(depth):
        x = CollapsibleLinearBlock(features, 3, residual=True, name=f"body_{index}", **options)(x)
        x = activated(x, f"body_{index}")
    x = CollapsibleLinearBlock(scale**2, last_kernel_size, residual=False, name="last", **options)(x)
    x = FakeQuantize(name="last_int8")(x) if int8_aware else x
    x = layers.Add(name="image_residual")([x, y])
    x = ops.depth_to_space(clip(int8_aware)(x), scale)
    model_name = name or f"sesr_npu{depth}_x{scale}"
    return keras.Model(image, layers.Identity(name="upscaled")(x), name=model_name)
