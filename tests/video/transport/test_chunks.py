"""Chunks as bytes: what is damaged is said to be; groups of pictures stay together."""

from __future__ import annotations

import dataclasses
import struct
import tracemalloc
import zlib
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_efficient.errors import BadChunk, WrongArgument
from keras_efficient.video.encoder import Packet
from keras_efficient.video.transport import Chunk, chunked
from keras_efficient.video.transport.chunks import MOST_BYTES, check_camera

from .helpers import chunk, packet, video

packets = st.builds(Packet, st.binary(max_size=50), st.integers(-5, 2**40), st.integers(-5, 2**40), st.just(False))
whole = st.builds(
    Chunk,
    st.lists(packets, min_size=1, max_size=5).map(tuple),
    st.sampled_from(["libx264", "libx265"]),
    st.integers(8, 4096).map(lambda side: 2 * side),
    st.integers(8, 4096).map(lambda side: 2 * side),
    st.fractions(min_value=1, max_value=1000, max_denominator=60000),
    st.just(False),
    st.booleans(),
    st.floats(0, 1e10),
    st.from_regex(r"[a-z0-9][a-zA-Z0-9._-]{0,63}", fullmatch=True),
    st.integers(0, 2**62 - 1),
    st.integers(0, 2**62 - 1),
    st.integers(0, 2**62 - 1),
)


@settings(max_examples=200, deadline=None)
@given(whole)
def test_there_and_back(one):
    assert Chunk.from_bytes(one.to_bytes()) == one


def test_a_key_frame_there_and_back():
    one = chunk(begins=True, camera="cam1", sequence=7)
    assert Chunk.from_bytes(one.to_bytes()) == one
    assert one.crc == zlib.crc32(b"data") == dataclasses.replace(one, dropped=3, sequence=8).crc


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes(data):
    for text in (data, b"KEVC\1" + data, resealed(b"KEVC\1" + data)):
        with pytest.raises(BadChunk):
            Chunk.from_bytes(text)


@settings(max_examples=300, deadline=None)
@given(whole, st.data())
def test_flipped_bits_and_cut_ends(one, data):
    text = one.to_bytes()
    bit = data.draw(st.integers(0, 8 * len(text) - 1))
    flipped = bytearray(text)
    flipped[bit // 8] ^= 1 << bit % 8
    for damaged in (bytes(flipped), text[: data.draw(st.integers(0, len(text) - 1))], text + b"x"):
        with pytest.raises(BadChunk):
            Chunk.from_bytes(damaged)


@settings(max_examples=300, deadline=None)
@given(whole, st.data())
def test_wrong_numbers_under_a_right_crc(one, data):
    """Somebody who means harm computes the CRC, too."""
    text = bytearray(one.to_bytes()[:-4])
    for _ in range(data.draw(st.integers(1, 4))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = Chunk.from_bytes(resealed(bytes(text)))
    except BadChunk:
        return
    assert Chunk.from_bytes(found.to_bytes()) == found


def test_lengths_are_checked_before_memory_is_taken():
    text = bytearray(chunk(begins=True).to_bytes()[:-4])
    struct.pack_into("<I", text, len(text) - 4 - 21, 2**32 - 1)
    tracemalloc.start()
    with pytest.raises(BadChunk, match="cut off"):
        Chunk.from_bytes(resealed(bytes(text)))
    with pytest.raises(BadChunk, match="bytes are no chunk"):
        Chunk.from_bytes(bytes(MOST_BYTES + 1))
    assert tracemalloc.get_traced_memory()[1] < 2 * MOST_BYTES
    tracemalloc.stop()


def resealed(text):
    return text + struct.pack("<I", zlib.crc32(text))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 8194}, "8194×48: sides are even"),
        ({"height": 47}, "64×47: sides are even"),
        ({"fps": Fraction(1001)}, "frames a second"),
        ({"codec": "libsvtav1"}, "libsvtav1"),
        ({"packets": (packet(True),) * 2}, "at its beginning only"),
        ({"packets": (packet(False),)}, "begins with a key frame"),
        ({"packets": ()}, "begins with a key frame"),
        ({"packets": (packet(True), *(packet(),) * 1024)}, "at most 1024"),
        ({"packets": (packet(True, data=bytes(MOST_BYTES)),)}, "too large"),
        ({"begins": False, "packets": ()}, "ends its group"),
        ({"captured": float("nan")}, "out of range"),
        ({"sequence": 2**62}, "out of range"),
        ({"camera": "../up"}, "no good name"),
    ],
)
def test_limits_hold_where_it_is_written(change, words):
    with pytest.raises(BadChunk, match=words):
        dataclasses.replace(chunk(begins=True), **change).to_bytes()


def test_names_of_cameras():
    assert check_camera("cam-1.north_2") == "cam-1.north_2"
    for name in ("", ".", "a/b", "-x", "é", "x" * 65, "a b", "a\n"):
        with pytest.raises(WrongArgument, match="no name of a camera"):
            check_camera(name)


def shape(chunks):
    return [(one.begins, one.ends, len(one.packets)) for one in chunks]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([0], [(True, False, 3), (False, False, 3), (False, True, 1)]),
        ([0, 3], [(True, False, 3), (False, True, 0), (True, False, 3), (False, True, 1)]),
        ([0, 2], [(True, True, 2), (True, False, 3), (False, True, 2)]),
        ([0, 4, 6], [(True, False, 3), (False, True, 1), (True, True, 2), (True, True, 1)]),
    ],
)
def test_no_chunk_reaches_over_the_beginning_of_a_group(keys, expected):
    source = [packet(number in keys, number) for number in range(7)]
    found = list(chunked(source, "libx264", 64, 48, Fraction(25), frames=3, captured=lambda pts: 100 + pts))
    assert shape(found) == expected
    assert [one.pts for chunk in found for one in chunk.packets] == list(range(7))
    assert found[0].captured == 100


def test_chunks_come_as_soon_as_they_are_full():
    taken = []

    def source():
        for number in range(6):
            taken.append(number)
            yield packet(number == 0, number)

    next(chunked(source(), "libx264", 64, 48, Fraction(25), frames=3))
    assert taken == [0, 1, 2]
    assert list(chunked([], "libx264", 64, 48, Fraction(25))) == []
    with pytest.raises(WrongArgument, match="1 to 1024 frames"):
        next(chunked(source(), "libx264", 64, 48, Fraction(25), frames=0))


def test_groups_of_a_real_video_begin_with_their_keys():
    chunks = video(40, 10, size=4)
    assert sum(len(one.packets) for one in chunks) == 40
    assert [one.begins for one in chunks].count(True) == [one.ends for one in chunks].count(True) >= 4
