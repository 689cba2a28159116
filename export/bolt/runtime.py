"""Runs a bundle's kernels on arrays that are on a GPU already: of torch, JAX, CuPy, or whatever else has DLPack.

Nothing is copied: kernels read the caller's arrays and write into one that they get or make, on the caller's stream.
Only drivers are needed (the package `cuda-bindings` and the GPU's own), no toolkit. Not verified: this page ran on no
GPU yet; all but `CudaDevice` is tested with `HostDevice`, which runs the same kernels on the CPU, thread by thread.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from keras_efficient.errors import ConversionError, MissingDependency, UnsupportedLayer, WrongArgument
from keras_efficient.export.bolt import spec
from keras_efficient.export.bolt.bundle import Bundle
from keras_efficient.export.bolt.dlpack import CUDA, Array, Owned, array_of
from keras_efficient.export.bolt.grids import launch, output_size
from keras_efficient.export.bolt.standard import DOMAIN, FUSED

__all__ = ["CudaDevice", "Device", "HostDevice", "Runner", "load"]


class Device(Protocol):
    """What runs kernels.

    Attributes:
        arch: whose machine code it takes.
        processors: its multiprocessors.
    """

    arch: str
    processors: int

    def kernel(self, bundle: Bundle, name: str, shared_bytes: int) -> Any:
        """A kernel of the bundle, ready to be launched."""

    def weights(self, packed: bytes) -> Any:
        """A copy on the device: what `launch` takes as an argument."""

    def buffer(self, shape: tuple[int, ...], stream: int) -> Array:
        """Float16 memory of its own."""

    def launch(self, kernel: Any, grid: Sequence[int], threads: int, shared_bytes: int, arguments: Sequence[Any],
               stream: int) -> None:  # fmt: skip
        """Arguments are arrays, what `weights` gave, or integers of 32 bits."""


@dataclass(frozen=True)
class _Step:
    """One kernel: its launch, and the names of what it reads and writes."""

    kernel: Any
    entry: Mapping[str, Any]
    structure: Mapping[str, Any]
    weights: Any
    reads: tuple[str, ...]
    writes: str


class Runner:
    """A bundle on a device. Call it with arrays of float16, N×H×W×C or M×C, in the order of the network's inputs.

    Attributes:
        inputs, outputs: names.
    """

    def __init__(self, bundle: Bundle, device: Device):
        import onnx

        graph = onnx.load_from_string(bundle.onnx).graph
        self._device = device
        constants = {one.name for one in graph.initializer}
        self.inputs = tuple(one.name for one in graph.input if one.name not in constants)
        self.outputs = tuple(one.name for one in graph.output)
        names = {one: one for one in self.inputs}  # what casts between float32 and float16 made is the same here
        self._steps: list[_Step] = []
        kernels, regions = bundle.launches["kernels"], bundle.launches["regions"]
        for node in graph.node:
            if node.op_type == "Cast":
                names[node.output[0]] = names.get(node.input[0], node.input[0])
                continue
            index, structure = _region(node)
            name = regions[index] if 0 <= index < len(regions) else None
            if name is None:
                raise UnsupportedLayer(node.name, "the bundle has no kernel for it.", hint="Run its ONNX file instead.")
            entry = kernels[name]
            reads = tuple(names.get(one, one) for one in node.input[: len(structure["channels"])])
            kernel = device.kernel(bundle, name, entry["shared_bytes"])
            weights = device.weights(bundle.weights[str(index)])
            names[node.output[0]] = node.output[0]
            self._steps.append(_Step(kernel, entry, structure, weights, reads, node.output[0]))
        self._results = [names.get(one, one) for one in self.outputs]

    def __call__(self, *inputs: Any, out: Any = None, stream: int | None = None) -> Any:
        """Runs the network.

        Args:
            inputs: arrays on the device.
            out: an array that the only output is written into; without it a new one is made.
            stream: the handle of a CUDA stream; by default the one that is the array's own (of torch the current one).

        Returns:
            `out`, or a new array of the first input's library; a list of them where there are several outputs.

        Raises:
            WrongArgument: other inputs than the network's, or not as float16 in rows.
        """
        if len(inputs) != len(self.inputs):
            raise WrongArgument(f"The network takes {len(self.inputs)} arrays, received {len(inputs)}.")
        if out is not None and len(self.outputs) != 1:
            raise WrongArgument("`out` is for networks with one output.")
        stream = _stream_of(inputs[0]) if stream is None else stream
        values = {name: array_of(one, stream) for name, one in zip(self.inputs, inputs, strict=True)}
        if out is not None:
            values[self._results[0]] = array_of(out, stream)
        for step in self._steps:
            self._run(step, values, stream)
        if out is not None:
            return out
        found = [Owned(values[name]).like(inputs[0]) for name in self._results]
        return found[0] if len(found) == 1 else found

    def _run(self, step: _Step, values: dict[str, Array], stream: int) -> None:
        given = [values[name] for name in step.reads]
        channels, rows = step.structure["channels"], step.structure["rows"]
        for name, one, wanted in zip(step.reads, given, channels, strict=True):
            if len(one.shape) != (2 if rows else 4) or one.shape[-1] != wanted:
                raise WrongArgument(f"{name!r} is {one.shape}; {'rows' if rows else 'N×H×W'} of {wanted} are wanted.")
        n, height, width = (1, 1, given[0].shape[0]) if rows else given[0].shape[:3]
        grid, integers = launch(step.entry["rule"], n, height, width, self._device.processors)
        size = output_size(step.structure, height, width)
        filters = step.structure["layers"][-1]["filters"] // step.structure["shuffle"] ** 2
        shape = (size[1], filters) if rows else (n, *size, filters)
        block = step.structure["shuffle"]
        places = shape[:-1] if rows else (n, size[0] // block, size[1] // block)
        for name, one in zip(step.reads[1:], given[1:], strict=True):
            if one.shape[:-1] != places:
                raise WrongArgument(f"{name!r} is {one.shape}, and is added to {places} places.")
        out = values.get(step.writes)
        if out is None:
            out = values[step.writes] = self._device.buffer(shape, stream)
        elif out.shape != shape:
            raise WrongArgument(f"`out` is {out.shape}, the output {shape}.")
        arguments = [*given, step.weights, height, width, *integers, out]
        entry = step.entry
        self._device.launch(step.kernel, grid, entry["threads"], entry["shared_bytes"], arguments, stream)


def load(bundle: Bundle, device: Device | None = None) -> Runner:
    """A bundle's kernels on a device: without one, the current CUDA device.

    Raises:
        MissingDependency: no `cuda-bindings`.
        ConversionError: no GPU, or none that the bundle's kernels are for.
        UnsupportedLayer: a part of the network has no kernel; ONNX Runtime runs the bundle's ONNX file.
    """
    return Runner(bundle, CudaDevice() if device is None else device)


def _region(node: Any) -> tuple[int, Mapping[str, Any]]:
    if node.domain != DOMAIN or node.op_type != FUSED:
        hint = "Run the bundle's ONNX file in ONNX Runtime instead."
        raise UnsupportedLayer(node.name or node.output[0], f"{node.op_type} has no kernel.", hint=hint)
    attributes = {one.name: one for one in node.attribute}
    return attributes["region"].i, spec.parsed(attributes["spec"].s.decode())


def _stream_of(array: Any) -> int:
    """The stream on which an array's library works at the moment."""
    library = type(array).__module__.split(".")[0]
    if library == "torch":
        import torch

        return int(torch.cuda.current_stream(array.device).cuda_stream) if array.is_cuda else 0
    if library == "cupy":
        import cupy

        return int(cupy.cuda.get_current_stream().ptr)
    return 0


