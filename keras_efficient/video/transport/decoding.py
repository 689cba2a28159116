"""Chunks to frames, with a decoder that lives as long as a group of pictures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from keras_efficient.errors import BadChunk
from keras_efficient.video.encoder import DECODERS, Packet
from keras_efficient.video.frames import packages
from keras_efficient.video.transport.chunks import Chunk

__all__ = ["GroupDecoder"]


class GroupDecoder:
    """A camera's decoder.

    A decoder holds frames back where they are shown in another order than they are coded: they come out with one of the
    next chunks of the group, the rest with its last. So the frames of each chunk are the same whenever a group is
    decoded from its beginning on.

    Attributes:
        missing: once a group has ended, how many of its packets gave no frame: decoders drop without a word what
            needs a picture from before the group.
    """

    def __init__(self) -> None:
        self.missing = 0
        self._held = 0  # packets taken, less frames given
        self._context: Any = None
        self._kind: tuple[Any, ...] = ()
        self._last = 0

    def frames(self, chunk: Chunk) -> Iterator[Any]:
        """The frames that come out with a chunk.

        Raises:
            BadChunk: it does not continue its group, or cannot be decoded; the group is over then.
        """
        av, kind = packages(), (chunk.codec, chunk.width, chunk.height, chunk.fps)
        context, before = self._context, self._last
        self._context, self.missing = None, 0  # unless all goes well
        if chunk.begins:
            self._kind, self._held = kind, 0
            context = self._open(chunk)
        elif context is None or chunk.sequence != before + 1:
            raise BadChunk(f"Chunk {chunk.sequence} is in a group whose beginning did not come.")
        elif kind != self._kind:
            raise BadChunk(f"Chunk {chunk.sequence} changes the size, codec or rate of frames within a group.")
        self._held += len(chunk.packets)
        try:
            for packet in [*map(_coded, chunk.packets), *[None] * chunk.ends]:  # None asks for what is held back
                for frame in context.decode(packet):
                    self._held -= 1
                    yield _checked(frame, chunk)
        except (av.FFmpegError, ValueError) as error:
            if isinstance(error, BadChunk):
                raise
            raise BadChunk(f"Chunk {chunk.sequence} cannot be decoded.") from error
        self._context, self._last = None if chunk.ends else context, chunk.sequence
        self.missing = max(self._held, 0) if chunk.ends else 0

    def _open(self, chunk: Chunk) -> Any:
        context = packages().CodecContext.create(DECODERS[chunk.codec], "r")
        context.thread_count = 1  # threads would hold frames back, and there are many cameras
        most = (chunk.width + 128) * (chunk.height + 128)  # what the stream itself says is not believed beyond that
        context.options = {"err_detect": "explode", "max_pixels": str(most)}
        return context


def _coded(packet: Packet) -> Any:
    coded = packages().Packet(packet.data)
    coded.pts, coded.dts = packet.pts, packet.dts
    return coded


def _checked(frame: Any, chunk: Chunk) -> Any:
    if (frame.width, frame.height) != (chunk.width, chunk.height):
        found, told = f"{frame.width}×{frame.height}", f"{chunk.width}×{chunk.height}"
        raise BadChunk(f"Chunk {chunk.sequence} has frames of {found}, and says {told}.")
    if frame.is_corrupt or frame.pts is None:
        raise BadChunk(f"Chunk {chunk.sequence} is damaged inside.")
    return frame
