"""A video file to one whose bits are where a server's network looks; sound and subtitles are copied."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_efficient.atomic import check_apart, check_target, replacing
from keras_efficient.errors import ConversionError, FileProblem, WrongArgument
from keras_efficient.video.camera import Camera
from keras_efficient.video.encoder import DECODERS, Packet
from keras_efficient.video.frames import Video, packages

if TYPE_CHECKING:
    import keras

__all__ = ["SUFFIXES", "EncodedFile", "encode_file"]

SUFFIXES = (".mkv", ".mov", ".mp4", ".ts")
_COPIED = ("audio", "subtitle")
_OF_FILE = (
    "album",
    "artist",
    "comment",
    "copyright",
    "creation_time",
    "date",
    "description",
    "genre",
    "location",
    "title",
)
_OF_STREAM = ("language", "title")


@dataclass(frozen=True)
class EncodedFile:
    """What `encode_file` wrote.

    Attributes:
        frames: how many.
        video_bytes: of the coded pictures.
        seconds: that they last.
    """

    frames: int
    video_bytes: int
    seconds: float


def encode_file(
    source: str | Path,
    target: str | Path,
    model: keras.Model | str | Path | None,
    *,
    size: int | None = None,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> EncodedFile:
    """Encodes the first video stream of a file by a `Camera`, with the times that its frames have.

    Frames come out upright, 8 bits, 4:2:0. The result appears whole or not at all, and is counted before that.

    Args:
        source: a video.
        target: .mp4, .mkv, .mov or .ts.
        model: of `Camera`.
        size: bytes that the coded pictures shall take; the video is read once more before that. It becomes a bitrate,
            which is kept within five per cent over some seconds and from some 50,000 bits a second on; `video_bytes`
            says what became of it.
        overwrite: replace what is at `target`.
        on_progress: called with (frames done, frames in all; 0 where the file does not say).
        options: of `Camera`: `base` or `bitrate`, `codec`, `preset`, `every`, `key_every`, and so on.

    Raises:
        MissingDependency: PyAV is not installed.
        FileProblem: the source cannot be read, or the target not be written.
        WrongArgument: a suffix that is not known, one file as both, a size besides a bitrate or that is too small,
            or what the camera refuses.
        ConversionError: the file does not hold what was written.
    """
    source, target = Path(source), Path(target)
    if target.suffix.lower() not in SUFFIXES:
        raise WrongArgument(f"{target} cannot be written.", hint=f"Known: {', '.join(SUFFIXES)}.")
    check_apart([source], [target])
    check_target(target, overwrite=overwrite)
    video = Video.open(source)
    if size is not None:
        options["bitrate"] = _bitrate(video, size, options)
    camera = Camera(model, video.width, video.height, video.rate, appearance=video.appearance, **options)
    times = _Times(video.rate)
    av = packages()
    with replacing(target, overwrite=overwrite) as temporary:
        try:
            with contextlib.ExitStack() as stack:
                writer = stack.enter_context(av.open(str(temporary), "w"))
                reader = stack.enter_context(av.open(str(source), metadata_errors="ignore"))
                copies = _Copies(reader, writer)
                written = _write(writer, _encoded(camera, video, times, on_progress), copies, times, camera)
        except av.FFmpegError as error:
            if isinstance(error, OSError):
                raise  # a full disk and the like
            reason = f"this kind of file cannot take it ({error.strerror})."
            raise FileProblem(target, reason, hint="Write an .mkv, which holds nearly everything.") from error
        _check(temporary, target, len(times.seen), copies.kinds)
    return EncodedFile(len(times.seen), written, float(times.of(len(times.seen)) - times.of(0)))


def _bitrate(video: Video, size: int, options: dict[str, Any]) -> int:
    """Bits a second of a whole video that shall have so many bytes."""
    if options.get("bitrate") is not None:
        raise WrongArgument("Give `size` or `bitrate`, not both.")
    if options.get("mode") == "exact":
        raise WrongArgument("`size` is for offset mode.")
    seconds = float(sum(1 for _ in video) / video.rate)
    if 8 * size < 1000 * seconds:
        raise WrongArgument(f"`size` must be at least 1000 bits a second, {round(125 * seconds)} bytes, not {size!r}.")
    return round(8 * size / seconds)


class _Times:
    """When frames are shown, in seconds; before the first and after the last as if at the mean rate."""

    def __init__(self, rate: Fraction):
        self.period = 1 / rate
        self.seen: list[Fraction] = []

    def add(self, frame: Any) -> None:
        known = frame.pts is not None and frame.time_base
        time = frame.pts * Fraction(frame.time_base) if known else self.of(len(self.seen))
        if self.seen and time <= self.seen[-1]:  # a damaged file's; muxers take only rising ones
            time = self.of(len(self.seen))
        self.seen.append(time)

    def of(self, number: int) -> Fraction:
        if 0 <= number < len(self.seen):
            return self.seen[number]
        if not self.seen:
            return number * self.period
        return self.seen[0] + number * self.period if number < 0 else self.seen[-1] + self.period


def _encoded(
    camera: Camera, video: Video, times: _Times, on_progress: Callable[[int, int], None] | None
) -> Iterator[Packet]:
    for count, frame in enumerate(video, 1):
        times.add(frame)
        yield from camera.encode(frame)
        if on_progress is not None:
            on_progress(count, max(video.frames, count) if video.frames else 0)
    yield from camera.flush()


def _write(writer: Any, packets: Iterator[Packet], copies: _Copies, times: _Times, camera: Camera) -> int:
    """Writes pictures and what is copied in the order of time; returns the bytes of the pictures."""
    av, clock = packages(), Fraction(1, 90_000)
    stream, size = None, 0
    for packet in packets:
        if stream is None:
            stream = _stream(writer, packet, camera)
        size += len(packet.data)
        coded = av.Packet(packet.data)
        coded.stream, coded.time_base, coded.is_keyframe = stream, clock, packet.is_key
        coded.pts, coded.dts = (round(times.of(number) / clock) for number in (packet.pts, packet.dts))
        copies.write(until=times.of(packet.dts))
        writer.mux(coded)
    copies.write()
    return size


def _stream(writer: Any, first: Packet, camera: Camera) -> Any:
    """A stream for packets that are coded already: FFmpeg reads from the first what the file has to say of them."""
    av = packages()
    name = DECODERS[camera.encoder.codec]
    with av.open(io.BytesIO(first.data), format=name) as described:
        stream = writer.add_stream_from_template(described.streams.video[0])
    stream.time_base = Fraction(1, 90_000)
    return stream


class _Copies:
    """The sound and the subtitles of a file."""

    def __init__(self, reader: Any, writer: Any):
        streams = [stream for stream in reader.streams if stream.type in _COPIED]
        self.kinds = [stream.type for stream in streams]
        self._targets = {stream.index: writer.add_stream_from_template(stream) for stream in streams}
        writer.metadata.update({key: value for key, value in reader.metadata.items() if key in _OF_FILE})
        for stream in streams:
            told = {key: value for key, value in stream.metadata.items() if key in _OF_STREAM}
            self._targets[stream.index].metadata.update(told)
        self._packets = reader.demux(streams) if streams else iter(())
        self._writer, self._next = writer, next(self._packets, None)

    def write(self, until: Fraction | None = None) -> None:
        while (packet := self._next) is not None:
            if packet.dts is not None:
                if until is not None and packet.dts * packet.time_base > until:
                    return
                packet.stream = self._targets[packet.stream.index]
                self._writer.mux(packet)
            self._next = next(self._packets, None)


def _check(path: Path, target: Path, frames: int, kinds: list[str]) -> None:
    """All frames are there, and what was copied is still what it was: an MPEG-TS takes any sound as data."""
    with packages().open(str(path)) as reader:
        found = sum(packet.size > 0 for packet in reader.demux(reader.streams.video[0]))
        left = list(kinds)
        for stream in reader.streams:
            if stream.type in left:
                left.remove(stream.type)
    if found != frames:
        raise ConversionError(f"{target} would hold {found} frames of {frames}.")
    if left:
        hint = "Write an .mkv, which holds nearly everything."
        raise FileProblem(target, f"this kind of file cannot take this {left[0]}.", hint=hint)
