"""The package's exceptions: each says what is wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BadChunk",
    "CalibrationError",
    "ConnectionProblem",
    "ConversionError",
    "FileProblem",
    "KerasEfficientError",
    "MissingDependency",
    "UnknownName",
    "UnsupportedLayer",
    "VerificationError",
    "WrongArgument",
]


class KerasEfficientError(Exception):
    """Base of every error that this package raises on purpose.

    Args:
        message: one sentence: what is wrong, and where.
        hint: what to do about it, or `None` where there is nothing to say.
    """

    def __init__(self, message: str, *, hint: str | None = None):
        super().__init__(message if hint is None else f"{message}\n{hint}")
        self.message = message
        self.hint = hint


class WrongArgument(KerasEfficientError, ValueError):
    """An argument, or a combination of arguments, that cannot be served."""


class UnknownName(WrongArgument):
    """A name that is in no list of ours; the nearest known name is the hint, never acted upon."""

    def __init__(self, kind: str, name: str, known: Iterable[str], *, see: str | None = None):
        known = sorted(known)
        nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
        parts = [f"Did you mean {nearest[0]!r}?"] if nearest else []
        if see:
            parts.append(f"{see} lists all of them.")
        elif not nearest:
            parts.append(f"Known: {', '.join(known)}.")
        super().__init__(f"Unknown {kind}: {name!r}.", hint=" ".join(parts) or None)
        self.kind, self.name, self.known, self.nearest = kind, name, tuple(known), (nearest[0] if nearest else None)


class UnsupportedLayer(KerasEfficientError, TypeError):
    """A layer (named by its path in the model) that a step cannot handle."""

    def __init__(self, path: str, reason: str, *, hint: str | None = None):
        super().__init__(f"Layer {path!r}: {reason}", hint=hint)
        self.path, self.reason = path, reason


class FileProblem(KerasEfficientError, OSError):
    """A file that is missing, unreadable, damaged, in the way, or that cannot be written."""

    # OSError's __str__ would look at errno; ours is the message.
    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n{self.hint}"

    def __init__(self, path: object, reason: str, *, hint: str | None = None):
        super().__init__(f"{path}: {reason}", hint=hint)
        self.path, self.reason = str(path), reason


class CalibrationError(WrongArgument):
    """Calibration data that is missing, empty, or not what the model takes."""


class ConversionError(KerasEfficientError, RuntimeError):
    """A converter or compiler failed, or wrote a file that is not what was asked for."""


class VerificationError(KerasEfficientError, RuntimeError):
    """The written file, run in its own runtime, does not compute what the model computes."""


class BadChunk(KerasEfficientError, ValueError):
    """Bytes that are no chunk of video, or a chunk that does not continue what came before it."""


class ConnectionProblem(KerasEfficientError, RuntimeError):
    """A server, a camera or a database that cannot be reached, or that refuses."""


class MissingDependency(KerasEfficientError, ImportError):
    """An optional package is not installed."""

    def __init__(self, package: str, purpose: str, extra: str):
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed.",
            hint=f"Install it: pip install 'keras-efficient[{extra}]'",
        )
        self.package, self.extra = package, extra
