"""One file `.bolt` that has all of a compiled network: its ONNX file, kernels for each architecture, their weights.

    8 bytes      magic
    4 bytes      version of the format, little-endian, as all numbers
    4 bytes      length of the table
    32 bytes     SHA-256 of the table
    table        JSON: [[kind, name, length, SHA-256], …] of the sections
    sections     one behind the other, in the table's order, up to the end of the file

A file is not to be trusted: lengths are checked against the file's before anything is read, hashes before anything is
used. A hash finds damage, not malice: kernels and ONNX files run as they are, so load those of people you trust.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from keras_efficient.atomic import replacing
from keras_efficient.errors import FileProblem, WrongArgument

__all__ = ["VERSION", "Bundle"]

VERSION = 1
MAGIC = b"\x89BOLT\r\n\x1a"  # as PNG's: no text, and changed by what changes ends of lines
HEADER = struct.Struct("<8sII32s")
MOST_TABLE = 2**20
MOST_BYTES = 2**31  # of a file; ONNX files end there too
MOST_NAME = 200

SINGLE = ("onnx", "launches", "tuning", "metadata")  # kinds of which there is one section, without a name
NAMED = ("cubin", "ptx", "source", "weights")
JSON = ("launches", "tuning", "metadata")


@dataclass(frozen=True, repr=False)
class Bundle:
    """A compiled network.

    What there is several of has names: of a kernel, or of a kernel and an architecture ("strip_1f/sm_90a").

    Attributes:
        onnx: the ONNX file, with a node for each kernel.
        cubins: machine code by name.
        ptx: the same in PTX, which TensorRT takes, and the driver where it has no machine code for a newer GPU.
        sources: CUDA C++ by name, to compile for others.
        launches: what a launch of each kernel takes, in JSON: objects, lists, strings, numbers, booleans and null.
        weights: packed, by the number of the region.
        tuning: which kernels were tried, and how fast they were, in JSON.
        metadata: all else, in JSON.
    """

    onnx: bytes
    cubins: Mapping[str, bytes] = field(default_factory=dict)
    ptx: Mapping[str, bytes] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    launches: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, bytes] = field(default_factory=dict)
    tuning: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """In a line, whatever it holds: megabytes of code are of no use to readers."""
        kernels, sizes = self.launches.get("kernels", ()), self.metadata.get("sizes", {})
        many = len(kernels) if isinstance(kernels, Mapping) else 0
        known = sizes if isinstance(sizes, Mapping) else {}
        inputs = [
            f"{name} {'×'.join(map(str, size)) if isinstance(size, list) else size}" for name, size in known.items()
        ]
        parts = [
            f"{self.tuning.get('architecture', 'no architecture')}",
            f"{many} {'kernel' if many == 1 else 'kernels'}",
        ]
        total = sum(len(one) for kind in (self.cubins, self.ptx, self.sources, self.weights) for one in kind.values())
        return f"Bundle({', '.join([*parts, *inputs, f'{total + len(self.onnx):,} bytes'])})"

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Writes the file, whole or not at all. Equal bundles give equal files.

        Raises:
            FileProblem: there is a file already and `overwrite` is false, or writing fails.
            WrongArgument: what should be JSON is none, a name is empty or long, or all is too large.
        """
        sections = list(self._sections())
        entries = [[kind, name, len(part), hashlib.sha256(part).hexdigest()] for kind, name, part in sections]
        table = json.dumps(entries, separators=(",", ":")).encode()
        size = HEADER.size + len(table) + sum(len(part) for *_, part in sections)
        if len(table) > MOST_TABLE or size > MOST_BYTES:
            raise WrongArgument(f"A bundle of {len(sections)} sections and {size} bytes is too large.")
        with replacing(path, overwrite=overwrite) as temporary, open(temporary, "wb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, len(table), hashlib.sha256(table).digest()))
            file.write(table)
            for *_, part in sections:
                file.write(part)

    @classmethod
    def load(cls, path: str | Path) -> Bundle:
        """Reads a file that `save` wrote.

        Raises:
            FileProblem: there is none, it is none of ours, of another version, or damaged.
        """
        try:
            with open(path, "rb") as file:
                return _read(file, path)
        except FileProblem:
            raise
        except (OSError, ValueError) as error:  # ValueError: a name with a zero in it
            raise FileProblem(path, f"cannot be read: {getattr(error, 'strerror', None) or error}.") from error

    def _sections(self) -> Iterator[tuple[str, str, bytes]]:
        """Kind, name and bytes of each section."""
        for kind in SINGLE:
            value = getattr(self, kind)
            yield kind, "", _dumped(kind, value) if kind in JSON else bytes(value)
        for kind in NAMED:
            for name, value in sorted(getattr(self, _attribute(kind)).items()):
                if not 0 < len(name) <= MOST_NAME:
                    raise WrongArgument(f"No name of a section: {name!r}.", hint=f"1 to {MOST_NAME} characters.")
                yield kind, name, _encoded(name, value) if kind == "source" else bytes(value)


def _attribute(kind: str) -> str:
    return {"cubin": "cubins", "source": "sources"}.get(kind, kind)


def _encoded(name: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise WrongArgument(f"Source {name!r} is no text: {error}.") from error


def _dumped(kind: str, value: Any) -> bytes:
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise WrongArgument(f"What {kind} has is no JSON: {error}.") from error


def _read(file: BinaryIO, path: str | Path) -> Bundle:
    size = os.fstat(file.fileno()).st_size
    header = file.read(HEADER.size)
    if header[: len(MAGIC)] != MAGIC[: len(header)] or not header:
        raise FileProblem(path, "is no .bolt file.")
    if len(header) < HEADER.size:
        raise _damaged(path, "it ends within its header")
    _, version, table_bytes, digest = HEADER.unpack(header)
    if version != VERSION:
        raise FileProblem(path, f"has format version {version}, and this release reads {VERSION}.")
    if size > MOST_BYTES:
        raise _damaged(path, f"{size} bytes are more than a bundle has")
    if table_bytes > min(MOST_TABLE, size - HEADER.size):
        raise _damaged(path, "its table goes beyond its end")
    table = file.read(table_bytes)
    if hashlib.sha256(table).digest() != digest:
        raise _damaged(path, "its table does not have its SHA-256")
    entries = _entries(table, path)
    if HEADER.size + table_bytes + sum(length for _, _, length, _ in entries) != size:
        raise _damaged(path, "it does not have the length that its table gives")
    found: dict[str, Any] = {_attribute(kind): {} for kind in NAMED}
    for kind, name, length, digest_text in entries:
        part = file.read(length)
        what = f"section {kind} {name!r}" if name else f"section {kind}"
        if hashlib.sha256(part).hexdigest() != digest_text:
            raise _damaged(path, f"{what} does not have its SHA-256")
        value = _value(kind, part)
        if value is None:
            raise _damaged(path, f"{what} is no {'JSON object' if kind in JSON else 'text'}")
        if kind in SINGLE:
            found[kind] = value
        else:
            found[_attribute(kind)][name] = value
    return Bundle(**found)


def _damaged(path: str | Path, what: str) -> FileProblem:
    return FileProblem(path, f"is damaged, build or copy it again: {what}.")


def _entries(table: bytes, path: str | Path) -> list[tuple[str, str, int, str]]:
    """The table, when all in it is what it should be."""
    try:
        found = json.loads(table)
    except (ValueError, RecursionError):  # no UTF-8, no JSON, numbers of thousands of digits, too deep
        found = None
    if not isinstance(found, list) or not all(map(_is_entry, found)):
        raise _damaged(path, "its table is none")
    keys = [(kind, name) for kind, name, _, _ in found]
    if len(set(keys)) < len(keys) or not {(kind, "") for kind in SINGLE} <= set(keys):
        raise _damaged(path, "a section is missing, or there twice")
    return [tuple(one) for one in found]


def _is_entry(one: Any) -> bool:
    if not isinstance(one, list) or [type(part) for part in one] != [str, str, int, str]:
        return False
    kind, name, length, _ = one
    return length >= 0 and ((kind in SINGLE and not name) or (kind in NAMED and 0 < len(name) <= MOST_NAME))


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _value(kind: str, part: bytes) -> Any:
    """A section's content; `None` where it is not of its kind."""
    if kind not in JSON and kind != "source":
        return part
    try:
        if kind == "source":
            return part.decode()
        value = json.loads(part, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
