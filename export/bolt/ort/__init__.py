"""A library for ONNX Runtime: networks of `partition` run on the CPU, and by their bundle's kernels on a GPU.

The library knows the operator `Fused` for float32 and float16 on the CPU, and for float16 on CUDA; float32 nodes of a
CUDA session run on the CPU. Without it a session runs the operator's meaning, which stands in the file. It is compiled
by g++ when it is first needed. Not verified: its CUDA part ran on no GPU yet.

In other languages, register the file `library()` gives with the session's options, and name the bundle before that in
their entry `keras_efficient.bolt.bundle`, or in the variable KERAS_EFFICIENT_BOLT_BUNDLE.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from keras_efficient.errors import ConversionError, WrongArgument
from keras_efficient.export.bolt.bundle import Bundle
from keras_efficient.export.bolt.shared_library import compiled

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["ENTRY", "library", "session"]

SOURCE = Path(__file__).with_name("library.cpp")
ENTRY = "keras_efficient.bolt.bundle"  # of a session's options: the path of its bundle
FLAGS = ("-O2", "-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall", "-Wextra")
PREFERRED = ("CUDAExecutionProvider", "CPUExecutionProvider")


def library(*, defines: Sequence[str] = ()) -> Path:
    """The library for this machine, compiled unless that was done before.

    Args:
        defines: macros, as "NAME" or "NAME=VALUE".

    Raises:
        ConversionError: g++ is missing, or refused the source.
    """
    flags = (*FLAGS, *(f"-D{one}" for one in defines), "-ldl")
    return compiled("ONNX Runtime's library of kernels", SOURCE.read_text(encoding="utf-8"), flags)


def session(
    network: Bundle | str | Path, providers: Sequence[str] | None = None, threads: int | None = None
) -> onnxruntime.InferenceSession:
    """A session that runs regions by the library's kernels.

    Args:
        network: a bundle, or the path of one (`.bolt`), or of an ONNX file, whose regions run on the CPU.
        providers: of ONNX Runtime; by default CUDA for a bundle, where there is one, then the CPU.
        threads: for each operator on the CPU; by default as many as there are cores.

    Raises:
        ConversionError: g++ is missing, or ONNX Runtime refused the network: its line says why.
        FileProblem: the bundle cannot be read.
        WrongArgument: providers that this ONNX Runtime does not have, or no network.
    """
    import onnxruntime

    if not isinstance(network, Bundle | str | Path):
        raise WrongArgument(f"A bundle, or the path of a .bolt or an .onnx, is wanted, not {type(network).__name__}.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.bolt" if isinstance(network, Bundle) else Path(network).absolute()
        if isinstance(network, Bundle):
            network.save(path)  # the library reads it while the session is made
        bundle = Bundle.load(path) if path.suffix == ".bolt" else None
        available = onnxruntime.get_available_providers()
        if providers is None:
            wanted = ("CPUExecutionProvider",) if bundle is None else PREFERRED
            providers = [one for one in wanted if one in available]
        if missing := [one for one in providers if one not in available]:
            raise WrongArgument(f"ONNX Runtime has no provider {missing[0]!r} here; there are {', '.join(available)}.")
        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        if bundle is not None:
            options.add_session_config_entry(ENTRY, str(path))
        options.register_custom_ops_library(str(library()))
        given = str(path) if bundle is None else bundle.onnx
        try:
            return onnxruntime.InferenceSession(given, options, providers=list(providers))
        except Exception as error:  # ONNX Runtime's own, without a public base
            raise ConversionError(f"ONNX Runtime refused the network: {str(error).splitlines()[0][:500]}") from error
