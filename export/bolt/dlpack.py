"""Arrays of other libraries by DLPack, without copies: where they are, and ours as theirs.

Source: https://dmlc.github.io/dlpack/latest/c_api.html (the structures), and the array API standard.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from keras_efficient.errors import WrongArgument

__all__ = ["CPU", "CUDA", "Array", "Owned", "array_of"]

CPU, CUDA = 1, 2
FLOAT16 = (2, 16, 1)  # kind, bits, lanes


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("index", ctypes.c_int32))


class _Type(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))

_api = ctypes.pythonapi
_api.PyCapsule_GetPointer.restype = ctypes.c_void_p
_api.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_api.PyCapsule_New.restype = ctypes.py_object
_Destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
_api.PyCapsule_New.argtypes = (ctypes.c_void_p, ctypes.c_char_p, _Destructor)
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _api))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", _api))
_NAME = b"dltensor"  # must outlive capsules; who takes what is in one calls it "used_dltensor"


@dataclass(frozen=True)
class Array:
    """Float16 numbers in rows, the last axis' neighbours beside each other.

    Attributes:
        pointer: of the first one.
        shape: its axes.
        device: DLPack's kind and number.
        owner: what must live as long as the memory.
    """

    pointer: int
    shape: tuple[int, ...]
    device: tuple[int, int]
    owner: Any

    @property
    def nbytes(self) -> int:
        return 2 * prod(self.shape)

    def numpy(self) -> np.ndarray:
        """The same memory, on the CPU."""
        numbers = (ctypes.c_uint16 * prod(self.shape)).from_address(self.pointer)
        return np.ctypeslib.as_array(numbers).view(np.float16).reshape(self.shape)


def array_of(given: Any, stream: int) -> Array:
    """Where another library's array is, when all that is queued for it before `stream` is done.

    Torch's channels-last images, N×C×H×W by shape and N×H×W×C in memory, are taken as they are in memory; with one
    channel nothing tells the two apart, and N×H×W×1 is what is wanted.

    Raises:
        WrongArgument: no array, not float16, or not in rows.
    """
    if not hasattr(given, "__dlpack__"):
        raise WrongArgument(f"An array with DLPack is wanted, not {type(given).__name__}.")
    kind, index = given.__dlpack_device__()
    if kind not in (CPU, CUDA):
        raise WrongArgument(f"The array is on a device of kind {int(kind)}; on a CUDA device it must be.")
    try:
        capsule = given.__dlpack__() if kind == CPU else given.__dlpack__(stream=stream or 1)  # 1 is the default stream
    except BufferError as err:  # read-only, of another byte order, or one that torch keeps gradients of
        hint = "Copy it first: np.array(x, np.float16)." if isinstance(given, np.ndarray) else None
        raise WrongArgument(f"The array cannot be shared: {str(err).rstrip('.')}.", hint=hint) from err
    managed = ctypes.cast(_api.PyCapsule_GetPointer(capsule, _NAME), ctypes.POINTER(_Managed)).contents
    tensor = managed.tensor
    found = (tensor.dtype.kind, tensor.dtype.bits, tensor.dtype.lanes)
    if found != FLOAT16:
        kind_name = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}.get(found[0], f"kind {found[0]} of ")
        raise WrongArgument(f"Kernels take float16, and the array is {kind_name}{found[1]}.", hint="Cast it first.")
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    if 0 in shape:
        raise WrongArgument(f"The array is empty: its shape is {shape}.")
    strides = tuple(tensor.strides[axis] for axis in range(tensor.ndim)) if tensor.strides else _rows(shape)
    if not _same(strides, _rows(shape), shape):
        turned = tuple(shape[axis] for axis in (0, 2, 3, 1)) if len(shape) == 4 else shape
        if len(shape) != 4 or not _same(tuple(strides[axis] for axis in (0, 2, 3, 1)), _rows(turned), turned):
            raise WrongArgument(
                f"An array of strides {strides} is not contiguous, channels last.", hint="Copy it first."
            )
        shape = turned
    # The capsule frees what it holds when it goes.
    return Array(int(tensor.data or 0) + int(tensor.offset), shape, (int(kind), int(index)), (given, capsule))


def _rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _same(strides: tuple[int, ...], wanted: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Strides of axes of one place do not matter."""
    return all(one == want or size == 1 for one, want, size in zip(strides, wanted, shape, strict=True))


class Owned:
    """Our memory as another library's array.

    Args:
        array: where it is.
        order: is called with the stream of who takes it, which then waits for what fills the memory.
    """

    _alive: dict[int, tuple[Any, ...]] = {}  # noqa: RUF012  # of all: what deleters free

    def __init__(self, array: Array, order: Callable[[int], None] = lambda stream: None):
        self._array, self._order = array, order

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.device

    def __dlpack__(self, *, stream: Any = None, **_: Any) -> Any:
        array = self._array
        if array.device[0] == CUDA and stream != -1:  # which asks for no waiting
            self._order(0 if stream in (None, 1) else int(stream))
        sizes = (ctypes.c_int64 * len(array.shape))(*array.shape)
        strides = (ctypes.c_int64 * len(array.shape))(*_rows(array.shape))
        tensor = _Tensor(array.pointer, _Device(*array.device), len(array.shape), _Type(*FLOAT16), sizes, strides, 0)
        managed = _Managed(tensor, None, _freed)
        address = ctypes.addressof(managed)
        self._alive[address] = (managed, sizes, strides, array)
        return _api.PyCapsule_New(address, _NAME, _dropped)

    def like(self, other: Any) -> Any:
        """As an array of another one's library; on a GPU this object, where the library is not among those known."""
        library = type(other).__module__.split(".")[0]
        if library == "torch":
            import torch

            return torch.from_dlpack(self)
        if library == "cupy":
            import cupy

            return cupy.from_dlpack(self)
        if library in ("jaxlib", "jax"):
            import jax

            return jax.dlpack.from_dlpack(self)
        return np.from_dlpack(self) if self._array.device[0] == CPU else self


@_Deleter
def _freed(managed: Any) -> None:
    Owned._alive.pop(ctypes.addressof(managed.contents), None)


@_Destructor
def _dropped(capsule: int) -> None:
    """A capsule goes that nobody took anything from."""
    if _is_valid(capsule, _NAME):
        Owned._alive.pop(_pointer(capsule, _NAME), None)
