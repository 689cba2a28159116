"""CUDA sources compiled for an architecture, on any machine: by NVRTC from wheels, without a GPU, a driver or a host
compiler; by nvcc where a source needs one, such as those that include CUTLASS."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keras_efficient.errors import ConversionError, MissingDependency
from keras_efficient.export.bolt.architectures import architecture
from keras_efficient.export.bolt.source import Source

__all__ = [
    "Compiled",
    "KernelInfo",
    "check_installed",
    "compiled",
    "compiled_by_nvcc",
    "compiled_source",
    "cutlass",
    "missing_for_cutlass",
    "nvcc",
]

SECONDS = 1800  # for nvcc: a large CUTLASS kernel takes minutes

PURPOSE = "Compiling kernels for a GPU"
HEADERS = {"cuda_fp16.h": "nvidia-cuda-runtime", "nv/target": "nvidia-cuda-cccl"}  # and the wheel that has it


@dataclass(frozen=True)
class KernelInfo:
    """What a kernel takes, by the compiler's log.

    Attributes:
        registers: of each thread.
        shared_bytes: static shared memory of a block; dynamic comes on top.
        spill_stores, spill_loads: bytes of registers that did not fit and go to memory and back.
        stack_bytes: of each thread.
    """

    registers: int
    shared_bytes: int
    spill_stores: int
    spill_loads: int
    stack_bytes: int


@dataclass(frozen=True)
class Compiled:
    """A source for one architecture.

    Attributes:
        cubin: machine code, for this architecture.
        ptx: what it was made from, in text.
        log: what the compiler said.
        kernels: by name.
        seconds: how long it took.
    """

    cubin: bytes
    ptx: bytes
    log: str
    kernels: dict[str, KernelInfo]
    seconds: float


def compiled_source(source: Source, arch: str) -> Compiled:
    """A template's kernel by the compiler that it wants.

    Raises:
        ConversionError, MissingDependency, UnknownName: as `compiled`; or there is no CUTLASS.
    """
    if source.compiler == "nvcc":
        return compiled_by_nvcc(source.text, [source.kernel], arch, include=[cutlass()])
    return compiled(source.text, [source.kernel], arch)


def compiled(source: str, kernels: Sequence[str], arch: str = "sm_90a", *, defines: Sequence[str] = ()) -> Compiled:
    """Compiles a source by NVRTC.

    Args:
        source: CUDA C++17 without headers of the host; `templates/primitives.cuh` is in it as text.
        kernels: names of the kernels (`extern "C"`) that are wanted.
        arch: one of `architectures.ARCHITECTURES`.
        defines: macros, as "NAME" or "NAME=VALUE".

    Raises:
        ConversionError: NVRTC refused the source (its first error, with file and line), or a kernel is not in it.
        MissingDependency: a wheel of the extra `gpu` is not installed.
        UnknownName: no such architecture.
    """
    architecture(arch)  # one of those that sources are written for
    start = time.perf_counter()
    options = [f"--gpu-architecture={arch}", "--std=c++17", "-default-device", "--ptxas-options=-v"]
    options += [f"-I{folder}" for folder in _include_folders()] + [f"-D{one}" for one in defines]
    cubin, ptx, log = _by_nvrtc(source.encode(), [option.encode() for option in options])
    return Compiled(cubin, ptx, log, _kernels(log, kernels), time.perf_counter() - start)


def check_installed() -> None:
    """Whether all is here that NVRTC takes, before anything is compiled.

    Raises:
        MissingDependency: a wheel of the extra `gpu` is not installed.
    """
    _nvrtc()
    _include_folders()


def _nvrtc() -> Any:
    """NVRTC's module, whose library is there."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise MissingDependency("cuda-bindings", PURPOSE, "gpu") from error
    try:
        nvrtc.nvrtcVersion()
    except Exception as error:  # cuda-bindings looks for the library at its first call, and has errors of its own
        raise MissingDependency("nvidia-cuda-nvrtc", PURPOSE, "gpu") from error
    return nvrtc


def _by_nvrtc(source: bytes, options: list[bytes]) -> tuple[bytes, bytes, str]:
    """Machine code, PTX and log."""
    nvrtc = _nvrtc()
    success = nvrtc.nvrtcResult.NVRTC_SUCCESS
    result, program = nvrtc.nvrtcCreateProgram(source, b"kernel.cu", 0, [], [])
    if result != success:
        raise ConversionError(f"NVRTC does not start: {result.name}.")
    try:
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode(errors="replace")
        if result != success:
            raise ConversionError(f"NVRTC refused the source: {_first_error(log) or result.name}")
        cubin = _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program, ended=False)
        return cubin, _text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _text(size: Any, get: Any, program: Any, *, ended: bool = True) -> bytes:
    """What NVRTC gives in two calls; texts end with a zero."""
    result, count = size(program)
    buffer = bytearray(count)
    if result.value == 0 and count:
        view = bytes(buffer)  # cuda-bindings fills the bytes it is given
        (result,) = get(program, view)
        buffer[:] = view
    if result.value:
        raise ConversionError(f"NVRTC gives no result: {result.name}.")
    return bytes(buffer).rstrip(b"\0") if ended else bytes(buffer)


