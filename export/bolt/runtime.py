"""Runs a bundle's kernels on arrays that are on a GPU already: of torch, JAX, CuPy, or whatever else has DLPack.

    run = load("network.bolt")
    y = run(x)                          # any sizes, on the array's stream; a new array
    graph = run.captured(x)             # all launches as one CUDA graph over the memory of x
    x.copy_(other); graph.replay()      # the same for new numbers, without the launches' time on the CPU
    graph.outputs[0]

Nothing is copied: kernels read the caller's arrays and write into one that they get or make, on the caller's stream.
Only drivers are needed (the package `cuda-bindings` and the GPU's own), no toolkit.

Memory that is made here is freed when its last array is gone, behind all that was queued on the stream that filled it,
and on the one that another library took it on; up to 1 GiB of it stays with the device for calls to come. Libraries do
not know of our streams, nor we of others of theirs, so with a stream of your own three things are yours to see to:
inputs must live until the stream is done with them (of torch `x.record_stream(stream)`), what reads `out` must wait for
the stream, and an array that is read on a third stream must live until that is done.

Not verified: this page ran on no GPU yet; `CudaDevice` is tested with a driver that is none, and all else with
`HostDevice`, which runs the same kernels on the CPU, thread by thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

import numpy as np

from keras_efficient.errors import ConversionError, MissingDependency, UnsupportedLayer, WrongArgument
from keras_efficient.export.bolt import spec
from keras_efficient.export.bolt.bundle import Bundle
from keras_efficient.export.bolt.dlpack import CPU, CUDA, Array, Owned, array_of
from keras_efficient.export.bolt.grids import Launch, arguments, launch
from keras_efficient.export.bolt.region import Region
from keras_efficient.export.bolt.standard import DOMAIN, FUSED

__all__ = ["Captured", "CudaDevice", "Device", "HostDevice", "Runner", "driver", "load", "warmups"]


INSTEAD = "`runtime.HostDevice()` as second argument runs kernels on the CPU."
ALIGNMENT = 16  # bytes: the widest loads of kernels
WARM = 0.05  # seconds of work before a time counts
MOST_WARMUPS = 2000  # and replays of it, at most
KEPT = 1 << 30  # bytes that stay with a device's pool when all is freed

P = ParamSpec("P")
R = TypeVar("R")


class Graph(Protocol):
    """Launches that were captured."""

    def replay(self, stream: int) -> None:
        """All of them once more, behind what is on the stream."""


class Device(Protocol):
    """What runs kernels.

    Attributes:
        arch: whose machine code it takes.
        processors: its multiprocessors.
        place: DLPack's kind and number of it.
    """

    arch: str
    processors: int
    place: tuple[int, int]

    def lend(self, array: Array, before: int, after: int) -> None:
        """What is on stream `after` from now on waits for what is on `before`; freeing the array waits for `after`."""

    def finish(self, stream: int) -> None:
        """Waits for all that is on a stream."""

    def kernel(self, bundle: Bundle, name: str, shared_bytes: int) -> Any:
        """A kernel of the bundle, ready to be launched."""

    def weights(self, packed: bytes) -> Any:
        """A copy on the device: what `launch` takes as an argument."""

    def buffer(self, shape: tuple[int, ...], stream: int | None) -> Array:
        """Float16 memory of its own, for work on a stream; `None`: on any, and freed when all work is done."""

    def launch(self, kernel: Any, grid: Sequence[int], threads: int, shared_bytes: int, arguments: Sequence[Any],
               stream: int) -> None:  # fmt: skip
        """Arguments are arrays, what `weights` gave, or integers of 32 bits."""

    def captured(self, work: Callable[[int], None]) -> Graph:
        """What `work` launches on the stream that it is given; nothing of it runs yet."""


@dataclass(frozen=True)
class _Step:
    """One kernel: its launch, and the names of what it reads and writes."""

    kernel: Any
    entry: Mapping[str, Any]
    region: Region
    weights: Any
    reads: tuple[str, ...]
    writes: str


class _Launched(NamedTuple):
    """What `Device.launch` takes, but the stream."""

    kernel: Any
    grid: Sequence[int]
    threads: int
    shared_bytes: int
    arguments: Sequence[Any]


@dataclass(frozen=True)
class _Sized:
    """What hangs on sizes: a launch, and the shapes of a step's arrays."""

    launch: Launch
    inputs: list[tuple[int, ...]]
    output: tuple[int, ...]


