"""Bundles: what is saved is loaded; whatever happened to a file is said in one line."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

from keras_efficient.errors import FileProblem, WrongArgument
from keras_efficient.export.bolt import bundle
from keras_efficient.export.bolt.bundle import HEADER, MAGIC, VERSION, Bundle

RNG = np.random.default_rng(0)
SMALL = Bundle(
    onnx=b"onnx",
    cubins={"sm_80": b"\x7fELF", "sm_90a": b"\x7fELF2"},
    ptx={"sm_80": b".version"},
    sources={"stem": "// ×\n"},
    launches={"stem": {"grid": ["ceil(w/64)", 1, 1], "threads": 128, "shared": 6144}},
    weights={"stem": bytes(range(9)), "head": b""},
    tuning={"tried": [{"tile": 64, "ms": 0.5}], "best": None},
    metadata={"keras_efficient": "1"},
)


@pytest.fixture
def path(tmp_path):
    found = tmp_path / "small.bolt"
    SMALL.save(found)
    return found


def test_a_bundle_in_a_line():
    given = {"tuning": {"architecture": "sm_90a"}, "launches": {"kernels": {"strip": {}}}}
    known = replace(SMALL, onnx=bytes(1 << 20), metadata={"sizes": {"x": [1, 8, 9, 3], "z": [1, 4]}}, **given)
    assert repr(known) == "Bundle(sm_90a, 1 kernel, x 1×8×9×3, z 1×4, 1,048,607 bytes)"
    for odd in (None, 3, [], "x"):
        assert len(repr(replace(SMALL, launches={"kernels": odd}, metadata={"sizes": odd}))) < 60
    assert len(repr(replace(SMALL, metadata={"sizes": {"x": None}}))) < 60


def refused(path, content: bytes) -> str:
    """What is said about a file with this content."""
    path.write_bytes(content)
    with pytest.raises(FileProblem) as found:
        Bundle.load(path)
    text = str(found.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text.removeprefix(f"{path}: ")


def made(entries, body=b"", *, version=VERSION, table=None) -> bytes:
    """A file with any table, and right hashes."""
    table = json.dumps(entries).encode() if table is None else table
    return HEADER.pack(MAGIC, version, len(table), hashlib.sha256(table).digest()) + table + body


def entry(kind, name="", part=b""):
    return [kind, name, len(part), hashlib.sha256(part).hexdigest()]


def file_of(*sections, **more) -> bytes:
    """A file with these sections, (kind, name, bytes)."""
    return made([entry(*one) for one in sections], b"".join(part for *_, part in sections), **more)


NEEDED = (("onnx", "", b"o"), ("launches", "", b"{}"), ("tuning", "", b"{}"), ("metadata", "", b"{}"))


def test_what_is_saved_is_loaded(path, tmp_path):
    assert Bundle.load(path) == SMALL
    assert Bundle.load(str(path)) == SMALL
    other = replace(SMALL, weights=dict(reversed(SMALL.weights.items())), metadata={})
    other.save(tmp_path / "other.bolt")
    assert Bundle.load(tmp_path / "other.bolt") == other != SMALL
    replace(other, metadata=SMALL.metadata).save(tmp_path / "again.bolt")
    assert (tmp_path / "again.bolt").read_bytes() == path.read_bytes()
    assert Bundle.load(path).onnx == b"onnx"
    path.write_bytes(file_of(*NEEDED))
    assert Bundle.load(path) == Bundle(onnx=b"o")


def test_a_file_in_the_way_is_kept(path):
    before = path.read_bytes()
    with pytest.raises(FileProblem, match="exists already"):
        replace(SMALL, onnx=b"").save(path)
    assert path.read_bytes() == before
    replace(SMALL, onnx=b"").save(path, overwrite=True)
    assert Bundle.load(path).onnx == b""
    assert [one.name for one in path.parent.iterdir()] == ["small.bolt"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"metadata": {"x": float("nan")}}, "metadata has is no JSON"),
        ({"launches": {"x": b""}}, "launches has is no JSON"),
        ({"sources": {"x": "\ud800"}}, "Source 'x' is no text"),
        ({"weights": {"": b""}}, "No name of a section: ''"),
        ({"cubins": {"x" * 201: b""}}, "No name of a section"),
        ({"ptx": {str(i): b"" for i in range(20_000)}}, "too large"),
    ],
)
def test_what_is_no_bundle_is_not_saved(tmp_path, more, words):
    with pytest.raises(WrongArgument, match=words):
        replace(SMALL, **more).save(tmp_path / "x.bolt")
    assert not list(tmp_path.iterdir())


def test_truncated_anywhere(path):
    whole = path.read_bytes()
    for length in range(len(whole)):
        text = refused(path, whole[:length])
        assert "damaged" in text or length == 0
    assert "length" in refused(path, whole + b"x")


def test_flipped_anywhere(path):
    whole = path.read_bytes()
    for bit in RNG.integers(0, 8 * len(whole), 10_000):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        refused(path, bytes(changed))


def test_every_bit_of_the_header(path):
    whole = path.read_bytes()
    for bit in range(8 * HEADER.size):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        text = refused(path, bytes(changed))
        assert ("no .bolt file" in text) == (bit < 64)
        assert ("format version" in text) == (64 <= bit < 96)


@pytest.mark.parametrize("version", [0, VERSION + 1, 2**32 - 1])
def test_other_versions(path, version):
    text = refused(path, file_of(*NEEDED, version=version))
    assert text == f"has format version {version}, and this release reads {VERSION}."


def test_no_file(tmp_path):
    with pytest.raises(FileProblem, match="cannot be read: No such file"):
        Bundle.load(tmp_path / "none.bolt")
    with pytest.raises(FileProblem, match="cannot be read: Is a directory"):
        Bundle.load(tmp_path)
    with pytest.raises(FileProblem, match="cannot be read: embedded null"):
        Bundle.load("a\0b")
    assert refused(tmp_path / "empty.bolt", b"") == "is no .bolt file."
    assert refused(tmp_path / "other.bolt", b"PK\3\4" * 99) == "is no .bolt file."


@pytest.mark.parametrize(
    "table",
    [
        b"",
        b"{}",
        b"[[]]",
        b"[1]",
        b'[["onnx", "", 0]]',
        b'[["onnx", "", true, ""]]',
        b'[["onnx", "", -1, ""]]',
        b'[["onnx", "x", 0, ""]]',
        b'[["other", "", 0, ""]]',
        b'[["cubin", "", 0, ""]]',
        b'[["onnx", "", 0.5, ""]]',
        b"[" * 100_000,
        b"[" + b"1" * 10_000 + b"]",
        b"\xff",
    ],
    ids=lambda table: table[:20].decode(errors="replace"),
)
def test_tables_that_are_none(path, table):
    assert "its table is none" in refused(path, made(None, table=table))


def test_tables_that_lie(path):
    assert "missing" in refused(path, file_of(*NEEDED[1:]))
    assert "there twice" in refused(path, file_of(*NEEDED, *NEEDED))
    whole = [entry(*one) for one in NEEDED]
    for length in (2**62, 2**63, 2**80):
        long = ["weights", "x", length, ""]
        assert "does not have the length" in refused(path, made([*whole, long], b"o{}{}{}"))
    assert "section onnx does not have its SHA-256" in refused(path, made(whole, b"x{}{}{}"))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (("metadata", "", b"[]"), "section metadata is no JSON object"),
        (("metadata", "", b'{"x": NaN}'), "section metadata is no JSON object"),
        (("metadata", "", b""), "section metadata is no JSON object"),
        (("metadata", "", b'{"a":' * 100_000), "section metadata is no JSON object"),
        (("source", "stem", b"\xff"), "section source 'stem' is no text"),
    ],
)
def test_sections_that_are_none(path, section, words):
    assert words in refused(path, file_of(*(one for one in NEEDED if one[0] != section[0]), section))


def test_a_large_file_is_not_read(path, monkeypatch):
    whole = path.read_bytes()
    monkeypatch.setattr(bundle, "MOST_BYTES", len(whole) - 1)
    assert "more than a bundle has" in refused(path, whole)