def _first_error(log: str) -> str | None:
    """The first error of a compiler, as file:line: what."""
    found = re.search(r"^(\S+?)\((\d+)\): (?:catastrophic )?error:? *(?:#\S+ *)?(.+)$", log, re.MULTILINE)
    if found:
        return f"{Path(found[1]).name}:{found[2]}: {found[3].strip()[:300]}"
    found = re.search(r"^.*\b(?:error|fatal)\b.*$", log, re.MULTILINE)
    return found[0].strip()[:300] if found else None


def _kernels(log: str, names: Sequence[str]) -> dict[str, KernelInfo]:
    """What ptxas -v says about each kernel."""
    found = {}
    parts = re.split(r"Compiling entry function '([^']+)' for '\S+'", log)
    for name, part in zip(parts[1::2], parts[2::2], strict=True):
        sizes = re.search(
            rf"Function properties for {re.escape(name)}\s[^\n]*?(\d+) bytes stack frame, "
            r"(\d+) bytes spill stores, (\d+) bytes spill loads",
            part,
        )
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        if sizes and registers:
            stack, stores, loads = map(int, sizes.groups())
            found[name] = KernelInfo(int(registers[1]), int(shared[1]) if shared else 0, stores, loads, stack)
    missing = [name for name in names if name not in found]
    if missing:
        raise ConversionError(f"No kernel {missing[0]!r} in the source; there are {', '.join(found) or 'none'}.")
    return {name: found[name] for name in names}


def _wheels() -> list[Path]:
    """Folders that NVIDIA's wheels install to."""
    try:
        import nvidia
    except ImportError:
        return []
    return [folder for one in nvidia.__path__ for folder in sorted(Path(one).glob("cu[0-9]*"), reverse=True)]


def _include_folders() -> list[Path]:
    # A toolkit that is installed serves as well as wheels; these come first, since their versions fit.
    toolkit = Path(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda")
    folders = [root / part for root in (*_wheels(), toolkit) for part in ("include", "include/cccl")]
    for header, package in HEADERS.items():
        if not any((folder / header).is_file() for folder in folders):
            raise MissingDependency(package, PURPOSE, "gpu")
    return folders


def nvcc() -> Path:
    """The program nvcc: the one on the PATH, else the one from a wheel.

    Raises:
        MissingDependency: there is none.
    """
    found = shutil.which("nvcc")
    for program in ([Path(found)] if found else []) + [wheel / "bin/nvcc" for wheel in _wheels()]:
        if program.is_file():
            return program
    raise MissingDependency("nvidia-cuda-nvcc", f"{PURPOSE} by nvcc", "cutlass")


def cutlass() -> Path:
    """The folder of CUTLASS's headers: of `CUTLASS_PATH`, a checkout, if that is set; else from a wheel.

    Raises:
        MissingDependency: there is none.
    """
    if given := os.environ.get("CUTLASS_PATH"):
        roots = [Path(given)]
    else:
        found = importlib.util.find_spec("cutlass_library")
        roots = [Path(one, "source") for one in (found.submodule_search_locations if found else None) or ()]
    for root in roots:
        if (root / "include/cutlass/cutlass.h").is_file():
            return root / "include"
    raise MissingDependency("nvidia-cutlass", f"{PURPOSE} with CUTLASS", "cutlass")


def missing_for_cutlass() -> str | None:
    """What this machine lacks to compile sources that include CUTLASS, or `None`."""
    try:
        _headers_of(nvcc())
        cutlass()
    except MissingDependency as error:
        return f"no {error.package}: pip install 'keras-efficient[cutlass]'"
    return None if shutil.which("g++") else "no g++, which nvcc needs: install g++ 12 or later"


def _headers_of(program: Path) -> list[Path]:
    """Folders that an nvcc is told about: one from a wheel does not find its headers, and takes no other version's."""
    root = program.parent.parent
    if root not in _wheels():
        return []
    own = [root / "include", root / "include/cccl"]
    return own if all(any((one / header).is_file() for one in own) for header in HEADERS) else _include_folders()


def compiled_by_nvcc(
    source: str, kernels: Sequence[str], arch: str = "sm_90a", *, include: Sequence[Path] = (), seconds: float = SECONDS
) -> Compiled:
    """Compiles a source by nvcc, which knows headers of the host: CUTLASS needs them. It needs g++.

    Args:
        source, kernels, arch: as of `compiled`.
        include: more folders with headers.
        seconds: how long it may take.

    Raises:
        ConversionError, MissingDependency, UnknownName: as `compiled`; or nvcc took too long.
    """
    architecture(arch)
    program, start = nvcc(), time.perf_counter()
    folders = [*include, *_headers_of(program)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "kernel.cu").write_text(source, encoding="utf-8")
        command = [str(program), "--cubin", f"-arch={arch}", "-std=c++17", "-Xptxas=-v", "--expt-relaxed-constexpr"]
        command += [f"-I{Path(one).resolve()}" for one in folders] + ["--keep", "kernel.cu", "-o", "kernel.cubin"]
        environment = {**os.environ, "LC_ALL": "C"}  # what g++ says is read
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds, env=environment)
        except subprocess.TimeoutExpired as error:
            raise ConversionError(f"nvcc has not compiled the source within {seconds:g} s.") from error
        log = done.stdout + done.stderr
        if done.returncode:
            raise ConversionError(f"nvcc refused the source: {_first_error(log) or f'it ended with {done.returncode}'}")
        cubin, ptx = (folder / "kernel.cubin").read_bytes(), (folder / "kernel.ptx").read_bytes()
    return Compiled(cubin, ptx, log, _kernels(log, kernels), time.perf_counter() - start)
