"""Times kernels on the current CUDA device. Not verified: no GPU was at hand yet."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_efficient.export.bolt.checking import random_inputs
from keras_efficient.export.bolt.dlpack import Array
from keras_efficient.export.bolt.grids import arguments, launch
from keras_efficient.export.bolt.reference import computed
from keras_efficient.export.bolt.region import Region
from keras_efficient.export.bolt.runtime import CudaDevice
from keras_efficient.export.bolt.source import Source

__all__ = ["LAUNCHES", "CudaMeter", "turns"]

LAUNCHES = 20  # in a graph, at least, so that their distance on the device is measured and not that of calls
SETS = 64  # of inputs and outputs, at most, that take turns
CACHES = 2  # as many times the L2 cache as these fill
WITHOUT = "Leave out tune (--tune): kernels are then chosen by estimates, or by the file of tune_cache."


def turns(nbytes: int, cache_bytes: int) -> int:
    """How many sets of arrays take turns, each of so many bytes, so that none is still in the L2 cache."""
    return int(min(max(CACHES * cache_bytes // nbytes + 1, 2), SETS))


class CudaMeter:
    """As of `tuning.Meter`.

    Raises:
        MissingDependency, ConversionError: as `runtime.CudaDevice`.
    """

    def __init__(self, device: CudaDevice | None = None):
        self.device = CudaDevice(WITHOUT) if device is None else device
        self.arch = self.device.arch
        self.identity: dict[str, Any] = self.device.identity()
        self._functions: dict[Any, Any] = {}
        self._weights: tuple[bytes, Any] | None = None
        self._arrays: _Drawn | None = None

    def error(self, region: Region, source: Source, cubin: bytes) -> float:
        down = max(layer.kernel[0] * layer.stride[0] for layer in region.layers)
        shape = (300,) if region.rows else (1, down + 20, max(source.rule.get("useful", 0), down) + 37)
        inputs, wanted = self._drawn(region).small(shape)
        out = self.device.copied(np.full(wanted.shape, np.nan, np.float16))
        self._launch(region, source, cubin, inputs, out, self.device.stream)
        found = self.device.fetched(out).astype(np.float64)
        return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))

    def seconds(
        self, region: Region, source: Source, cubin: bytes, shape: tuple[int, int, int], repetitions: int
    ) -> list[float]:
        sets = self._drawn(region).sets(shape)
        count = max(LAUNCHES, len(sets))

        def launches(stream: int) -> None:
            for number in range(count):
                inputs, out = sets[number % len(sets)]
                self._launch(region, source, cubin, inputs, out, stream)

        return [one / count for one in self.device.timed(launches, repetitions)]

    def _drawn(self, region: Region) -> _Drawn:
        """Arrays for a region; those of the one before are freed."""
        if self._arrays is None or self._arrays.region is not region:
            self._arrays = None
            self._arrays = _Drawn(region, self.device)
        return self._arrays

    def _launch(
        self, region: Region, source: Source, cubin: bytes, inputs: Sequence[Array], out: Array, stream: int
    ) -> None:
        # Kernels of equal structure have equal names, and weights of their own.
        name, packed = (source.kernel, hashlib.sha256(cubin).digest()), hashlib.sha256(source.packed).digest()
        if name not in self._functions:
            self._functions[name] = self.device.function(cubin, source.kernel, source.shared_bytes)
        if self._weights is None or self._weights[0] != packed:
            self._weights = packed, self.device.weights(source.packed)
        function, weights = self._functions[name], self._weights[1]
        n, height, width = region.image(inputs[0].shape)
        grid, integers = launch(source.rule, n, height, width, self.device.processors)
        taken = arguments(inputs, weights, height, width, integers, out)
        self.device.launch(function, grid, source.threads, source.shared_bytes, taken, stream)


class _Drawn:
    """Random inputs of a region and room for its outputs, on the device: made once for each shape."""

    def __init__(self, region: Region, device: CudaDevice):
        self.region, self.device = region, device
        self._small: dict[tuple[int, ...], tuple[list[Array], np.ndarray]] = {}
        self._sets: dict[tuple[int, ...], list[tuple[list[Array], Array]]] = {}

    def small(self, shape: tuple[int, ...]) -> tuple[list[Array], np.ndarray]:
        """Inputs, and what comes out of them."""
        if shape not in self._small:
            inputs = random_inputs(self.region, *shape)
            self._small[shape] = [self.device.copied(one) for one in inputs], computed(self.region, inputs)
        return self._small[shape]

    def sets(self, shape: tuple[int, int, int]) -> list[tuple[list[Array], Array]]:
        """Inputs and outputs that take turns, so many that they do not stay in the L2 cache."""
        if shape not in self._sets:
            inputs = random_inputs(self.region, *(shape[2:] if self.region.rows else shape))
            out = np.zeros(self.region.output_shape(*shape), np.float16)
            nbytes = out.nbytes + sum(one.nbytes for one in inputs)
            copied, count = self.device.copied, turns(nbytes, self.device.cache_bytes)
            self._sets[shape] = [([copied(one) for one in inputs], copied(out)) for _ in range(count)]
        return self._sets[shape]
