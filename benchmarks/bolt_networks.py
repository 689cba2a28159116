"""Regions of the shapes that are measured, with random weights; fixed before anything was."""

from __future__ import annotations

import numpy as np

from keras_efficient.export.bolt.region import Activate, Add, Layer, Region

__all__ = ["BERT", "CONVOLUTIONS", "PAIRS", "ROW_PAIRS", "convolution", "pair", "row_pair", "rows_of", "sesr"]

RNG = np.random.default_rng(0)
# Rows, filters, channels: of BERT with batches of 32 and sequences of 40.
BERT = ((1280, 3072, 768), (1280, 768, 768), (1280, 768, 3072))
# Images, height and width, channels, filters, kernel, stride, activation, whether a residual is added behind it.
CONVOLUTIONS = (
    (32, 56, 64, 64, 3, 1, "relu", False),
    (32, 56, 64, 64, 3, 1, "prelu", True),
    (32, 28, 128, 128, 3, 1, "gelu", False),
    (32, 112, 16, 16, 3, 1, "prelu", False),
    (32, 112, 16, 32, 3, 2, "hard_swish", False),
    (1, 1080, 16, 16, 3, 1, "prelu", True),
    (32, 224, 3, 48, 3, 2, "relu", False),
    (32, 56, 24, 24, 3, 1, "silu", True),
)
# Table 2 of the paper: images, height and width, channels, filters, stride; then a 1×1 of as many filters.
PAIRS = (
    (32, 224, 3, 48, 2),
    (32, 112, 48, 48, 2),
    (32, 56, 48, 48, 1),
    (32, 224, 3, 64, 2),
    (32, 112, 64, 64, 2),
    (32, 56, 64, 64, 1),
)
# Table 1: rows, channels, filters of the first, filters of the second.
ROW_PAIRS = ((2464, 4, 1, 4), (16384, 256, 64, 16), (32768, 576, 128, 64), (128320, 96, 32, 96))


def _weights(height: int, width: int, channels: int, filters: int) -> np.ndarray:
    fan = height * width * channels
    return (RNG.normal(size=(height, width, channels, filters)) / np.sqrt(fan)).astype(np.float32)


def _bias(filters: int) -> np.ndarray:
    return (0.1 * RNG.normal(size=filters)).astype(np.float32)


def _activation(kind: str, filters: int) -> Activate:
    return Activate(kind, slopes=(0.3 * RNG.normal(size=filters)).astype(np.float32) if kind == "prelu" else None)


def _conv(value: int, kernel: int, channels: int, filters: int, *steps: Activate | Add, stride: int = 1) -> Layer:
    padding = (kernel // 2,) * 4
    own = _weights(kernel, kernel, channels, filters)
    return Layer(value, own, _bias(filters), stride=(stride, stride), padding=padding, steps=steps)


def sesr(blocks: int, filters: int = 16, scale: int = 2) -> Region:
    """As models.SESR when it is deployed: a long skip, and the input under all phases of the output."""
    layers = [_conv(0, 5, 1, filters, _activation("prelu", filters))]
    for number in range(1, blocks + 1):
        skip = (Add(1),) if number == blocks else ()
        layers.append(_conv(number, 3, filters, filters, _activation("prelu", filters), *skip))
    layers.append(_conv(blocks + 1, 5, filters, scale**2, Add(0)))
    return Region(tuple(layers), (1,), shuffle=scale)


def convolution(channels: int, filters: int, kernel: int, stride: int, activation: str, residual: bool) -> Region:
    """One layer with its epilogue."""
    steps = (_activation(activation, filters), *((Add(1),) if residual else ()))
    layer = _conv(0, kernel, channels, filters, *steps, stride=stride)
    return Region((layer,), (channels, filters) if residual else (channels,))


def pair(channels: int, filters: int, stride: int) -> Region:
    """3×3 and 1×1, with ReLU behind each."""
    relu = Activate("relu")
    first = _conv(0, 3, channels, filters, relu, stride=stride)
    return Region((first, _conv(1, 1, filters, filters, relu)), (channels,))


def rows_of(channels: int, filters: int, activation: str) -> Region:
    """One product of matrices."""
    return Region((_conv(0, 1, channels, filters, _activation(activation, filters)),), (channels,), rows=True)


def row_pair(channels: int, middle: int, filters: int) -> Region:
    """Two of them, with ReLU behind each."""
    relu = Activate("relu")
    return Region((_conv(0, 1, channels, middle, relu), _conv(1, 1, middle, filters, relu)), (channels,), rows=True)
