"""The trunk of YOLOX-nano, in stock layers: features that know where objects are, for a camera model."""

from __future__ import annotations

from keras import layers

from keras_efficient.layers import FakeQuantize

__all__ = ["LEVELS", "YOLOX", "yolox_nano"]

YOLOX = "yolox"  # names of its layers begin so

LEVELS = (8, 16, 32)  # pixels from one feature to the next
CHANNELS = 64


def yolox_nano(x, name=YOLOX, *, int8_aware=False):
    """Pixels (b, h, w, 3) in [0, 1], sides multiples of 32, to features (b, h / s, w / s, 64) for s of `LEVELS`.

    They are what YOLOX-nano takes boxes and objectness from; its part for classes is left out. Convolutions are named
    in the order of the network, `yolox_000` on, each with its bias; batch normalisation is folded into them. With
    `int8_aware` what they give is rounded, before and after their activation, and so is what additions and
    concatenations give.

    Source: YOLOX: Exceeding YOLO Series in 2021, https://arxiv.org/abs/2107.08430.
    """
    net = _Net(name, int8_aware)
    x = net.first(x)
    x = net.stage(x, 32, 1)
    c3 = x = net.stage(x, 64, 3)
    c4 = x = net.stage(x, 128, 3)
    x = net.down(x, 256)
    x = net.pyramid(x, 256)
    x = net.csp(x, 256, 1, adds=False)
    top = net.conv(x, 128)
    middle = net.csp(net.beside([_twice(top), c4]), 128, 1, adds=False)
    low = net.conv(middle, 64)
    p3 = net.csp(net.beside([_twice(low), c3]), 64, 1, adds=False)
    p4 = net.csp(net.beside([net.down(p3, 64), low]), 128, 1, adds=False)
    p5 = net.csp(net.beside([net.down(p4, 128), top]), 256, 1, adds=False)
    return [net.boxes(p) for p in (p3, p4, p5)]


def _twice(x):
    return layers.UpSampling2D(2)(x)


class _Net:
    """Layers of the network, numbered as they are made."""

    def __init__(self, name, int8_aware):
        self._name, self._int8_aware, self._count, self._rounded_count = name, int8_aware, 0, 0

    def _rounded(self, x):
        if not self._int8_aware:
            return x
        self._rounded_count += 1
        return FakeQuantize(momentum=1.0, name=f"{self._name}_int8_{self._rounded_count - 1:03d}")(x)

    def _activated(self, x, make, *arguments):
        """A convolution, numbered, and its activation."""
        self._count += 1
        x = self._rounded(make(*arguments, name=f"{self._name}_{self._count - 1:03d}")(x))
        return self._rounded(layers.Activation("silu")(x))

    def first(self, x):
        """Four pixels side by side as one of 12 channels, and a 3 × 3 of that: a 6 × 6 with a stride of 2."""
        return self._activated(layers.ZeroPadding2D(2)(x), layers.Conv2D, 16, 6, 2)

    def conv(self, x, filters):
        return self._activated(x, layers.Conv2D, filters, 1)

    def separable(self, x, filters, stride=1):
        return self.conv(self._activated(layers.ZeroPadding2D(1)(x), layers.DepthwiseConv2D, 3, stride), filters)

    def down(self, x, filters):
        return self.separable(x, filters, 2)

    def stage(self, x, filters, depth):
        return self.csp(self.down(x, filters), filters, depth)

    def beside(self, some):
        return self._rounded(layers.Concatenate()(some))

    def csp(self, x, filters, depth, adds=True):
        """A part that goes through residuals, and one that does not."""
        inside, past = self.conv(x, filters // 2), self.conv(x, filters // 2)
        for _ in range(depth):
            y = self.separable(self.conv(inside, filters // 2), filters // 2)
            inside = self._rounded(layers.Add()([inside, y])) if adds else y
        return self.conv(self.beside([inside, past]), filters)

    def pyramid(self, x, filters):
        x = self.conv(x, filters // 2)
        pooled = [layers.MaxPooling2D(size, 1, padding="same")(x) for size in (5, 9, 13)]
        return self.conv(self.beside([x, *pooled]), filters)

    def boxes(self, x):
        x = self.conv(x, CHANNELS)
        return self.separable(self.separable(x, CHANNELS), CHANNELS)