class Runner:
    """A bundle on a device. Call it with arrays of float16, in the order of the network's inputs: N×H×W×C, or rows
    of C numbers with any axes before.

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
        self._sizes: dict[tuple[int, int, int, int], _Sized] = {}
        kernels, regions = _launches(bundle)
        types = _types(graph)
        for node in graph.node:
            if _only_widens(node, types):
                names[node.output[0]] = names.get(node.input[0], node.input[0])
                continue
            index, region = _region(node)
            name = regions[index] if 0 <= index < len(regions) else None
            if name is None:
                hint = "`export.bolt.ort.session` runs it."
                raise UnsupportedLayer(node.name, "the bundle has no kernel for it.", hint=hint)
            entry = kernels[name]
            reads = tuple(names.get(one, one) for one in node.input[: len(region.channels)])
            if str(index) not in bundle.weights:
                raise ConversionError(f"The bundle has no weights of region {index}.", hint="Export the model again.")
            kernel = device.kernel(bundle, name, entry["shared_bytes"])
            weights = device.weights(bundle.weights[str(index)])
            names[node.output[0]] = node.output[0]
            self._steps.append(_Step(kernel, entry, region, weights, reads, node.output[0]))
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
        self._check(inputs, out)
        stream = _stream_of(inputs[0]) if stream is None else stream
        values = self._values(inputs, out, stream)
        for one in self._planned(values, stream):
            self._device.launch(*one, stream)
        if _is_jax(inputs[0]):
            self._device.finish(stream)  # JAX would use the inputs' memory again, knowing nothing of this stream
        if out is not None:
            return out
        results = [values[name] for name in self._results]
        found = [Owned(one, partial(self._device.lend, one, stream)).like(inputs[0]) for one in results]
        return found[0] if len(found) == 1 else found

    def captured(self, *inputs: Any, out: Any = None) -> Captured:
        """The network over the memory of these arrays, to be run again and again with new numbers in it.

        All memory that it takes is made once, and all launches are one CUDA graph. Nothing runs before it is replayed.

        Args:
            inputs, out: as for a call.

        Raises:
            WrongArgument: as a call, or arrays of JAX, whose numbers cannot change.
        """
        self._check(inputs, out)
        if any(map(_is_jax, inputs)):
            raise WrongArgument("Arrays of JAX never change, so that a graph over them has no use.", hint="Call it.")
        values = self._values(inputs, out, -1)  # DLPack's word for no waiting: nothing is read yet
        plan = self._planned(values, None)

        def work(stream: int) -> None:
            for one in plan:
                self._device.launch(*one, stream)

        graph = self._device.captured(work)
        made = () if out is not None else tuple(Owned(values[name]).like(inputs[0]) for name in self._results)
        return Captured(graph, (values, plan), inputs, made or (out,))

    def _check(self, inputs: Sequence[Any], out: Any) -> None:
        if len(inputs) != len(self.inputs):
            raise WrongArgument(f"The network takes {len(self.inputs)} arrays, received {len(inputs)}.")
        if out is not None and len(self.outputs) != 1:
            raise WrongArgument("`out` is for networks with one output.")

    def _values(self, inputs: Sequence[Any], out: Any, stream: int) -> dict[str, Array]:
        """The arrays that there are before anything runs, by name."""
        values = {name: self._taken(one, stream) for name, one in zip(self.inputs, inputs, strict=True)}
        if out is not None:
            values[self._results[0]] = self._target(out, stream, list(values.values()))
        return values

    def _taken(self, given: Any, stream: int) -> Array:
        array = array_of(given, stream)
        if array.device != self._device.place:
            raise WrongArgument(
                f"The array is on DLPack device {array.device}, the kernels are on {self._device.place}."
            )
        if array.device[0] != CPU and array.pointer % ALIGNMENT:
            hint = "Copy it: it begins within another one."
            raise WrongArgument(f"The array's memory begins at no multiple of {ALIGNMENT} bytes.", hint=hint)
        return array

    def _target(self, out: Any, stream: int, inputs: Sequence[Array]) -> Array:
        if _is_jax(out):
            raise WrongArgument("`out` is an array of JAX, which nobody may write to.", hint="Leave it out.")
        array = self._taken(out, stream)
        end = array.pointer + array.nbytes
        if any(one.pointer < end and array.pointer < one.pointer + one.nbytes for one in inputs):
            raise WrongArgument("`out` shares memory with an input, which kernels read while they write.")
        return array

    def _planned(self, values: dict[str, Array], stream: int | None) -> list[_Launched]:
        """Launches of all steps; arrays that are missing are made, and get names."""
        plan = []
        for number, step in enumerate(self._steps):
            given = [values[name] for name in step.reads]
            n, height, width = self._image(step, given[0])
            sized = self._sized(number, n, height, width)
            # Rows may have any axes before their own: results have the same.
            axes = given[0].shape[:-1] if step.region.rows else None
            for name, one, shape in zip(step.reads[1:], given[1:], sized.inputs[1:], strict=True):
                wanted = shape if axes is None else (*axes, shape[-1])
                if one.shape != wanted:
                    raise WrongArgument(f"{name!r} is {one.shape}, and {wanted} is wanted, to be added.")
            out = values.get(step.writes)
            result = sized.output if axes is None else (*axes, sized.output[-1])
            if out is None:
                out = values[step.writes] = self._device.buffer(result, stream)
            elif out.shape != result:
                raise WrongArgument(f"`out` is {out.shape}, the output {result}.")
            grid, integers = sized.launch
            taken = arguments(given, step.weights, height, width, integers, out)
            plan.append(_Launched(step.kernel, grid, step.entry["threads"], step.entry["shared_bytes"], taken))
        return plan

    def _image(self, step: _Step, first: Array) -> tuple[int, int, int]:
        rows, channels = step.region.rows, step.region.channels[0]
        fits = len(first.shape) >= 2 if rows else len(first.shape) == 4
        if not fits or first.shape[-1] != channels:
            what = "rows" if rows else "N×H×W"
            raise WrongArgument(f"{step.reads[0]!r} is {first.shape}; {what} of {channels} are wanted.")
        return step.region.image(first.shape)

    def _sized(self, number: int, n: int, height: int, width: int) -> _Sized:
        key = (number, n, height, width)
        if key not in self._sizes:
            region, rule = self._steps[number].region, self._steps[number].entry["rule"]
            how = launch(rule, n, height, width, self._device.processors)
            shapes = region.input_shapes(n, height, width), region.output_shape(n, height, width)
            self._sizes[key] = _Sized(how, *shapes)
        return self._sizes[key]


class Captured:
    """A network's launches as one CUDA graph, over arrays that stay where they are.

    Write new numbers into the inputs, replay, and read the outputs; all on one stream, or where one waits for another.
    The arrays live as long as this object does.

    Attributes:
        inputs: the arrays that are read.
        outputs: the arrays that are written, in the order of the network's outputs; before the first replay they hold
            nothing.
    """

    def __init__(self, graph: Graph, kept: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]):
        self._graph, self._kept = graph, kept
        self.inputs, self.outputs = inputs, outputs

    def replay(self, stream: int | None = None) -> None:
        """Runs the network; returns when it is queued.

        Args:
            stream: the handle of a CUDA stream; by default the one that is the first input's own at the moment.
        """
        self._graph.replay(_stream_of(self.inputs[0]) if stream is None else stream)


def load(bundle: Bundle | str | Path, device: Device | None = None) -> Runner:
    """A bundle's kernels on a device: without one, the current CUDA device.

    Networks run here of which every operator is in a kernel; `export.bolt.ort.session` runs the others too.

    Raises:
        MissingDependency: no `cuda-bindings`.
        ConversionError: no GPU, or none that the bundle's kernels are for.
        UnsupportedLayer: a part of the network has no kernel; ONNX Runtime runs the bundle's ONNX file.
        FileProblem: the bundle cannot be read.
        WrongArgument: no bundle, or no device.
    """
    if not isinstance(bundle, Bundle | str | Path):
        raise WrongArgument(f"A bundle or the path of a .bolt is wanted, not {type(bundle).__name__}.")
    if device is not None and not (hasattr(device, "launch") and hasattr(device, "place")):
        hint = "runtime.HostDevice() runs kernels on the CPU, runtime.CudaDevice() on a GPU."
        raise WrongArgument(f"A device of export.bolt.runtime is wanted, not {device!r}.", hint=hint)
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    return Runner(bundle, CudaDevice() if device is None else device)


def _region(node: Any) -> tuple[int, Region]:
    if node.domain != DOMAIN or node.op_type != FUSED:
        hint = "`export.bolt.ort.session` runs such networks: kernels where there are some, ONNX Runtime for the rest."
        reason = f"{node.op_type} is an operator without a kernel."
        raise UnsupportedLayer(node.name or node.output[0], reason, hint=hint)
    attributes = {one.name: one for one in node.attribute}
    return attributes["region"].i, spec.outline(spec.parsed(attributes["spec"].s.decode()))


def _launches(bundle: Bundle) -> tuple[dict[str, Any], list[Any]]:
    """Kernels by name, and the name for each region."""
    kernels, regions = bundle.launches.get("kernels"), bundle.launches.get("regions")
    wanted = {"rule": dict, "threads": int, "shared_bytes": int}
    fits = (
        isinstance(kernels, dict)
        and isinstance(regions, list)
        and all(isinstance(one, dict) for one in kernels.values())
        and all(isinstance(one.get(name), kind) for one in kernels.values() for name, kind in wanted.items())
        and all(one is None or one in kernels for one in regions)
    )
    if not fits:
        raise ConversionError("The bundle does not say how its kernels are launched.", hint="Export the model again.")
    return kernels, regions  # type: ignore[return-value]


def _types(graph: Any) -> dict[str, int]:
    """Number formats of inputs, by name; what a region gives is float16."""
    return {one.name: one.type.tensor_type.elem_type for one in graph.input}


def _only_widens(node: Any, types: dict[str, int]) -> bool:
    """Whether a node makes float32 of float16 or back, which the runtime leaves out."""
    import onnx

    if node.op_type != "Cast" or node.domain:
        return False
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    to = next(one.i for one in node.attribute if one.name == "to")
    types[node.output[0]] = to
    return to in floats and types.get(node.input[0], onnx.TensorProto.FLOAT16) in floats


def _is_jax(array: Any) -> bool:
    return type(array).__module__.startswith("jax")


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
    place = (CPU, 0)

    def __init__(self, processors: int = 4, seed: int = 0):
        if not isinstance(processors, int) or processors < 1:
            raise WrongArgument(f"processors={processors!r}: a whole number from 1 on.")
        self.processors, self.seed = processors, seed
        self._recorded: list[_Launched] | None = None  # while launches are captured

    def lend(self, array: Array, before: int, after: int) -> None:
        pass  # all is done when a call returns

    def finish(self, stream: int) -> None:
        pass

    def kernel(self, bundle: Bundle, name: str, shared_bytes: int) -> Any:
        return bundle.sources[name], name

    def weights(self, packed: bytes) -> Any:
        return np.frombuffer(packed, np.uint8)

    def buffer(self, shape: tuple[int, ...], stream: int | None) -> Array:
        return array_of(np.full(shape, np.nan, np.float16), 0)

    def launch(
        self, kernel: Any, grid: Sequence[int], threads: int, shared_bytes: int, arguments: Sequence[Any], stream: int
    ) -> None:
        from keras_efficient.export.bolt import host

        if self._recorded is not None:
            self._recorded.append(_Launched(kernel, grid, threads, shared_bytes, arguments))
            return
        plain = [one.numpy() if isinstance(one, Array) else one for one in arguments]
        how: dict[str, Any] = {"grid": tuple(grid), "threads": threads, "shared_bytes": shared_bytes, "seed": self.seed}
        host.run(kernel[0], kernel[1], arguments=plain, **how)

    def captured(self, work: Callable[[int], None]) -> Graph:
        launches: list[_Launched] = []
        self._recorded = launches
        try:
            work(0)
        finally:
            self._recorded = None
        return _Recording(self, launches)


@dataclass(frozen=True)
class _Recording:
    """Launches of the CPU that were captured."""

    device: HostDevice
    launches: list[_Launched]

    def replay(self, stream: int) -> None:
        for one in self.launches:
            self.device.launch(*one, stream)


def driver(without: str = INSTEAD) -> Any:
    """The driver's own interface; no context is made.

    Args:
        without: what to do where there is no GPU.

    Raises:
        MissingDependency: no `cuda-bindings`.
        ConversionError: no driver, or no GPU.
    """
    try:
        from cuda.bindings import driver as found
    except ImportError as err:
        raise MissingDependency("cuda-bindings", "Running kernels", "gpu") from err
    try:
        _call(found, "cuInit", 0)
    except Exception as err:  # cuda-bindings raises RuntimeError where there is no libcuda
        reason = str(err).split(". ")[0].rstrip(".")
        raise ConversionError(f"No NVIDIA GPU with its driver is here ({reason}).", hint=without) from err
    return found


def _call(driver: Any, name: str, *arguments: Any) -> Any:
    result, *found = getattr(driver, name)(*arguments)
    if result != driver.CUresult.CUDA_SUCCESS:
        raise ConversionError(f"The CUDA driver refused {name}: {result.name}.")
    return found[0] if len(found) == 1 else found


def warmups(seconds: float) -> int:
    """How often work of so many seconds is done before it is timed, so that clocks are up."""
    return min(ceil(WARM / max(seconds, 1e-6)), MOST_WARMUPS)


def _entering(method: Callable[Concatenate[CudaDevice, P], R]) -> Callable[Concatenate[CudaDevice, P], R]:
    """In the device's context."""

    @wraps(method)
    def entered(self: CudaDevice, *arguments: P.args, **options: P.kwargs) -> R:
        with self.entered():
            return method(self, *arguments, **options)

    return entered


