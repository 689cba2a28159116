"""Chunks: some packets of one camera's video, as bytes that say when they are damaged."""

from __future__ import annotations

import math
import re
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

from keras_efficient.errors import BadChunk, WrongArgument
from keras_efficient.video.encoder import Packet

__all__ = ["MOST_BYTES", "Chunk", "check_camera", "chunked"]

MOST_BYTES = 8 << 20
MOST_PACKETS = 1024
MOST_SIDE = 8192
MOST_NUMBER = 1 << 62  # of sequences, streams and time stamps: databases count in 63 bits

_MAGIC, _VERSION = b"KEVC", 1
_CODECS = ("libx264", "libx265")
# Magic, version, begins and ends, codec, bytes of the camera's name; stream, sequence, dropped, captured; width,
# height, fps, number of packets.
_HEADER = struct.Struct("<4sBBBBQQQdHHIIH")
_PACKET = struct.Struct("<IqqB")  # bytes, pts, dts, is key
_CRC = struct.Struct("<I")
_CAMERA = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Chunk:
    """Some packets in a row of one group of pictures.

    A group begins with a key frame and needs nothing from before it. Its last chunk says so, so that a decoder can give
    the frames that it holds back; that chunk may be without packets.

    Attributes:
        packets: at most 1024, in the order in which they are decoded.
        codec: of the encoder, `"libx264"` or `"libx265"`.
        width, height: of its frames.
        fps: its frames a second; time stamps of packets are ticks of 1/fps.
        begins: whether its first packet is a key frame, with which a group begins.
        ends: whether its group ends with it.
        captured: when its first frame was taken, in seconds since 1970.
        camera: name of the camera.
        stream: the camera's spool, by a number that no other spool has; sequences count in it.
        sequence: 1, 2, …
        dropped: how many chunks right before this one the server does not get: the camera has given them up.
    """

    packets: tuple[Packet, ...]
    codec: str
    width: int
    height: int
    fps: Fraction
    begins: bool
    ends: bool
    captured: float
    camera: str = ""
    stream: int = 0
    sequence: int = 0
    dropped: int = 0

    @property
    def crc(self) -> int:
        """CRC-32 of the packets' bytes: the same, whenever the chunk is sent."""
        crc = 0
        for packet in self.packets:
            crc = zlib.crc32(packet.data, crc)
        return crc

    def to_bytes(self) -> bytes:
        """A header, the packets, and the CRC-32 of both.

        Raises:
            BadChunk: it is over a limit.
        """
        _check(self)
        name = self.camera.encode()
        parts = [
            _HEADER.pack(
                *(_MAGIC, _VERSION, self.begins | self.ends << 1, _CODECS.index(self.codec), len(name)),
                *(self.stream, self.sequence, self.dropped, self.captured, self.width, self.height),
                *(self.fps.numerator, self.fps.denominator, len(self.packets)),
            ),
            name,
        ]
        for packet in self.packets:
            parts += (_PACKET.pack(len(packet.data), packet.pts, packet.dts, packet.is_key), packet.data)
        data = b"".join(parts)
        if len(data) + _CRC.size > MOST_BYTES:
            raise BadChunk(
                f"A chunk of {len(data):,} bytes is too large.", hint=f"At most {MOST_BYTES:,}: fewer frames."
            )
        return data + _CRC.pack(zlib.crc32(data))

    @classmethod
    def from_bytes(cls, data: bytes) -> Chunk:
        """What `to_bytes` gave. Nothing is allocated on the word of a length that was not checked.

        Raises:
            BadChunk: anything else.
        """
        if not _HEADER.size + _CRC.size <= len(data) <= MOST_BYTES:
            raise BadChunk(f"{len(data):,} bytes are no chunk.")
        magic, version, flags, codec, name, *numbers, captured, width, height, num, den, count = _HEADER.unpack_from(
            data
        )
        if magic != _MAGIC:
            raise BadChunk("The bytes are no chunk: they begin otherwise.")
        if version != _VERSION:
            raise BadChunk(f"The chunk is of version {version}; {_VERSION} is known.", hint="Update the older side.")
        end = len(data) - _CRC.size
        if zlib.crc32(memoryview(data)[:end]) != _CRC.unpack_from(data, end)[0]:
            raise BadChunk("The chunk is damaged: its CRC does not fit.")
        if codec >= len(_CODECS) or flags > 3 or not num or not den or count > MOST_PACKETS:
            raise BadChunk("The chunk's header holds numbers that none may have.")
        place = _HEADER.size + name
        try:
            camera = data[_HEADER.size : place].decode("ascii")
        except UnicodeDecodeError as error:
            raise BadChunk("The chunk's camera has no name.") from error
        packets = []
        for _ in range(count):
            if place + _PACKET.size > end:
                raise BadChunk("The chunk is cut off.")
            size, pts, dts, is_key = _PACKET.unpack_from(data, place)
            place += _PACKET.size
            if place + size > end:
                raise BadChunk("The chunk is cut off.")
            packets.append(Packet(data[place : place + size], pts, dts, bool(is_key)))
            place += size
        if place != end:
            raise BadChunk(f"The chunk has {end - place} bytes too many.")
        kind, rate = _CODECS[codec], Fraction(num, den)
        begins, ends = bool(flags & 1), bool(flags & 2)
        chunk = cls(tuple(packets), kind, width, height, rate, begins, ends, captured, camera, *numbers)
        _check(chunk)
        return chunk


