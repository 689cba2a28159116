"""Files that are either whole or not there: written beside their place, synced, moved."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

from keras_efficient.errors import FileProblem, WrongArgument

__all__ = ["check_apart", "check_target", "replacing"]


def check_target(path: str | Path, *, overwrite: bool = False) -> Path:
    """Refuses, before any work is done, a target that could not be written in the end.

    Raises:
        FileProblem: it exists and `overwrite` is false, it is a folder, its folder is missing, or the system refuses
            its name.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise FileProblem(path, "is a folder.", hint="Give the name of a file.")
        if path.exists() and not overwrite:
            hint = "Pass --force, or overwrite=True, to replace it, or choose another name."
            raise FileProblem(path, "exists already and is kept.", hint=hint)
        if not path.parent.is_dir():
            raise FileProblem(path.parent, "no such folder.", hint="Make it first, or correct the path.")
    except FileProblem:
        raise
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise FileProblem(path, f"cannot be written: {_reason(error)}.") from error
    return path


def check_apart(sources: Iterable[Path], targets: Iterable[Path]) -> None:
    """Refuses, before any work is done, results that would replace what they are made of, by whatever name.

    Raises:
        WrongArgument: a target is the same file as one of the sources.
    """
    inputs = {_identity(source) for source in sources} - {None}
    for target in targets:
        if _identity(target) in inputs:
            raise WrongArgument(f"{target} is the input itself.", hint="Choose another name, or another folder.")


@contextlib.contextmanager
def replacing(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives the temporary name under which the block writes; afterwards the file is synced and moved to `path`.

    Whatever ends the block early, Ctrl-C too, removes the temporary file and leaves what was at `path`.

    Raises:
        FileProblem: as `check_target`; or writing failed (full disk, no permission, …).
    """
    path = check_target(path, overwrite=overwrite)
    stem = os.fsencode(path.stem)[:100].decode(errors="ignore")  # systems count bytes: 255 of them
    path = Path(os.path.realpath(path))  # a symbolic link stays, what it points to is replaced
    temporary = path.with_name(f".{stem}.{secrets.token_hex(4)}.partial{path.suffix}")
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
        with contextlib.suppress(OSError):  # what went wrong before is the news
            temporary.unlink()


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


def _identity(path: Path) -> tuple[int, int] | None:
    """What two names of one file share, or None where there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _reason(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space left on the device"
    if error.errno == errno.EFBIG:
        return "larger than files may become here"
    return error.strerror or str(error) or type(error).__name__
