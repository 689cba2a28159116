"""Files that are either whole or not there: written beside their place, synced, moved."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from keras_efficient.errors import FileProblem

__all__ = ["check_target", "replacing"]


def check_target(path: str | Path, *, overwrite: bool = False) -> Path:
    """Refuses, before any work is done, a target that could not be written in the end.

    Raises:
        FileProblem: it exists and `overwrite` is false, it is a folder, or its folder is missing.
    """
    path = Path(path)
    if path.is_dir():
        raise FileProblem(path, "is a folder.", hint="Give the name of a file.")
    if path.exists() and not overwrite:
        hint = "Pass overwrite=True (--force) to replace it, or choose another name."
        raise FileProblem(path, "exists already and is kept.", hint=hint)
    if not path.parent.is_dir():
        raise FileProblem(path.parent, "no such folder.", hint="Make it first, or correct the path.")
    return path


@contextlib.contextmanager
def replacing(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives the temporary name under which the block writes; afterwards the file is synced and moved to `path`.

    Whatever ends the block early, Ctrl-C too, removes the temporary file and leaves what was at `path`.

    Raises:
        FileProblem: as `check_target`; or writing failed (full disk, no permission, …).
    """
    path = check_target(path, overwrite=overwrite)
    temporary = path.with_name(f".{path.stem[:100]}.{os.getpid()}.partial{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if overwrite:
            os.replace(temporary, path)
        else:
            _move_to_free_name(temporary, path)
    except FileProblem:
        raise
    except OSError as error:
        raise FileProblem(path, f"cannot be written: {_reason(error)}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _move_to_free_name(temporary: Path, path: Path) -> None:
    """Moves, unless a file of that name has come into being meanwhile."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        check_target(path)
        raise
    except OSError:  # a file system without hard links
        check_target(path)
        os.replace(temporary, path)


def _reason(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space left on the device"
    if error.errno == errno.EFBIG:
        return "larger than files may become here"
    return error.strerror or str(error) or type(error).__name__
