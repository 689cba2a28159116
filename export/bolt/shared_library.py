"""C++ compiled for this machine's processor, once: shared libraries in a folder of this user's alone."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from keras_efficient.errors import ConversionError, FileProblem

__all__ = ["compiled"]

SECONDS = 300


def compiled(purpose: str, text: str, flags: Sequence[str], *, include: Path | None = None, known: str = "") -> Path:
    """The library that g++ makes of a source, unless it did before.

    Args:
        purpose: what needs it; the beginning of a sentence.
        text: C++.
        flags: of g++, in their order; libraries to link too.
        include: a folder with headers.
        known: what besides `text` and `flags` the result hangs on, such as the text of those headers.

    Raises:
        ConversionError: g++ is missing, or refused the source.
        FileProblem: others may write to the folder.
    """
    program = shutil.which("g++")
    if program is None:
        raise ConversionError(f"{purpose} needs g++, which is not there.", hint="Install g++ 12 or later.")
    native = ("-march=native",) if platform.machine() in ("x86_64", "AMD64") else ()  # halves in one instruction
    command = [program, *native, "-x", "c++", "source.cpp", "-o", "library.so", *flags]
    name = hashlib.sha256("\0".join((*command, _processor(), text, known)).encode()).hexdigest()[:32]
    library = _folder() / f"{name}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        (Path(folder) / "source.cpp").write_text(text, encoding="utf-8")
        command += [] if include is None else ["-I", str(include)]
        environment = {**os.environ, "LC_ALL": "C"}  # what it says is read
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, env=environment)
        except subprocess.TimeoutExpired as error:
            raise ConversionError(f"g++ has not compiled the source within {SECONDS} s.") from error
        if done.returncode:
            lines = done.stderr.splitlines() or ["it gave no reason"]
            first = next((line for line in lines if "error" in line), lines[-1])
            raise ConversionError(f"g++ refused the source: {first.strip()[:300]}")
        os.replace(Path(folder) / "library.so", library)
    return library


def _folder() -> Path:
    """Libraries in it are run."""
    folder = Path(tempfile.gettempdir()) / f"keras_efficient-bolt-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022 or folder.is_symlink():
        raise FileProblem(folder, "others may write to it.", hint="Remove it, or set TMPDIR.")
    return folder


@functools.cache
def _processor() -> str:
    """What the processor can, where the system says it: another one gets another library."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith("flags")), platform.machine())
