"""Residual networks that classify images: those of CIFAR, with activations first, wide ones, and ImageNet's ResNet-50.

They differ in a few places only, which `_Family` names; everything else is one function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import keras
from keras import layers, ops

from keras_efficient.errors import WrongArgument
from keras_efficient.models.mlp import check_classifier

__all__ = ["CifarResNet", "PreResNet", "ResNet50", "WideResNet"]


def CifarResNet(depth=20, *, shortcut="pad", input_shape=(32, 32, 3), num_classes=10, dropout=0.0, name=None):
    """He et al.'s ResNet for CIFAR: 3 × 3 convolution, three stages of basic blocks, pooling, logits.

    ```
    y = relu(shortcut(x) + norm(conv3x3(relu(norm(conv3x3(x))))))      16, 32, 64 channels, n blocks, depth = 6 n + 2
    ```

    | depth | weights, trainable, by `"pad"` | by `"projection"` |
    |---|---|---|
    | 20 | 269,722 | 272,474 |
    | 32 | 464,154 | 466,906 |
    | 56 | 853,018 | 855,770 |

    Args:
        depth: Integer, 8, 14, 20 and so on.
        shortcut: between stages: `"pad"`, every second pixel and zeros for new channels (option A, the paper's), or
            `"projection"`, a 1 × 1 convolution and its normalisation (option B).
        input_shape: `(height, width, channels)`; sides may be `None`.
        num_classes: Integer.
        dropout: Float in [0, 1), before the logits.
        name: of the model; `resnet_20` and so on if `None`.

    Input shape: `(batch, height, width, channels)`. Output shape: `(batch, num_classes)`.

    Raises:
        WrongArgument: an argument outside of the lists above.

    Source: Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2.
    """
    if shortcut not in ("pad", "projection"):
        raise WrongArgument(f'`shortcut` must be "pad" or "projection". Received: shortcut={shortcut!r}.')
    family = _Family(shortcut=shortcut)
    blocks = _blocks(depth, per_block=6, others=2)
    return _network(family, [16, 32, 64], [blocks] * 3, input_shape, num_classes, dropout, name or f"resnet_{depth}")


def PreResNet(depth=20, *, input_shape=(32, 32, 3), num_classes=10, dropout=0.0, name=None):
    """He et al.'s ResNet with normalisation and activation before each convolution, for CIFAR.

    ```
    y = shortcut(x) + conv(relu(norm( … conv(relu(norm(x))) … )))      16, 32, 64 channels
    ```

    Blocks are two 3 × 3 convolutions below a depth of 44 (6 n + 2), and 1 × 1, 3 × 3, 1 × 1 with four times the
    channels from there on (9 n + 2). Where shapes change the shortcut is a 1 × 1 convolution.

    Args:
        depth: Integer: 8, 14, 20, 26, 32, 38; 47, 56, …, 110, 164.
        input_shape, num_classes, dropout: of `CifarResNet`.
        name: of the model; `preresnet_20` and so on if `None`.

    Input shape: `(batch, height, width, channels)`. Output shape: `(batch, num_classes)`.

    Raises:
        WrongArgument: a depth that no number of blocks gives, or a number out of range.

    Source: Identity Mappings in Deep Residual Networks, ECCV 2016; depths and shortcuts as in URSABench.
    """
    bottleneck = depth >= 44
    family = _Family(bottleneck=bottleneck, preactivation=True, shortcut="convolution", strided=int(bottleneck))
    blocks = _blocks(depth, per_block=9 if bottleneck else 6, others=2)
    return _network(family, [16, 32, 64], [blocks] * 3, input_shape, num_classes, dropout, name or f"preresnet_{depth}")


def WideResNet(depth=28, width=10, *, input_shape=(32, 32, 3), num_classes=10, dropout=0.0, name=None):
    """Zagoruyko and Komodakis' wide ResNet: few blocks of 16, 32 and 64 times `width` channels, activations first.

    36,489,290 trainable weights at depth 28 and width 10. Convolutions have biases and the second one of a block has
    the stride, as in URSABench.

    Args:
        depth: Integer, 10, 16, 22, 28 and so on (6 n + 4).
        width: Integer.
        input_shape, num_classes: of `CifarResNet`.
        dropout: Float in [0, 1), between the two convolutions of each block, and before the logits.
        name: of the model; `wide_resnet_28_10` and so on if `None`.

    Input shape: `(batch, height, width, channels)`. Output shape: `(batch, num_classes)`.

    Raises:
        WrongArgument: a depth that no number of blocks gives, or a number out of range.

    Source: Wide Residual Networks, BMVC 2016.
    """
    if width < 1:
        raise WrongArgument(f"`width` must be 1 or more. Received: width={width!r}.")
    family = _Family(preactivation=True, shortcut="convolution", use_bias=True, strided=1, block_dropout=dropout)
    blocks, name = _blocks(depth, per_block=6, others=4), name or f"wide_resnet_{depth}_{width}"
    widths = [16 * width, 32 * width, 64 * width]
    return _network(family, widths, [blocks] * 3, input_shape, num_classes, dropout, name)


def ResNet50(*, small_images=False, input_shape=None, num_classes=1000, dropout=0.0, name=None):
    """ResNet-50, with the stride in the 3 × 3 convolutions: 25,557,032 trainable weights for 1,000 classes.

    Not the one of `keras.applications`, whose convolutions have biases and whose strides lie in the 1 × 1.

    Args:
        small_images: Boolean. Begins with a 3 × 3 convolution in the place of a 7 × 7 with stride and pooling, as
            URSABench does for CIFAR.
        input_shape: `(height, width, channels)`, sides may be `None`; `None`: `(224, 224, 3)`, small `(32, 32, 3)`.
        num_classes: Integer.
        dropout: Float in [0, 1), before the logits.
        name: of the model; `resnet_50` if `None`.

    Input shape: `(batch, height, width, channels)`. Output shape: `(batch, num_classes)`.

    Raises:
        WrongArgument: a number out of range.

    Source: Deep Residual Learning for Image Recognition, CVPR 2016; the stride as in torchvision's.
    """
    family = _Family(True, shortcut="projection", strided=1, stem_filters=64, large_images=not small_images)
    shape = input_shape or ((32, 32, 3) if small_images else (224, 224, 3))
    return _network(family, [64, 128, 256, 512], [3, 4, 6, 3], shape, num_classes, dropout, name or "resnet_50")


@dataclass(frozen=True)
class _Family:
    """Where residual networks differ.

    bottleneck: blocks of 1 × 1, 3 × 3, 1 × 1 convolutions, and not of two 3 × 3.
    preactivation: normalisation and ReLU come before a convolution.
    shortcut: where shapes change: zeros, a 1 × 1 convolution, or that and its normalisation.
    strided: which convolution of a block has the stride.
    block_dropout: rate, behind the first convolution of a block.
    stem_filters: channels before the first stage.
    large_images: the network begins with 7 × 7 and pooling.
    """

    bottleneck: bool = False
    preactivation: bool = False
    shortcut: Literal["pad", "convolution", "projection"] = "pad"
    use_bias: bool = False
    strided: int = 0
    block_dropout: float = 0.0
    stem_filters: int = 16
    large_images: bool = False

    def block(self, x, filters, stride, name):
        sizes = [(1, filters), (3, filters), (1, 4 * filters)] if self.bottleneck else [(3, filters)] * 2
        y = x
        for index, (kernel_size, width) in enumerate(sizes):
            step, part = stride if index == self.strided else 1, f"{name}_{index}"
            if self.preactivation:
                y = _relu(_norm(y, part), part)
            y = self.conv(y, width, kernel_size, step, part)
            if self.block_dropout and index == 0:
                y = layers.Dropout(self.block_dropout, name=f"{part}_dropout")(y)
            if not self.preactivation:
                y = _norm(y, part)
                y = y if index == len(sizes) - 1 else _relu(y, part)
        y = layers.Add(name=f"{name}_add")([self.around(x, sizes[-1][1], stride, name), y])
        return y if self.preactivation else _relu(y, name)

    def around(self, x, filters, stride, name):
        """The shortcut, itself where shapes stay."""
        more = filters - x.shape[-1]
        if stride == 1 and not more:
            return x
        if self.shortcut == "pad":
            # A pool of one pixel is every second pixel, in an operation that every target has.
            x = layers.AveragePooling2D(1, stride, name=f"{name}_shortcut")(x)
            return ops.pad(x, ((0, 0), (0, 0), (0, 0), (more // 2, more - more // 2)))
        x = self.conv(x, filters, 1, stride, f"{name}_shortcut")
        return _norm(x, f"{name}_shortcut") if self.shortcut == "projection" else x

    def conv(self, x, filters, kernel_size, stride, name):
        padding = "same"
        if stride > 1:
            # The same pixels below a kernel as without a stride; "same" would hang on whether a side is even.
            padding = "valid"
            x = layers.ZeroPadding2D(kernel_size // 2, name=f"{name}_pad")(x) if kernel_size > 1 else x
        options = {"use_bias": self.use_bias, "kernel_initializer": "he_normal", "name": f"{name}_conv"}
        return layers.Conv2D(filters, kernel_size, stride, padding, **options)(x)

    def stem(self, x):
        kernel_size, stride = (7, 2) if self.large_images else (3, 1)
        x = self.conv(x, self.stem_filters, kernel_size, stride, "stem")
        x = x if self.preactivation else _relu(_norm(x, "stem"), "stem")
        if not self.large_images:
            return x
        # Zeros do not count: what is pooled is never below them.
        return layers.MaxPooling2D(3, 2, name="stem_pool")(layers.ZeroPadding2D(1, name="stem_pool_pad")(x))


def _network(family, widths, blocks, input_shape, num_classes, dropout, name):
    check_classifier(num_classes, dropout)
    if len(input_shape) != 3 or not input_shape[2]:
        raise WrongArgument(f"`input_shape` is (height, width, channels). Received: input_shape={input_shape!r}.")
    image = keras.Input(tuple(input_shape), name="image")
    x = family.stem(image)
    for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        for index in range(count):
            stride = 2 if stage > 0 and index == 0 else 1
            x = family.block(x, width, stride, f"stage_{stage}_block_{index}")
    if family.preactivation:
        x = _relu(_norm(x, "last"), "last")
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    return keras.Model(image, layers.Dense(num_classes, name="logits")(x), name=name)


def _blocks(depth, *, per_block, others):
    """Blocks in each of three stages."""
    count, rest = divmod(depth - others, per_block)
    if rest or count < 1:
        nearest = max(round((depth - others) / per_block), 1) * per_block + others
        message = f"`depth` must be {per_block} n + {others}. Received: depth={depth!r}."
        raise WrongArgument(message, hint=f"The nearest is {nearest}.")
    return count


def _norm(x, name):
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"{name}_norm")(x)


def _relu(x, name):
    return layers.ReLU(name=f"{name}_relu")(x)
