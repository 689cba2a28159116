"""SESR-NPU: collapsible linear blocks laid out for an NPU's memory, one tensor alive at a time."""

from __future__ import annotations

import keras
import numpy as np
from keras import layers, ops

from keras_efficient.layers import CollapsibleLinearBlock, FakeQuantize
from keras_efficient.models.sesr import clip

__all__ = ["SESRNPU"]


def SESRNPU(
    scale=2,
    depth=6,
    *,
    features=16,
    last_kernel_size=3,
    expansion=64,
    int8_aware=False,
    input_shape=(None, None),
    name=None,
):
    """A super-resolution network that an NPU can run without leaving its on-chip memory.

    ```
    h = relu(block5x5(x));   depth times:  h = relu(block3x3(h))     the identity lies in each kernel
    y = min(max(depth_to_space(block(h), scale), 0), 1)
    ```

    SESR without its two additions: a tensor that waits for an addition is written to DRAM and read back, and DRAM
    traffic
    is what an NPU spends its time on. The image itself travels through the network instead, in a channel that the first
    block starts with and the last block adds under every output pixel, all of it trainable; the sum is made in the
    convolution's 32-bit accumulator, where it costs no time. In int8 this has a price: every layer rounds the image
    that passes through it, and int8 files of this network lose about 1 dB so far.

    Args:
        scale: 2, 3 or 4.
        depth: Integer ≥ 0. 3×3 blocks between the first and the last.
        features: Integer. Channels; NPUs count in sixteens.
        last_kernel_size: 3 or 5.
        expansion: Integer. Channels inside the linear blocks.
        int8_aware: Boolean. Fake-quantises kernels and activations, for quantisation-aware training.
        input_shape: `(height, width)`, either may be `None`.
        name: of the model; `sesr_npu6_x2` and so on if `None`.

    Input shape: `(batch, height, width, 1)`. Output shape: `(batch, scale·height, scale·width, 1)`.

    Raises:
        ValueError: an argument outside of the lists above.

    Source: the blocks of SESR (MLSys 2022); the image channel after QuickSRNet (arXiv 2303.04336); the rest is ours.
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
    first = CollapsibleLinearBlock(features, 5, residual=False, name="first", **options)
    last = CollapsibleLinearBlock(scale**2, last_kernel_size, residual=False, name="last", **options)
    y = FakeQuantize(minimum=0.0, maximum=1.0, name="image_int8")(image) if int8_aware else image
    x = activated(first(y), "first")
    for index in range(depth):
        x = CollapsibleLinearBlock(features, 3, residual=True, name=f"body_{index}", **options)(x)
        x = activated(x, f"body_{index}")
    x = clip(int8_aware)(last(x))
    x = ops.depth_to_space(x, scale)
    model = keras.Model(image, layers.Identity(name="upscaled")(x), name=name or f"sesr_npu{depth}_x{scale}")
    _start_with_the_image(first, last)
    return model


def _start_with_the_image(first, last):
    """Gives channel 0 the image in the first block, and every output the channel 0 in the last one.

    One of the expanded channels of each block carries it: a delta, projected to channel 0 (first) or to all (last).
    """
    for block, receives in ((first, np.eye(first.filters)[0]), (last, np.ones(last.filters))):
        expand, project = (ops.convert_to_numpy(w).copy() for w in (block.expand_kernel, block.project_kernel))
        rows, columns = block.kernel_size
        expand[..., 0] = 0
        expand[rows // 2, columns // 2, 0, 0] = 1
        project[0] = receives
        block.expand_kernel.assign(expand)
        block.project_kernel.assign(project)
