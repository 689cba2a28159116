"""Regions with random weights, and a kernel's result on the CPU beside what the region means."""

from __future__ import annotations

import numpy as np

from keras_efficient.export.bolt import host
from keras_efficient.export.bolt.grids import launch
from keras_efficient.export.bolt.reference import computed
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


def inputs_of(region, *shape):
    if region.rows:
        return [RNG.normal(size=(shape[0], channels)).astype(np.float16) for channels in region.channels]
    n, height, width = shape
    out = height, width
    for layer in region.layers:
        out = layer.size(*out)
    sizes = [(height, width), *[out] * (len(region.channels) - 1)]
    pairs = zip(sizes, region.channels, strict=True)
    return [RNG.normal(size=(n, *size, channels)).astype(np.float16) for size, channels in pairs]


def run(region, source, *shape, seed=0, processors=4, text=None):
    """Relative error of a kernel on the CPU, in a poisoned output; and what the interpreter counted."""
    inputs = inputs_of(region, *shape)
    wanted = computed(region, inputs)
    out = np.full(wanted.shape, np.nan, np.float16)
    n, height, width = (1, 1, shape[0]) if region.rows else shape
    grid, integers = launch(source.rule, n, height, width, processors)
    counted = host.run(
        source.text if text is None else text,
        source.kernel,
        grid=grid,
        threads=source.threads,
        shared_bytes=source.shared_bytes,
        arguments=[*inputs, np.frombuffer(source.packed, np.uint8), height, width, *integers, out],
        seed=seed,
    )
    return np.linalg.norm(out.astype(np.float64) - wanted) / np.linalg.norm(wanted), counted
