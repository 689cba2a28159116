"""PNG at the level of its chunks: what Pillow cannot do with 16 bits a sample.

Reading decodes with PyAV (Pillow cuts 16-bit colour to 8 bits without a word); writing needs NumPy and zlib only.
Source: W3C, Portable Network Graphics (PNG) Specification.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from keras_efficient.errors import MissingDependency

__all__ = ["SIGNATURE", "Header", "chunks", "decode_16_bit", "encode_16_bit", "header"]

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # channels: PNG's number
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Header:
    """The IHDR chunk: size in pixels, bits a sample, PNG's number of the colour type."""

    width: int
    height: int
    bits: int
    colour_type: int


def header(data: bytes) -> Header | None:
    """The header of a PNG file's first bytes (29 or more), or None where they are something else."""
    if data[:8] != SIGNATURE or data[12:16] != b"IHDR" or len(data) < 26:
        return None
    return Header(*struct.unpack(">IIBB", data[16:26]))


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(name, content) of every chunk, IEND being the last.

    Raises:
        ValueError: the file ends before IEND, or a chunk's checksum is wrong.
    """
    place, name = 8, b""
    while name != b"IEND":
        length, name = struct.unpack(">I4s", _exactly(data, place, 8))
        content = _exactly(data, place + 8, length)
        if zlib.crc32(name + content) != struct.unpack(">I", _exactly(data, place + 8 + length, 4))[0]:
            raise ValueError(f"the checksum of chunk {name.decode('latin-1')} is wrong")
        place += 12 + length
        yield name, content


def decode_16_bit(data: bytes) -> np.ndarray:
    """Decodes a PNG of 16 bits a sample to H×W (gray) or H×W×C (gray and alpha, RGB, RGBA), uint16.

    The one transparent colour that a tRNS chunk names becomes an alpha channel.

    Raises:
        MissingDependency: PyAV is not installed.
        ValueError: the file is damaged.
    """
    try:
        import av
    except ImportError as error:
        raise MissingDependency("av", "Reading a PNG of 16 bits a sample", "video") from error
    head = header(data)
    if head is None:
        raise ValueError("the header is damaged")
    transparent = dict(chunks(data)).get(b"tRNS")
    plain = SIGNATURE + b"".join(_chunk(n, c) for n, c in chunks(data) if n in (b"IHDR", b"IDAT", b"IEND"))
    try:
        with av.open(io.BytesIO(plain), "r", format="png_pipe") as container:
            frame = next(container.decode(video=0))
    except (av.FFmpegError, StopIteration) as error:
        raise ValueError("its pixels cannot be decoded") from error
    if frame.is_corrupt:
        raise ValueError("its pixels are damaged")
    image = _samples(frame)
    if transparent is not None and head.colour_type in (0, 2):
        key = np.frombuffer(transparent, ">u2")[: 1 if head.colour_type == 0 else 3]
        pixels = image.reshape(*image.shape[:2], -1)
        alpha = np.where((pixels == key).all(axis=2, keepdims=True), 0, 65535).astype(np.uint16)
        image = np.concatenate([pixels, alpha], axis=2)
    return image


def encode_16_bit(image: np.ndarray, file: BinaryIO, *, icc: bytes | None = None, exif: bytes | None = None) -> None:
    """Writes uint16 H×W or H×W×C (C = 1 … 4) as PNG, rows filtered by their left neighbours."""
    height, width = image.shape[:2]
    pixels = image.reshape(height, width, -1)
    channels = pixels.shape[2]
    file.write(SIGNATURE)
    file.write(_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, _COLOUR_TYPES[channels], 0, 0, 0)))
    if icc:
        file.write(_chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc)))
    if exif:
        file.write(_chunk(b"eXIf", exif.removeprefix(b"Exif\0\0")))
    compressor = zlib.compressobj(6)
    rows = max(1, _BLOCK // (2 * width * channels))
    for start in range(0, height, rows):
        block = pixels[start : start + rows].astype(">u2").view(np.uint8).reshape(-1, width, 2 * channels)
        filtered = np.empty((len(block), 1 + 2 * width * channels), np.uint8)
        filtered[:, 0] = 1  # filter "Sub"
        difference = filtered[:, 1:].reshape(block.shape)
        difference[:, 0] = block[:, 0]
        np.subtract(block[:, 1:], block[:, :-1], out=difference[:, 1:])
        if packed := compressor.compress(filtered.data):
            file.write(_chunk(b"IDAT", packed))
    file.write(_chunk(b"IDAT", compressor.flush()))
    file.write(_chunk(b"IEND", b""))


def _samples(frame) -> np.ndarray:
    name = frame.format.name
    if name == "ya16be":
        frame, channels = frame.reformat(format="rgba64be"), [0, 3]
    else:
        channels = None
    image = frame.to_ndarray().astype(np.uint16, copy=False)
    return image if channels is None else np.ascontiguousarray(image[:, :, channels])


def _exactly(data: bytes, start: int, length: int) -> bytes:
    part = data[start : start + length]
    if len(part) != length:
        raise ValueError("the file is cut off")
    return part


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
