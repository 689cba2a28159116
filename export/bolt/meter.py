"""Times kernels on the current CUDA device. Not verified: no GPU was at hand yet."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

from keras_efficient.errors import ConversionError
from keras_efficient.export.bolt.checking import TOLERANCE, random_inputs
from keras_efficient.export.bolt.dlpack import Array
from keras_efficient.export.bolt.grids import arguments, launch
from keras_efficient.export.bolt.reference import computed
from keras_efficient.export.bolt.region import Region
from keras_efficient.export.bolt.runtime import CudaDevice
from keras_efficient.export.bolt.source import Source

__all__ = ["LAUNCHES", "CudaMeter", "turns"]

LAUNCHES = 20  # in a graph, at least, so that their distance on the device is measured and not that of calls
MOST_SETS = 1024  # of inputs and outputs that take turns, each of which is a launch in a graph
CORNER = 24  # rows and columns that are compared at the real size, and twice as many rows of a matrix
CACHES = 2  # as many times the L2 cache as these fill
WITHOUT = "Leave out tune (--tune): kernels are then chosen by estimates, or by the file of tune_cache."


def turns(nbytes: int, cache_bytes: int) -> int:
    """How many sets of arrays take turns, each of so many bytes, so that none is still in the L2 cache.

    At most `MOST_SETS`: of arrays of less than 2 / 1024 of the cache, 100 KB of an H200's, some are still in it.
    """
    return int(min(max(CACHES * cache_bytes // nbytes + 1, 2), MOST_SETS))


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
        self._launcher(region, source, cubin)(inputs, out, self.device.stream)
        return _distance(self.device.fetched(out), wanted)

    def seconds(
        self, region: Region, source: Source, cubin: bytes, shape: tuple[int, int, int], repetitions: int
    ) -> list[float]:
        drawn, launched = self._drawn(region), self._launcher(region, source, cubin)
        sets = drawn.sets(shape)
        count = max(LAUNCHES, len(sets))

        def launches(stream: int) -> None:
            for number in range(count):
                launched(*sets[number % len(sets)], stream)

        drawn.clear(shape)
        found = [one / count for one in self.device.timed(launches, repetitions)]
        if not (error := drawn.error(shape)) < TOLERANCE:
            raise ConversionError(f"Its relative error at the size that is timed is {error:.2g}.")
        return found

    def _drawn(self, region: Region) -> _Drawn:
        """Arrays for a region; those of the one before are freed."""
        if self._arrays is None or self._arrays.region is not region:
            self._arrays = None
            self._arrays = _Drawn(region, self.device)
        return self._arrays

    def _launcher(self, region: Region, source: Source, cubin: bytes) -> Callable[[Sequence[Array], Array, int], None]:
        """Launches a kernel on inputs, an output and a stream."""
        # Kernels of equal structure have equal names, and weights of their own.
        name, packed = (source.kernel, hashlib.sha256(cubin).digest()), hashlib.sha256(source.packed).digest()
        if name not in self._functions:
            self._functions[name] = self.device.function(cubin, source.kernel, source.shared_bytes)
        if self._weights is None or self._weights[0] != packed:
            self._weights = packed, self.device.weights(source.packed)
        function, weights = self._functions[name], self._weights[1]

        def launched(inputs: Sequence[Array], out: Array, stream: int) -> None:
            n, height, width = region.image(inputs[0].shape)
            grid, integers = launch(source.rule, n, height, width, self.device.processors)
            taken = arguments(inputs, weights, height, width, integers, out)
            self.device.launch(function, grid, source.threads, source.shared_bytes, taken, stream)

        return launched


def _distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Relative; NaN where there is one."""
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / (np.linalg.norm(wanted) or 1.0))


class _Drawn:
    """Random inputs of a region and room for its outputs, on the device: made once for each shape."""

    def __init__(self, region: Region, device: CudaDevice):
        self.region, self.device = region, device
        self._small: dict[tuple[int, ...], tuple[list[Array], np.ndarray]] = {}
        self._sets: dict[tuple[int, ...], list[tuple[list[Array], Array]]] = {}
        self._corners: dict[tuple[int, ...], np.ndarray] = {}

    def small(self, shape: tuple[int, ...]) -> tuple[list[Array], np.ndarray]:
        """Inputs, and what comes out where weights and layers' outputs are of half precision, as in kernels."""
        if shape not in self._small:
            inputs = random_inputs(self.region, *shape)
            wanted = computed(self.region, inputs, rounded=np.float16)
            self._small[shape] = [self.device.copied(one) for one in inputs], wanted
        return self._small[shape]

    def sets(self, shape: tuple[int, int, int]) -> list[tuple[list[Array], Array]]:
        """Equal inputs, and outputs, that take turns, so many that they do not stay in the L2 cache."""
        if shape not in self._sets:
            inputs = random_inputs(self.region, *(shape[2:] if self.region.rows else shape))
            out = np.zeros(self.region.output_shape(*shape), np.float16)
            nbytes = out.nbytes + sum(one.nbytes for one in inputs)
            copied, count = self.device.copied, turns(nbytes, self.device.cache_bytes)
            self._sets[shape] = [([copied(one) for one in inputs], copied(out)) for _ in range(count)]
            self._corners[shape] = _corner(self.region, inputs)
        return self._sets[shape]

    def clear(self, shape: tuple[int, int, int]) -> None:
        """No number is left in the last set's corner."""
        tail = self._tail(shape)
        self.device.overwrite(tail, np.full(tail.shape, np.nan, np.float16))

    def error(self, shape: tuple[int, int, int]) -> float:
        """Of the corner of the last set's output, where blocks and tiles end."""
        wanted, found = self._corners[shape], self.device.fetched(self._tail(shape))
        return _distance(found if self.region.rows else found[:, -wanted.shape[1] :], wanted)

    def _tail(self, shape: tuple[int, int, int]) -> Array:
        """The last rows of the last set's output, as far as they are compared."""
        out, rows = self._sets[shape][-1][1], len(self._corners[shape])
        own = (rows, *out.shape[-2 + self.region.rows :])
        return Array(out.pointer + out.nbytes - 2 * prod(own), own, out.device, out.owner)


def _corner(region: Region, inputs: Sequence[np.ndarray]) -> np.ndarray:
    """The last rows and columns of the last image's output: of a part of the inputs that is large enough for them."""
    if region.rows:
        return computed(region, [one[-2 * CORNER :] for one in inputs], rounded=np.float16)
    height, width = inputs[0].shape[1:3]
    down, across, sees = 1, 1, 0  # strides of all layers, and how far any output sees at most
    for layer in region.layers:
        reach = [(size - 1) * one for size, one in zip(layer.kernel, layer.dilation, strict=True)]
        sees += max(*reach, *layer.padding[:2]) * max(down, across)
        down, across = down * layer.stride[0], across * layer.stride[1]
    most = 2 * sees + CORNER * max(down, across)
    # Parts begin where the first layers' outputs do.
    rows, columns = height - max(height - most, 0) // down * down, width - max(width - most, 0) // across * across
    part = [
        one[-1:, -shape[1] :, -shape[2] :]
        for one, shape in zip(inputs, region.input_shapes(1, rows, columns), strict=True)
    ]
    (found,) = computed(region, part, rounded=np.float16)
    # What a part's first rows and columns would see was cut off.
    top = 0 if rows == height else -(-sees // down) * region.shuffle
    left = 0 if columns == width else -(-sees // across) * region.shuffle
    return found[top:, left:]