def check_camera(name: str) -> str:
    """The name of a camera, which is also that of files and of a certificate.

    Raises:
        WrongArgument: it is none.
    """
    if not _CAMERA.fullmatch(name):
        raise WrongArgument(
            f"{name!r} is no name of a camera.", hint="1 to 64 letters, digits, dots, hyphens and underscores."
        )
    return name


def chunked(
    packets: Iterable[Packet],
    codec: str,
    width: int,
    height: int,
    fps: Fraction,
    *,
    frames: int = 10,
    captured: Callable[[int], float] | None = None,
) -> Iterator[Chunk]:
    """Packets of one encoder as chunks, each as soon as it is full; none reaches over the beginning of a group.

    A group that ends where a chunk was full has a last chunk without packets.

    Args:
        packets: from the first key frame on.
        codec, width, height, fps: of the encoder.
        frames: in a chunk.
        captured: from a time stamp to the seconds since 1970 when that frame was taken; by default it is now.

    Raises:
        WrongArgument: `frames` is not from 1 to 1024.
    """
    if not 1 <= frames <= MOST_PACKETS:
        raise WrongArgument(f"A chunk has 1 to {MOST_PACKETS} frames, not {frames}.")
    when = captured or (lambda pts: time.time())
    held: list[Packet] = []
    begins, first = True, 0.0

    def chunk(ends: bool) -> Chunk:
        taken = when(min(packet.pts for packet in held)) if held else first
        return Chunk(tuple(held), codec, width, height, fps, begins, ends, taken)

    for packet in packets:
        if packet.is_key and (held or not begins):
            yield chunk(ends=True)
            held, begins = [], True
        held.append(packet)
        if len(held) == frames:
            full = chunk(ends=False)
            yield full
            held, begins, first = [], False, full.captured
    if held or not begins:
        yield chunk(ends=True)


def _check(chunk: Chunk) -> None:
    sides, fps = (chunk.width, chunk.height), chunk.fps
    if chunk.codec not in _CODECS:
        raise BadChunk(f"The chunk is of {chunk.codec!r}; known are {', '.join(_CODECS)}.")
    if not all(16 <= side <= MOST_SIDE and side % 2 == 0 for side in sides):
        raise BadChunk(f"The chunk's frames are {sides[0]}×{sides[1]}: sides are even, from 16 to {MOST_SIDE}.")
    if not (0 < fps <= 1000 and max(fps.numerator, fps.denominator) < 1 << 32):
        raise BadChunk(f"The chunk has {float(fps):g} frames a second: above 0 and up to 1000 can be.")
    if len(chunk.packets) > MOST_PACKETS or (chunk.begins and not (chunk.packets and chunk.packets[0].is_key)):
        raise BadChunk(f"A chunk has at most {MOST_PACKETS} packets, and a group begins with a key frame.")
    if any(packet.is_key for packet in chunk.packets[chunk.begins :]):
        raise BadChunk("A chunk has a key frame at its beginning only.")
    if not (chunk.packets or chunk.ends):
        raise BadChunk("A chunk without packets ends its group.")
    numbers = (chunk.stream, chunk.sequence, chunk.dropped)
    times = [abs(time) for packet in chunk.packets for time in (packet.pts, packet.dts)]
    if not all(0 <= number < MOST_NUMBER for number in (*numbers, *times)) or not math.isfinite(chunk.captured):
        raise BadChunk("The chunk's numbers are out of range.")
    if chunk.camera and not _CAMERA.fullmatch(chunk.camera):
        raise BadChunk(f"The chunk's camera has no good name: {chunk.camera!r}.")