class CudaDevice:
    """The current CUDA device, by the driver's own interface. Not verified: it ran on no GPU yet.

    It takes machine code of its architecture, or of an earlier minor version; else the driver compiles PTX of an
    earlier architecture, if its version knows that.

    Args:
        without: what to do where there is no GPU.

    Raises:
        MissingDependency: no `cuda-bindings`.
        ConversionError: no driver, or no GPU.
    """

    def __init__(self, without: str = INSTEAD) -> None:
        self._driver = driver(without)
        kinds, device = self._driver.CUdevice_attribute, self._call("cuDeviceGet", 0)
        context = self._call("cuCtxGetCurrent")
        if not int(context):  # libraries that share arrays use the device's primary context
            context = self._call("cuDevicePrimaryCtxRetain", device)
        else:
            device = self._call("cuCtxGetDevice")
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
        self._version = 10 * major + minor
        self.arch = f"sm_{self._version}" + ("a" if major >= 9 else "")
        # Machine code of an earlier minor version runs; that of an "a" on its own version only.
        self._runs = (self.arch, *(f"sm_{major}{one}" for one in range(minor, -1, -1)))
        self._context, self.place = context, (CUDA, int(device))
        self._libraries: list[Any] = []
        self._stream: Any = None
        self._pool: Any = None

    def _call(self, name: str, *arguments: Any) -> Any:
        return _call(self._driver, name, *arguments)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Makes the context this thread's, and then the one again that was: the caller's device stays the current."""
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._driver.cuCtxPopCurrent()

    def kernel(self, bundle: Bundle, name: str, shared_bytes: int) -> Any:
        names = [f"{name}/{arch}" for arch in self._runs]
        code = next((bundle.cubins[one] for one in names if one in bundle.cubins), None)
        if code is not None:
            return self.function(code, name, shared_bytes)
        others = sorted({one.rsplit("/", 1)[1] for one in bundle.cubins})
        refused = f"The bundle is for {', '.join(others)}, this GPU is {self.arch}"
        hint = f"Export the model for {self.arch}."
        if (code := self._portable(bundle, name)) is None:
            raise ConversionError(f"{refused}.", hint=hint)
        try:
            return self.function(code, name, shared_bytes)
        except ConversionError as err:  # of a compiler that is newer than the driver
            raise ConversionError(f"{refused}, and its PTX is of no use. {err.message}", hint=hint) from err

    def _portable(self, bundle: Bundle, name: str) -> bytes | None:
        """PTX of the newest architecture that is not newer than this one; that of an "a" runs nowhere else."""
        found = {}
        for key, ptx in bundle.ptx.items():
            kernel, _, arch = key.rpartition("/sm_")
            if kernel == name and arch.isdecimal() and int(arch) <= self._version:
                found[int(arch)] = ptx + b"\0"
        return found[max(found)] if found else None

    @_entering
    def function(self, code: bytes, name: str, shared_bytes: int) -> Any:
        """A kernel of machine code or PTX, that may take so much dynamic shared memory."""
        library = self._call("cuLibraryLoadData", code, [], [], 0, [], [], 0)
        self._libraries.append(library)
        function = self._call("cuKernelGetFunction", self._call("cuLibraryGetKernel", library, name.encode()))
        if shared_bytes > self._most_shared:
            raise ConversionError(f"Kernel {name} takes {shared_bytes} bytes of shared memory, of {self._most_shared}.")
        most = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._call("cuFuncSetAttribute", function, most, shared_bytes)
        return function

    def identity(self) -> dict[str, Any]:
        """What measurements hang on."""
        name = self._call("cuDeviceGetName", 256, self.place[1])
        driver = self._call("cuDriverGetVersion")
        label = name.split(b"\0")[0].decode()  # what is behind the end of the text is anything
        return {"name": label, "processors": self.processors, "arch": self.arch, "driver": int(driver)}

    @property
    @_entering
    def stream(self) -> int:
        """One of our own, for measurements."""
        if self._stream is None:
            kind = self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING
            self._stream = self._call("cuStreamCreate", kind)
        return int(self._stream)

    @_entering
    def copied(self, array: np.ndarray) -> Array:
        """A copy of float16 numbers on the device."""
        memory = _Memory(int(self._call("cuMemAlloc", array.nbytes)), self)
        made = Array(memory.pointer, array.shape, self.place, memory)
        self.overwrite(made, array)
        return made

    @_entering
    def overwrite(self, array: Array, numbers: np.ndarray) -> None:
        """Puts float16 numbers into an array on the device."""
        numbers = np.ascontiguousarray(numbers)
        self._call("cuMemcpyHtoD", array.pointer, numbers.ctypes.data, numbers.nbytes)
        self._call("cuCtxSynchronize")

    @_entering
    def fetched(self, array: Array) -> np.ndarray:
        """A copy on the CPU, when all work is done."""
        found = np.empty(array.shape, np.float16)
        self._call("cuCtxSynchronize")
        self._call("cuMemcpyDtoH", found.ctypes.data, array.pointer, found.nbytes)
        return found

    @_entering
    def captured(self, work: Callable[[int], None]) -> _CudaGraph:
        driver, stream = self._driver, self.stream
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        collects = gc.isenabled()
        gc.disable()  # memory that is freed by this thread in between would end the capture
        try:
            self._call("cuStreamBeginCapture", stream, mode)
            try:
                work(stream)
            except BaseException:
                driver.cuStreamEndCapture(stream)  # else the stream is of no more use
                raise
            graph = self._call("cuStreamEndCapture", stream)
        finally:
            if collects:
                gc.enable()
        try:
            return _CudaGraph(self, self._call("cuGraphInstantiate", graph, 0))
        finally:
            self._call("cuGraphDestroy", graph)

    @_entering
    def timed(self, work: Callable[[int], None], repetitions: int) -> list[float]:
        """Seconds of what `work` launches on the stream that it is given, each as one replay of a graph.

        Replays are queued one behind the other, with events between them, so that no launch by the CPU is part of a
        time; others go first, until clocks are up.
        """
        stream = self.stream
        work(stream)  # what is made at the first call cannot be captured
        self.finish(stream)
        graph, events = self.captured(work), []

        def marked() -> Any:
            events.append(self._call("cuEventCreate", self._driver.CUevent_flags.CU_EVENT_DEFAULT))
            self._call("cuEventRecord", events[-1], stream)
            return events[-1]

        def between(begin: Any, end: Any) -> float:
            return float(self._call("cuEventElapsedTime", begin, end)) / 1000

        try:
            graph.replay(stream)  # which uploads it
            begin = marked()
            graph.replay(stream)
            end = marked()
            self._call("cuEventSynchronize", end)
            for _ in range(warmups(between(begin, end))):
                graph.replay(stream)
            marks = [marked()]
            for _ in range(repetitions):
                graph.replay(stream)
                marks.append(marked())
            self._call("cuEventSynchronize", marks[-1])
            return [between(*two) for two in pairwise(marks)]
        finally:
            for one in events:
                self._call("cuEventDestroy", one)

    @_entering
    def lend(self, array: Array, before: int, after: int) -> None:
        self.order(before, after)
        if isinstance(array.owner, _Memory):
            array.owner.readers.add(after)

    def order(self, before: int, after: int) -> None:
        """What is on stream `after` from now on waits for what is on `before`."""
        if before == after:
            return
        event = self._call("cuEventCreate", self._driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        try:
            self._call("cuEventRecord", event, before)
            self._call("cuStreamWaitEvent", after, event, 0)
        finally:
            self._call("cuEventDestroy", event)  # when it is done with

    @_entering
    def finish(self, stream: int) -> None:
        self._call("cuStreamSynchronize", stream)

    @_entering
    def weights(self, packed: bytes) -> Any:
        pointer = self._call("cuMemAlloc", len(packed))
        self._call("cuMemcpyHtoD", pointer, packed, len(packed))
        self._call("cuCtxSynchronize")  # a copy from pageable memory may return before it is there
        return _Memory(int(pointer), self)

    @_entering
    def buffer(self, shape: tuple[int, ...], stream: int | None) -> Array:
        nbytes = 2 * int(np.prod(shape))
        if stream is None:
            pointer = int(self._call("cuMemAlloc", nbytes))
        else:
            pointer = int(self._call("cuMemAllocFromPoolAsync", nbytes, self._memory_pool(), stream))
        owner = _Memory(pointer, self, stream)
        return Array(pointer, tuple(shape), device=self.place, owner=owner)

    def _memory_pool(self) -> Any:
        """Our own: the device's default one, which is everybody's, gives all that is free back whenever work ends."""
        if self._pool is None:
            driver, properties = self._driver, self._driver.CUmemPoolProps()
            properties.allocType = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
            properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            properties.location.id = self.place[1]
            self._pool = self._call("cuMemPoolCreate", properties)
            threshold = driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
            self._call("cuMemPoolSetAttribute", self._pool, threshold, driver.cuuint64_t(KEPT))
        return self._pool

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # as of memory, of which none is left that knows this device
            if self._pool is not None:
                with self.entered():
                    self._call("cuMemPoolDestroy", self._pool)

    @_entering
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
    """Memory of the device that is freed with this object, behind all work that it is known to be part of.

    Args:
        pointer: of its first byte.
        device: that has it.
        stream: on which it was made and is freed; `None`: freeing it waits for all work of the device.

    Attributes:
        readers: streams on which others took it.
    """

    def __init__(self, pointer: int, device: CudaDevice, stream: int | None = None):
        self.pointer, self._device, self._stream = pointer, device, stream
        self.readers: set[int] = set()

    def __del__(self) -> None:
        with (
            contextlib.suppress(Exception),
            self._device.entered(),
        ):  # the interpreter ends, and the driver ended before
            if self._stream is None or not self._is_freed_in_order(self._stream):
                self._device._call("cuCtxSynchronize")
                self._device._call("cuMemFree", self.pointer)

    def _is_freed_in_order(self, stream: int) -> bool:
        try:
            for one in self.readers:
                self._device.order(one, stream)
            self._device._call("cuMemFreeAsync", self.pointer, stream)
        except ConversionError:  # a stream is gone
            return False
        return True


class _CudaGraph:
    """A graph that the driver can launch."""

    def __init__(self, device: CudaDevice, executable: Any):
        self._device, self._executable = device, executable

    def replay(self, stream: int) -> None:
        with self._device.entered():
            self._device._call("cuGraphLaunch", self._executable, stream)

    def __del__(self) -> None:
        with contextlib.suppress(Exception), self._device.entered():  # as of memory; one that is running ends first
            self._device._call("cuGraphExecDestroy", self._executable)
