"""SESR: super-efficient super-resolution (Bhardwaj et al., MLSys 2022)."""

from __future__ import annotations

import keras
from keras import layers, ops

from keras_efficient.layers import CollapsibleLinearBlock, FakeQuantize

__all__ = ["SESR", "SESR_VARIANTS"]

# variant: (features f, body blocks m, expansion p of the paper)
SESR_VARIANTS = {
    "m3": (16, 3, 256),
    "m5": (16, 5, 256),
    "m7": (16, 7, 256),
    "m11": (16, 11, 64),
    "xl": (32, 11, 64),
}


def SESR(
    scale=2,
    variant="m5",
    *,
    activation="prelu",
    channels=1,
    expansion=None,
    collapsed=True,
    int8_aware=False,
    input_shape=(None, None),
    name=None,
):
    """SESR as a functional model: images in [0, 1] in, images `scale` times larger in [0, 1] out.

    ```
    f0  = block5x5(x)                               1 → f channels, no activation
    h   = f0;  m times:  h = activation(block3x3(h))    the identity lies in each kernel
    out = depth_to_space(block5x5(h + f0) + x, scale)   f → scale² channels, x under each of them
    y   = min(max(out, 0), 1)
    ```

    Each block is a `CollapsibleLinearBlock`: train this model, then `keras_efficient.deploy.deploy(model)` gives the
    small one.

    | variant | f | m | weights x2 | x3 | x4 |
    |---|---|---|---|---|---|
    | m3 | 16 | 3 | 8,912 | 10,912 | 13,712 |
    | m5 | 16 | 5 | 13,520 | 15,520 | 18,320 |
    | m7 | 16 | 7 | 18,128 | 20,128 | 22,928 |
    | m11 | 16 | 11 | 27,344 | 29,344 | 32,144 |
    | xl | 32 | 11 | 105,376 | 109,376 | 114,976 |

    (deployed, without biases and PReLU slopes, one channel). Multiply-accumulates: the weights times the input's
    pixels.

    Args:
        scale: 2, 3 or 4.
        variant: `"m3"`, `"m5"`, `"m7"`, `"m11"` or `"xl"`.
        activation: `"prelu"` (one slope a channel) or `"relu"` (for NPUs).
        channels: 1 (luma) or 3 (RGB).
        expansion: Integer or `None`. Channels inside the linear blocks, instead of the paper's 256 (m3, m5, m7) or 64.
        collapsed: Boolean. `False` trains the expanded convolutions, for comparison.
        int8_aware: Boolean. Fake-quantises kernels and activations, for quantisation-aware training.
        input_shape: `(height, width)`, either may be `None`.
        name: of the model; `sesr_m5_x2` and so on if `None`.

    Input shape: `(batch, height, width, channels)`. Output shape: `(batch, scale·height, scale·width, channels)`.

    Raises:
        ValueError: an argument outside of the lists above.

    Source: MLSys 2022, section 3; x3 and the clip-free training are ours.
    """
    if variant not in SESR_VARIANTS:
        raise ValueError(f"`variant` must be one of {', '.join(SESR_VARIANTS)}. Received: variant={variant!r}.")
    if scale not in (2, 3, 4):
        raise ValueError(f"`scale` must be 2, 3 or 4. Received: scale={scale!r}.")
    if channels not in (1, 3):
        raise ValueError(f"`channels` must be 1 or 3. Received: channels={channels!r}.")
    if activation not in ("prelu", "relu"):
        raise ValueError(f'`activation` must be "prelu" or "relu". Received: activation={activation!r}.')
    scale = int(scale)
    features, depth, paper_expansion = SESR_VARIANTS[variant]
    block_options = {
        "padding": "same",
        "expansion": paper_expansion if expansion is None else expansion,
        "collapsed": collapsed,
        "kernel_bits": 8 if int8_aware else None,
    }

    def rounded(x, name):
        return FakeQuantize(name=f"{name}_int8")(x) if int8_aware else x

    image = keras.Input((*input_shape, channels), name="y" if channels == 1 else "rgb")
    y = FakeQuantize(minimum=0.0, maximum=1.0, name="image_int8")(image) if int8_aware else image
    first = CollapsibleLinearBlock(features, 5, residual=False, name="first", **block_options)(y)
    first = rounded(first, "first")
    x = first
    for index in range(depth):
        x = CollapsibleLinearBlock(features, 3, residual=True, name=f"body_{index}", **block_options)(x)
        x = _activation(activation, f"body_{index}_activation", int8_aware)(x)
        x = rounded(x, f"body_{index}")
    x = rounded(layers.Add(name="feature_residual")([x, first]), "feature_residual")
    x = CollapsibleLinearBlock(channels * scale**2, 5, residual=False, name="last", **block_options)(x)
    x = rounded(x, "last")
    x = layers.Add(name="image_residual")([x, repeat_channels(y, scale**2)])
    # Clipping comes before the shuffle: the same pixels, and the NPU's row phases keep it inside a convolution.
    x = clip(int8_aware)(x)
    x = ops.depth_to_space(x, scale)
    model_name = name or f"sesr_{variant}_x{scale}"
    return keras.Model(image, layers.Identity(name="upscaled")(x), name=model_name)


def repeat_channels(image, times):
    """`image` laid `times` times behind itself, or itself where broadcasting does the same."""
    if image.shape[-1] == 1:
        return image
    return layers.Concatenate(name="image_under_each_phase")([image] * times)


def clip(int8_aware):
    """Between 0 and 1; in integers the ends of the range clip, and their steps are those of 8-bit pixels."""
    if int8_aware:
        return FakeQuantize(minimum=0.0, maximum=1.0, name="clip")
    return layers.ReLU(max_value=1.0, name="clip")


def _activation(kind, name, int8_aware):
    if kind == "relu":
        return layers.ReLU(name=name)
    # Slopes of at most 1: an int8 file computes max(x, slope·x), each side rounded once, inside the convolution.
    constraint = keras.constraints.MaxNorm(1.0) if int8_aware else None
    initial = keras.initializers.Constant(0.25)
    return layers.PReLU(shared_axes=[1, 2], alpha_initializer=initial, alpha_constraint=constraint, name=name)