class HostDevice:
    """The CPU, thread by thread: slow, for tests. Sources are compiled by g++; arrays are NumPy's.

    Args:
        processors: that launches are shared out for.
        seed: of the order in which warps run.
    """

    arch = "host"

    def __init__(self, processors: int = 4, seed: int = 0):
        self.processors, self.seed = processors, seed

    def kernel(self, bundle: Bundle, name: str, shared_bytes: int) -> Any:
        return bundle.sources[name], name

    def weights(self, packed: bytes) -> Any:
        return np.frombuffer(packed, np.uint8)

    def buffer(self, shape: tuple[int, ...], stream: int) -> Array:
        return array_of(np.full(shape, np.nan, np.float16), 0)

    def launch(
        self, kernel: Any, grid: Sequence[int], threads: int, shared_bytes: int, arguments: Sequence[Any], stream: int
    ) -> None:
        from keras_efficient.export.bolt import host

        plain = [one.numpy() if isinstance(one, Array) else one for one in arguments]
        how: dict[str, Any] = {"grid": tuple(grid), "threads": threads, "shared_bytes": shared_bytes, "seed": self.seed}
        host.run(kernel[0], kernel[1], arguments=plain, **how)


class CudaDevice:
    """The current CUDA device, by the driver's own interface. Not verified: it ran on no GPU yet.

    Raises:
        MissingDependency: no `cuda-bindings`.
        ConversionError: no driver, or no GPU.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as err:
            raise MissingDependency("cuda-bindings", "Running kernels", "gpu") from err
        self._driver = driver
        try:
            self._call("cuInit", 0)
        except Exception as err:  # cuda-bindings raises RuntimeError where there is no libcuda
            reason = str(err).split(". ")[0].rstrip(".")
            hint = "Run the bundle's ONNX file in ONNX Runtime."
            raise ConversionError(f"No CUDA device can be used: {reason}.", hint=hint) from err
        device = self._call("cuDeviceGet", 0)
        context = self._call("cuCtxGetCurrent")
        if not int(context):  # libraries that share arrays use the device's primary context
            context = self._call("cuDevicePrimaryCtxRetain", device)
            self._call("cuCtxSetCurrent", context)
        else:
            device = self._call("cuCtxGetDevice")
        kinds = driver.CUdevice_attribute
        major, minor, self.processors, self._most_shared, self.cache_bytes = (
            self._call("cuDeviceGetAttribute", getattr(kinds, f"CU_DEVICE_ATTRIBUTE_{name}"), device)
            for name in (
                "COMPUTE_CAPABILITY_MAJOR",
                "COMPUTE_CAPABILITY_MINOR",
                "MULTIPROCESSOR_COUNT",
                "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN",
                "L2_CACHE_SIZE",
            )
        )
        self.arch = f"sm_{major}{minor}" + ("a" if major == 9 else "")
        self._libraries: list[Any] = []
        self._stream: Any = None

    def _call(self, name: str, *arguments: Any) -> Any:
        result, *found = getattr(self._driver, name)(*arguments)
        if result != self._driver.CUresult.CUDA_SUCCESS:
            raise ConversionError(f"The CUDA driver refused {name}: {result.name}.")
        return found[0] if len(found) == 1 else found

    def kernel(self, bundle: Bundle, name: str, shared_bytes: int) -> Any:
        code = bundle.cubins.get(f"{name}/{self.arch}")
        if code is None:
            others = sorted({one.rsplit("/", 1)[1] for one in bundle.cubins})
            raise ConversionError(f"The bundle is for {', '.join(others)}, this GPU is {self.arch}.")
        return self.function(code, name, shared_bytes)

    def function(self, cubin: bytes, name: str, shared_bytes: int) -> Any:
        """A kernel of machine code, that may take so much dynamic shared memory."""
        library = self._call("cuLibraryLoadData", cubin, [], [], 0, [], [], 0)
        self._libraries.append(library)
        function = self._call("cuKernelGetFunction", self._call("cuLibraryGetKernel", library, name.encode()))
        if shared_bytes > self._most_shared:
            raise ConversionError(f"Kernel {name} takes {shared_bytes} bytes of shared memory, of {self._most_shared}.")
        most = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._call("cuFuncSetAttribute", function, most, shared_bytes)
        return function

    def identity(self) -> dict[str, Any]:
        """What measurements hang on."""
        name = self._call("cuDeviceGetName", 256, self._call("cuCtxGetDevice"))
        driver = self._call("cuDriverGetVersion")
        label = name.decode().rstrip("\0")
        return {"name": label, "processors": self.processors, "arch": self.arch, "driver": int(driver)}

    @property
    def stream(self) -> int:
        """One of our own, for measurements."""
        if self._stream is None:
            kind = self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING
            self._stream = self._call("cuStreamCreate", kind)
        return int(self._stream)

    def copied(self, array: np.ndarray) -> Array:
        """A copy of float16 numbers on the device."""
        array = np.ascontiguousarray(array)
        memory = _Memory(int(self._call("cuMemAlloc", array.nbytes)), self)
        self._call("cuMemcpyHtoD", memory.pointer, array.ctypes.data, array.nbytes)
        return Array(memory.pointer, array.shape, (CUDA, int(self._call("cuCtxGetDevice"))), memory)

    def fetched(self, array: Array) -> np.ndarray:
        """A copy on the CPU, when all work is done."""
        found = np.empty(array.shape, np.float16)
        self._call("cuCtxSynchronize")
        self._call("cuMemcpyDtoH", found.ctypes.data, array.pointer, found.nbytes)
        return found

    def timed(self, work: Callable[[], None], repetitions: int) -> list[float]:
        """Seconds of what `work` launches on `stream`, each as one replay of a graph."""
        driver, stream = self._driver, self.stream
        work()  # what is made at the first call cannot be captured
        self._call("cuStreamSynchronize", stream)
        self._call("cuStreamBeginCapture", stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        try:
            work()
        finally:
            graph = self._call("cuStreamEndCapture", stream)
        replay = self._call("cuGraphInstantiate", graph, 0)
        begin, end = (self._call("cuEventCreate", driver.CUevent_flags.CU_EVENT_DEFAULT) for _ in range(2))
        found = []
        try:
            for number in range(repetitions + 1):
                self._call("cuEventRecord", begin, stream)
                self._call("cuGraphLaunch", replay, stream)
                self._call("cuEventRecord", end, stream)
                self._call("cuEventSynchronize", end)
                if number:  # the first one uploads the graph
                    found.append(self._call("cuEventElapsedTime", begin, end) / 1000)
        finally:
            self._call("cuGraphExecDestroy", replay)
            self._call("cuGraphDestroy", graph)
        return found

    def weights(self, packed: bytes) -> Any:
        pointer = self._call("cuMemAlloc", len(packed))
        self._call("cuMemcpyHtoD", pointer, packed, len(packed))
        return _Memory(int(pointer), self)

    def buffer(self, shape: tuple[int, ...], stream: int) -> Array:
        pointer = int(self._call("cuMemAllocAsync", 2 * int(np.prod(shape)), stream))
        owner = _Memory(pointer, self, stream)
        return Array(pointer, tuple(shape), device=(CUDA, int(self._call("cuCtxGetDevice"))), owner=owner)

    def launch(
        self, kernel: Any, grid: Sequence[int], threads: int, shared_bytes: int, arguments: Sequence[Any], stream: int
    ) -> None:
        values, kinds = zip(*_plain(arguments), strict=True)
        self._call("cuLaunchKernel", kernel, *grid, threads, 1, 1, shared_bytes, stream, (values, kinds), 0)


def _plain(arguments: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """As cuda-bindings takes them: values, and their C types."""
    for one in arguments:
        if isinstance(one, (Array, _Memory)):
            yield one.pointer, ctypes.c_void_p
        else:
            yield int(one), ctypes.c_int32


class _Memory:
    """Memory of the device that is freed with this object."""

    def __init__(self, pointer: int, device: CudaDevice, stream: int | None = None):
        self.pointer, self._device, self._stream = pointer, device, stream

    def __del__(self) -> None:
        driver = self._device._driver
        if self._stream is None:
            driver.cuMemFree(self.pointer)
        else:
            driver.cuMemFreeAsync(self.pointer, self._stream)
