"""Regions with random weights, and a kernel's result on the CPU beside what the region means."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from keras_efficient.export.bolt.checking import compare, random_inputs
from keras_efficient.export.bolt.region import Activate, Add, Layer, Region

RNG = np.random.default_rng(0)


def weights(height, width, channels, filters):
    fan = height * width * channels
    return (RNG.normal(size=(height, width, channels, filters)) / np.sqrt(fan)).astype(np.float32)


def bias(filters):
    return RNG.normal(size=filters).astype(np.float32) * 0.1


def prelu(filters):
    return Activate("prelu", slopes=RNG.normal(size=filters).astype(np.float32) * 0.3)


def conv(value, kernel, channels, filters, *steps, **options):
    """A layer that keeps the size, unless `padding` says otherwise."""
    padding = options.pop("padding", (kernel // 2,) * 4)
    return Layer(
        value, weights(kernel, kernel, channels, filters), bias(filters), padding=padding, steps=steps, **options
    )


def depthwise(channels, kernel, *steps, **options):
    padding = options.pop("padding", (kernel // 2,) * 4)
    own = RNG.normal(size=(kernel, kernel, channels, 1)).astype(np.float32) / kernel
    return Layer(0, own, bias(channels), padding=padding, depthwise=True, steps=steps, **options)


def sesr(blocks, filters=16, scale=2):
    """As models.SESR is when it is deployed: a long skip, and the input under all phases of the output."""
    layers = [conv(0, 5, 1, filters, prelu(filters))]
    for number in range(1, blocks + 1):
        skip = (Add(1),) if number == blocks else ()
        layers.append(conv(number, 3, filters, filters, prelu(filters), *skip))
    layers.append(conv(blocks + 1, 5, filters, scale**2, Add(0)))
    return Region(tuple(layers), (1,), shuffle=scale)


def run(region, source, *shape, seed=0, text=None):
    """`checking.compare` of a kernel, or of a broken one."""
    source = source if text is None else replace(source, text=text)
    return compare(region, source, random_inputs(region, *shape), seed=seed)
