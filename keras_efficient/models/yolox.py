"""The trunk of YOLOX-nano, in stock layers: features that know where objects are, for a camera model."""

from __future__ import annotations

from keras import layers

__all__ = ["LEVELS", "YOLOX", "yolox_nano"]

YOLOX = "yolox"  # names of its layers begin so

LEVELS = (8, 16, 32)  # pixels from one feature to the next
CHANNELS = 64


def yolox_nano(x, name=YOLOX):
    """Pixels (b, h, w, 3) in [0, 1], sides multiples of 32, to features (b, h / s, w / s, 64) for s of `LEVELS`.

    They are what YOLOX-nano takes boxes and objectness from; its part for classes is left out. Convolutions are named
    in the order of the network, `yolox_000` on, each with its bias; batch normalisation is folded into them.

    Source: YOLOX: Exceeding YOLO Series in 2021, https://arxiv.org/abs/2107.08430.
    """
    net = _Net(name)
    x = net.first(x)
    x = net.stage(x, 32, 1)
    c3 = x = net.stage(x, 64, 3)
    c4 = x = net.stage(x, 128, 3)
    x = net.down(x, 256)
    x = net.pyramid(x, 256)
    x = net.csp(x, 256, 1, adds=False)
    top = net.conv(x, 128)
    middle = net.csp(layers.Concatenate()([_twice(top), c4]), 128, 1, adds=False)
    low = net.conv(middle, 64)
    p3 = net.csp(layers.Concatenate()([_twice(low), c3]), 64, 1, adds=False)
    p4 = net.csp(layers.Concatenate()([net.down(p3, 64), low]), 128, 1, adds=False)
    p5 = net.csp(layers.Concatenate()([net.down(p4, 128), top]), 256, 1, adds=False)
    return [net.boxes(p) for p in (p3, p4, p5)]


def _twice(x):
    return layers.UpSampling2D(2)(x)


class _Net:
    """Layers of the network, numbered as they are made."""

    def __init__(self, name):
        self._name, self._count = name, 0

    def _next(self):
        self._count += 1
        return f"{self._name}_{self._count - 1:03d}"

    def first(self, x):
        """Four pixels side by side as one of 12 channels, and a 3 × 3 of that: a 6 × 6 with a stride of 2."""
        return layers.Activation("silu")(layers.Conv2D(16, 6, 2, name=self._next())(layers.ZeroPadding2D(2)(x)))

    def conv(self, x, filters):
        return layers.Activation("silu")(layers.Conv2D(filters, 1, name=self._next())(x))

    def separable(self, x, filters, stride=1):
        x = layers.ZeroPadding2D(1)(x)
        x = layers.Activation("silu")(layers.DepthwiseConv2D(3, stride, name=self._next())(x))
        return self.conv(x, filters)

    def down(self, x, filters):
        return self.separable(x, filters, 2)

    def stage(self, x, filters, depth):
        return self.csp(self.down(x, filters), filters, depth)

    def csp(self, x, filters, depth, adds=True):
        """A part that goes through residuals, and one that does not."""
        inside, past = self.conv(x, filters // 2), self.conv(x, filters // 2)
        for _ in range(depth):
            y = self.separable(self.conv(inside, filters // 2), filters // 2)
            inside = layers.Add()([inside, y]) if adds else y
        return self.conv(layers.Concatenate()([inside, past]), filters)

    def pyramid(self, x, filters):
        x = self.conv(x, filters // 2)
        pooled = [layers.MaxPooling2D(size, 1, padding="same")(x) for size in (5, 9, 13)]
        return self.conv(layers.Concatenate()([x, *pooled]), filters)

    def boxes(self, x):
        x = self.conv(x, CHANNELS)
        return self.separable(self.separable(x, CHANNELS), CHANNELS)
