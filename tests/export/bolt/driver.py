"""A CUDA driver that is none: memory is the CPU's, kernels run there, and what was called is written down.

Machine code and PTX are CUDA sources here, as `HostDevice` runs them. Streams are numbers, and all is done when a call
returns; whether work of one stream waits for that of another is for tests to read in `Driver.calls`.
"""

from __future__ import annotations

import ctypes
import enum
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np

from keras_efficient.export.bolt import host
from keras_efficient.export.bolt.dlpack import CUDA, Array, Owned

OWN_STREAM = 77  # what `cuStreamCreate` gives
POOL = 88
PRIMARY = 9  # the device's primary context
ATTRIBUTES = {"MULTIPROCESSOR_COUNT": 4, "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": 227 << 10, "L2_CACHE_SIZE": 1 << 14}


class CUresult(enum.Enum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_UNSUPPORTED_PTX_VERSION = 222
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900


class _Names:
    def __getattr__(self, name: str) -> str:
        return name


class Driver:
    """Stands in for the module `cuda.bindings.driver`.

    Attributes:
        calls: names and arguments, from the first call on.
        memory: what is allocated, by its pointer.
        gone: streams that there are no more.
        alive: how many graphs, events and pools of memory there are.
        contexts: of this thread, the current one last.
        takes_ptx: whether its compiler knows the version of PTX.
    """

    CUresult = CUresult
    CUdevice_attribute = CUfunction_attribute = CUstream_flags = CUevent_flags = CUstreamCaptureMode = _Names()
    CUmemAllocationType = CUmemLocationType = CUmemPool_attribute = _Names()
    cuuint64_t = int

    def __init__(self, version: tuple[int, int] = (9, 0)):
        self.version, self.takes_ptx = version, True
        self.calls: list[tuple[Any, ...]] = []
        self.contexts = [5]
        self.memory: dict[int, Any] = {}
        self.gone: set[int] = set()
        self.alive: Counter[str] = Counter()
        self.capture: list[Any] | None = None

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if not name.startswith("cu"):
            return found

        def called(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            result = found(*arguments)
            return result if isinstance(result, tuple) else (CUresult.CUDA_SUCCESS, result)

        return called

    def __getattr__(self, name: str) -> Any:
        if name in ("cuInit", "cuCtxSynchronize", "cuFuncSetAttribute", "cuStreamSynchronize",
                    "cuEventSynchronize", "cuGraphDestroy"):  # fmt: skip
            return self.called_only(name)
        raise AttributeError(name)

    def called_only(self, name: str) -> Any:
        def called(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            return (CUresult.CUDA_SUCCESS,)

        return called

    def named(self, *names: str) -> list[tuple[Any, ...]]:
        """Calls of these functions."""
        return [one for one in self.calls if one[0] in names]

    # ------------------------------------------------------------------------------------------------------- devices

    def cuDeviceGet(self, number: int) -> int:
        return number

    def cuCtxGetCurrent(self) -> int:
        return self.contexts[-1] if self.contexts else 0

    def cuCtxPushCurrent(self, context: int) -> None:
        self.contexts.append(context)

    def cuCtxPopCurrent(self) -> int:
        return self.contexts.pop()

    def cuDevicePrimaryCtxRetain(self, device: int) -> int:
        return PRIMARY

    def cuCtxGetDevice(self) -> int:
        return 0

    def cuDeviceGetAttribute(self, kind: str, device: int) -> int:
        name = kind.removeprefix("CU_DEVICE_ATTRIBUTE_")
        found = {**ATTRIBUTES, "COMPUTE_CAPABILITY_MAJOR": self.version[0], "COMPUTE_CAPABILITY_MINOR": self.version[1]}
        return found[name]

    def cuDeviceGetName(self, length: int, device: int) -> bytes:
        return b"none\0"

    def cuDriverGetVersion(self) -> int:
        return 13000

    # -------------------------------------------------------------------------------------------------------- memory

    def cuMemAlloc(self, nbytes: int) -> Any:
        if self.capture is not None:
            return (CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        assert self.contexts
        buffer = (ctypes.c_uint8 * (nbytes + 256))()
        pointer = (ctypes.addressof(buffer) + 255) // 256 * 256
        self.memory[pointer] = buffer, nbytes
        return pointer

    def CUmemPoolProps(self) -> Any:
        return SimpleNamespace(location=SimpleNamespace())

    def cuMemPoolCreate(self, properties: Any) -> int:
        assert properties.location.id == 0
        self.alive["pools"] += 1
        return POOL

    def cuMemPoolSetAttribute(self, pool: int, name: str, value: int) -> None:
        assert (pool, name) == (POOL, "CU_MEMPOOL_ATTR_RELEASE_THRESHOLD")

    def cuMemPoolDestroy(self, pool: int) -> None:
        self.alive["pools"] -= 1

    def cuMemAllocFromPoolAsync(self, nbytes: int, pool: int, stream: int) -> Any:
        assert pool == POOL
        return object.__getattribute__(self, "cuMemAlloc")(nbytes)

    def cuMemFree(self, pointer: int) -> None:
        del self.memory[pointer]

    def cuMemFreeAsync(self, pointer: int, stream: int) -> Any:
        if stream in self.gone:
            return (CUresult.CUDA_ERROR_INVALID_HANDLE,)
        del self.memory[pointer]
        return None

    def cuMemcpyHtoD(self, pointer: int, given: Any, nbytes: int) -> None:
        ctypes.memmove(pointer, given, nbytes)

    def cuMemcpyDtoH(self, given: int, pointer: int, nbytes: int) -> None:
        ctypes.memmove(given, pointer, nbytes)

    def bytes_at(self, pointer: int) -> np.ndarray:
        start = max(one for one in self.memory if one <= pointer)
        assert pointer < start + self.memory[start][1]
        count = start + self.memory[start][1] - pointer
        return np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(pointer))

    # ------------------------------------------------------------------------------------------------------- kernels

    def cuLibraryLoadData(self, code: bytes, *more: Any) -> Any:
        if code.endswith(b"\0") and not self.takes_ptx:
            return (CUresult.CUDA_ERROR_UNSUPPORTED_PTX_VERSION,)
        return code.rstrip(b"\0").decode()

    def cuLibraryGetKernel(self, library: str, name: bytes) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, (library, name.decode())

    def cuKernelGetFunction(self, kernel: Any) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, kernel

    def cuLaunchKernel(self, function: Any, *rest: Any) -> None:
        assert self.contexts
        x, y, z, threads, _, _, shared, _, (values, kinds), _ = rest

        def run() -> None:
            pairs = zip(values, kinds, strict=True)
            plain = [self.bytes_at(one) if kind is ctypes.c_void_p else one for one, kind in pairs]
            how = {"grid": (x, y, z), "threads": threads, "shared_bytes": shared}
            host.run(*function, arguments=plain, **how)

        if self.capture is None:
            run()
        else:
            self.capture.append(run)

    # ------------------------------------------------------------------------------------- streams, events and graphs

    def cuStreamCreate(self, kind: Any) -> int:
        return OWN_STREAM

    def cuEventCreate(self, kind: Any) -> int:
        self.alive["events"] += 1
        return len(self.calls)

    def cuEventRecord(self, event: int, stream: int) -> Any:
        return (CUresult.CUDA_ERROR_INVALID_HANDLE,) if stream in self.gone else None

    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> None:
        pass

    def cuEventDestroy(self, event: int) -> None:
        self.alive["events"] -= 1

    def cuEventElapsedTime(self, begin: int, end: int) -> float:
        return 0.5

    def cuStreamBeginCapture(self, stream: int, mode: Any) -> None:
        self.capture = []

    def cuStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        found, self.capture = self.capture, None
        return CUresult.CUDA_SUCCESS, found

    def cuGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:
        self.alive["graphs"] += 1
        return CUresult.CUDA_SUCCESS, graph

    def cuGraphExecDestroy(self, graph: Any) -> None:
        self.alive["graphs"] -= 1

    def cuGraphLaunch(self, graph: Any, stream: int) -> None:
        for run in graph:
            run()


class OnDevice(Owned):
    """An array on the device that is none, of a library that nobody knows."""

    def __init__(self, numbers: np.ndarray):
        numbers = np.ascontiguousarray(numbers, np.float16)
        buffer = (ctypes.c_uint8 * (numbers.nbytes + 256))()
        pointer = (ctypes.addressof(buffer) + 255) // 256 * 256
        super().__init__(Array(pointer, numbers.shape, (CUDA, 0), buffer))
        self.memory = pointer, (buffer, numbers.nbytes)
        self.numbers = self._array.numpy()
        self.numbers[...] = numbers
