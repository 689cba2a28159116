"""Kernels on the CPU, thread by thread: their own source, compiled by g++, to test them without a GPU.

Each CUDA thread is a fiber. Found out are: results, races that a barrier would prevent (for most seeds), reads of what
was never written (shared memory is NaN at first) or of copies not waited for, accesses out of bounds, rows that are
not aligned, and barriers where not all threads come. Not found out: speed, and what only hardware reorders.
"""

from __future__ import annotations

import ctypes
import functools
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keras_efficient.errors import UnknownName, VerificationError, WrongArgument
from keras_efficient.export.bolt.shared_library import compiled

__all__ = ["Run", "run"]

FOLDER = Path(__file__).parent
FLAGS = (
    *("-O2", "-std=c++20", "-shared", "-fPIC", "-w", "-DBOLT_HOST"),
    "-ffp-contract=off",  # products and sums are rounded each, so that machines agree
    *("-fvisibility=hidden", "-fno-gnu-unique"),  # libraries share nothing
    *("-U_FORTIFY_SOURCE", "-fno-stack-protector"),  # jumps between stacks are meant
    "-fstack-clash-protection",  # what is larger than a stack does not jump over its end
    *("-fsanitize=alignment,bounds,shift,signed-integer-overflow", "-fsanitize-undefined-trap-on-error"),
)
MOST_THREADS = 1024

_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Run:
    """What was counted in a launch.

    Attributes:
        products: calls of `multiply`, of a warp each.
        loads: calls of `load_matrix`, transposed or not, of a warp each.
        conflicts: passes through the banks of shared memory that a matrix of these took on average: 1 is the best, 8
            the worst.
    """

    products: int
    loads: int
    conflicts: float


class _Argument(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        ("writable", ctypes.c_int32),
        ("integer", ctypes.c_int64),
        ("real", ctypes.c_double),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
    )


class _Request(ctypes.Structure):
    _fields_ = (
        ("arguments", ctypes.POINTER(_Argument)),
        ("count", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("grid", ctypes.c_int32 * 3),
        ("shared_bytes", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("products", ctypes.c_int64),
        ("loads", ctypes.c_int64),
        ("load_passes", ctypes.c_int64),
        ("message", ctypes.c_char * 512),
    )


def run(
    source: str,
    kernel: str,
    *,
    grid: int | Sequence[int],
    threads: int,
    shared_bytes: int,
    arguments: Sequence[np.ndarray | int | float],
    seed: int = 0,
    defines: Sequence[str] = (),
) -> Run:
    """Launches a kernel on the CPU and waits for its end.

    Args:
        source: CUDA C++ with the text of `templates/primitives.cuh` in it.
        kernel: the name of one that begins a line with `BOLT_KERNEL(…)`.
        grid: blocks along x, or x, y and z.
        threads: in a block, whole warps.
        shared_bytes: dynamic shared memory of a block.
        arguments: the kernel's, in its order. Arrays are C-contiguous; a kernel may write to those that are writeable.
        seed: draws the order in which warps run. A race may show under one seed and not under another.
        defines: macros, as "NAME" or "NAME=VALUE".

    Raises:
        ConversionError: g++ is missing, or refused the source.
        VerificationError: the kernel went out of bounds, gave a row that is not aligned, wrote to a read-only array,
            used up its stack, did what C++ does not define, or waits for what never comes. Arrays are then
            as they were.
        WrongArgument: arguments are not those of the kernel, or there is no such launch.
    """
    blocks = (int(grid),) if isinstance(grid, int | np.integer) else tuple(map(int, grid))
    blocks += (1,) * (3 - len(blocks))
    if len(blocks) != 3 or min(blocks) < 1:
        raise WrongArgument(f"No grid: {grid}.", hint="One to three numbers of blocks, of at least 1 each.")
    if threads % 32 or not 0 < threads <= MOST_THREADS:
        raise WrongArgument(f"A block of {threads} threads.", hint=f"Give a multiple of 32, of at most {MOST_THREADS}.")
    if not 0 <= shared_bytes < 2**24:
        raise WrongArgument(f"Shared memory of {shared_bytes} bytes.", hint="A block of a GPU has at most 227 KB.")
    kernels = re.findall(r"^BOLT_KERNEL\([^()]*\)(?: BOLT_CLUSTER\(\d+\))?\s*(\w+)", source, re.MULTILINE)
    if kernel not in kernels:
        raise UnknownName("kernel", kernel, kernels)
    given = (_Argument * len(arguments))(*map(_argument, range(len(arguments)), arguments))
    asked = _Request(
        arguments=given,
        count=len(arguments),
        threads=threads,
        grid=blocks,
        shared_bytes=shared_bytes,
        seed=seed % 2**64,
    )
    text = "\n".join((source, *(f"BOLT_HOST_LAUNCH({one})" for one in kernels), ""))
    launch = getattr(_library(_compiled(text, tuple(f"-D{one}" for one in defines))), f"bolt_launch_{kernel}")
    with _one_at_a_time:
        result = launch(ctypes.byref(asked))
    if result:
        error = WrongArgument if result == 1 else VerificationError
        raise error(f"Kernel {kernel!r}: {asked.message.decode(errors='replace')}")
    return Run(asked.products, asked.loads, asked.load_passes / (4 * asked.loads) if asked.loads else 1.0)


def _argument(number: int, value: Any) -> _Argument:
    if isinstance(value, np.ndarray):
        if not value.flags.c_contiguous:
            raise WrongArgument(f"Argument {number} is an array that is not C-contiguous.", hint="Copy it first.")
        return _Argument(kind=0, writable=value.flags.writeable, data=value.ctypes.data, bytes=value.nbytes)
    if isinstance(value, int | np.integer):
        if not -(2**63) <= value < 2**63:
            raise WrongArgument(f"Argument {number} does not fit 64 bits: {value}.")
        return _Argument(kind=1, integer=int(value))
    if isinstance(value, float | np.floating):
        return _Argument(kind=2, real=float(value))
    raise WrongArgument(f"Argument {number} is {type(value).__name__}.", hint="Give an array, an integer or a float.")


def _compiled(text: str, defines: tuple[str, ...]) -> Path:
    machine = (FOLDER / "machine.hpp").read_text(encoding="utf-8")
    return compiled("Running kernels on the CPU", text, (*FLAGS, *defines), include=FOLDER, known=machine)


@functools.cache
def _library(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))
