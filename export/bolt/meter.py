"""Times kernels on the current CUDA device. Not verified: no GPU was at hand yet."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from keras_efficient.errors import ConversionError
from keras_efficient.export.bolt.checking import random_inputs
from keras_efficient.export.bolt.grids import launch
from keras_efficient.export.bolt.reference import computed
from keras_efficient.export.bolt.region import Region
from keras_efficient.export.bolt.runtime import CudaDevice
from keras_efficient.export.bolt.source import Source

__all__ = ["CudaMeter"]

LAUNCHES = 20  # in a graph, at least, so that their distance on the device is measured and not that of calls
SETS = 64  # of inputs and outputs, at most, that take turns
CACHES = 2  # as many times the L2 cache as these fill


class CudaMeter:
    """As of `tuning.Meter`.

    Raises:
        MissingDependency, ConversionError: as `runtime.CudaDevice`.
    """

    def __init__(self, device: CudaDevice | None = None):
        self.device = CudaDevice() if device is None else device
        self.arch = self.device.arch
        self.identity: dict[str, Any] = self.device.identity()
        self._functions: dict[Any, Any] = {}
        self._weights: tuple[bytes, Any] | None = None

    def error(self, region: Region, source: Source, cubin: bytes) -> float:
        down = max(layer.kernel[0] * layer.stride[0] for layer in region.layers)
        shape: tuple[int, ...] = (1, down + 20, max(source.rule.get("useful", 0), down) + 37)
        inputs = random_inputs(region, *((300,) if region.rows else shape))
        wanted = computed(region, inputs)
        buffers = [self.device.copied(one) for one in inputs]
        out = self.device.copied(np.full(wanted.shape, np.nan, np.float16))
        self._launch(region, source, cubin, buffers, out)
        found = self.device.fetched(out).astype(np.float64)
        return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))

    def seconds(
        self, region: Region, source: Source, cubin: bytes, shape: tuple[int, int, int], repetitions: int
    ) -> list[float]:
        sizes = (shape[2],) if region.rows else shape
        first = random_inputs(region, *sizes)
        out_shape = _output_shape(region, shape)
        bytes_of_set = sum(one.nbytes for one in first) + 2 * int(np.prod(out_shape))
        count = int(min(max(CACHES * self.device.cache_bytes // bytes_of_set + 1, 2), SETS))
        sets = [
            ([self.device.copied(one) for one in first], self.device.copied(np.zeros(out_shape, np.float16)))
            for _ in range(count)
        ]

        def launches() -> None:
            for number in range(max(LAUNCHES, count)):
                inputs, out = sets[number % count]
                self._launch(region, source, cubin, inputs, out)

        return [one / max(LAUNCHES, count) for one in self.device.timed(launches, repetitions)]

    def _launch(self, region: Region, source: Source, cubin: bytes, inputs: list[Any], out: Any) -> None:
        # Kernels of equal structure have equal names, and weights of their own.
        name, packed = (source.kernel, hashlib.sha256(cubin).digest()), hashlib.sha256(source.packed).digest()
        if name not in self._functions:
            self._functions[name] = self.device.function(cubin, source.kernel, source.shared_bytes)
        if self._weights is None or self._weights[0] != packed:
            self._weights = packed, self.device.weights(source.packed)
        function, weights = self._functions[name], self._weights[1]
        n, height, width = (1, 1, inputs[0].shape[0]) if region.rows else inputs[0].shape[:3]
        grid, integers = launch(source.rule, n, height, width, self.device.processors)
        arguments = [*inputs, weights, height, width, *integers, out]
        self.device.launch(function, grid, source.threads, source.shared_bytes, arguments, self.device.stream)


def _output_shape(region: Region, shape: tuple[int, int, int]) -> tuple[int, ...]:
    n, height, width = shape
    if region.rows:
        return (width, region.layers[-1].filters)
    for layer in region.layers:
        height, width = layer.size(height, width)
    if height * width < 1:
        raise ConversionError(f"Images of {shape} are smaller than the kernel.")
    return (n, height * region.shuffle, width * region.shuffle, region.layers[-1].filters // region.shuffle**2)
