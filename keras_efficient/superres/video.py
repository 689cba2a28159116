"""Upscaling of video files through PyAV: the pictures are made anew, sound and subtitles are copied.

A video stores luma and chroma apart, as super-resolution wants them, so frames never become RGB: luma goes through the
model, chroma through bicubic interpolation, in the range, matrix and subsampling that the file has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np

from keras_efficient.atomic import check_apart, check_target, replacing
from keras_efficient.errors import FileProblem, MissingDependency, WrongArgument
from keras_efficient.superres.resize import contributions, resample
from keras_efficient.superres.runner import Model, Progress, Runner, Tile, runner

__all__ = ["VIDEO_SUFFIXES", "encode_upscaled", "upscale_video"]

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".ts")

_PRESETS = tuple("ultrafast superfast veryfast faster fast medium slow slower veryslow placebo".split())  # noqa: SIM905
_COPIED = ("audio", "subtitle", "attachment")
_BT601, _LIMITED, _FULL = 6, 1, 2  # numbers of ITU-T H.273 and of FFmpeg's colour ranges


@dataclass(frozen=True)
class _Looks:
    """What is known of a video's frames before the first is upscaled."""

    width: int
    height: int
    pix_fmt: str  # of the result
    needs_conversion: bool
    is_centred: bool  # chroma lies amid the luma pixels that share it, as in JPEG, not under the left ones
    colour_range: int
    colourspace: int
    primaries: int
    transfer: int
    display_matrix: tuple[int, ...] | None


def upscale_video(
    source: str | Path,
    target: str | Path,
    model: Model,
    *,
    scale: int | None = None,
    tile: Tile = "auto",
    halo: int | None = None,
    crf: float = 18,
    preset: str = "medium",
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> int:
    """Upscales the first video stream of a file and encodes it as H.264; sound and subtitles are copied as they are.

    Kept: time stamps (variable frame rates too), rotation, aspect ratio of the pixels, colour range and matrix, bit
    depth (8 or 10), chroma subsampling (where it allows the new size), chapters, titles and languages. Not kept: the
    alpha of pictures, and the mastering data of HDR. The result appears whole or not at all.

    Args:
        source: a video.
        target: .mp4, .mkv, .mov, …; Matroska holds nearly everything.
        model, scale, tile, halo: see `upscale`; the model takes Y.
        crf: quality of the encoder: 0 lossless, 18 hardly to be told from that, 23 usual, 51 worst.
        preset: effort of the encoder, "ultrafast" … "veryslow".
        overwrite: replace what is at `target`.
        on_progress: called with (frames done, frames in all; 0 where the file does not say).

    Returns:
        The number of frames.

    Raises:
        MissingDependency: PyAV is not installed.
        FileProblem: the source is missing, damaged, interlaced or has no video; the target exists already, cannot be
            written, or cannot hold one of the streams.
        WrongArgument: a suffix or preset that is not known, a model that does not fit, or one file as source and
            target.
    """
    source, target = Path(source), Path(target)
    _av()
    _check(source, target, crf, preset, overwrite)
    run = runner(model, scale=scale, tile=tile, halo=halo)
    return encode_upscaled(source, target, run, crf=crf, preset=preset, overwrite=overwrite, on_progress=on_progress)


def encode_upscaled(
    source: Path,
    target: Path,
    run: Runner,
    *,
    crf: float = 18,
    preset: str = "medium",
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> int:
    """`upscale_video` by a model that `runner` made ready."""
    av = _av()
    _check(source, target, crf, preset, overwrite)
    if run.channels != 1:
        raise WrongArgument("Video is upscaled by models that take Y (1 channel), not RGB.")
    looks = _looks(av, source, run.scale)
    # Only in 8 bits is the encoder's own crf 0 lossless.
    options = {"preset": preset, **({"qp": "0"} if crf == 0 else {"crf": str(crf)})}
    with replacing(target, overwrite=overwrite) as temporary:
        try:
            with av.open(str(source)) as reader, av.open(str(temporary), "w") as writer:
                return _copy_and_upscale(av, source, reader, writer, run, looks, options, on_progress)
        except av.FFmpegError as error:
            if isinstance(error, OSError):
                raise  # a full disk and the like
            reason = f"the encoder, or this kind of file, cannot take it ({error.strerror})."
            raise FileProblem(target, reason, hint="Write an .mkv, which holds nearly everything.") from error


def _check(source: Path, target: Path, crf: float, preset: str, overwrite: bool) -> None:
    if target.suffix.lower() not in VIDEO_SUFFIXES:
        raise WrongArgument(
            f"{target}: video cannot be written as {target.suffix!r}.", hint=f"Known: {', '.join(VIDEO_SUFFIXES)}."
        )
    if preset not in _PRESETS or not 0 <= crf <= 51:
        raise WrongArgument(
            f"The encoder has no preset {preset!r} with crf {crf}.",
            hint=f"Presets: {', '.join(_PRESETS)}; crf from 0 (lossless) to 51.",
        )
    check_apart([source], [target])
    check_target(target, overwrite=overwrite)


def _copy_and_upscale(av, source, reader, writer, run, looks, options, on_progress) -> int:
    video = reader.streams.video[0]
    encoder = _encoder(writer, video, run.scale, looks, options)
    copies = {}
    for stream in reader.streams:
        if stream.type in _COPIED:
            copies[stream.index] = _copied_stream(source, writer, stream)
    writer.metadata.update(reader.metadata)
    writer.set_chapters(reader.chapters())
    frames = _FrameUpscaler(run, looks)
    total = video.frames or (round(video.duration * video.time_base * video.average_rate) if video.duration else 0)
    done = 0
    for packet in _packets(av, source, reader, [video.index, *copies]):
        if packet.stream.index != video.index:
            if packet.dts is not None:
                packet.stream = copies[packet.stream.index]
                writer.mux(packet)
            continue
        for frame in _decoded(av, source, packet, done):
            writer.mux(encoder.encode(frames(frame)))
            done += 1
            if on_progress is not None:
                on_progress(done, max(total, done) if total else 0)
    writer.mux(encoder.encode(None))
    return done


def _looks(av, source: Path, scale: int) -> _Looks:
    """Reads the first frame, and refuses what cannot be upscaled."""
    if not source.is_file():
        raise FileProblem(source, "no such file.")
    if source.stat().st_size == 0:
        raise FileProblem(source, "is empty (0 bytes).")
    try:
        with av.open(str(source)) as reader:
            if not reader.streams.video:
                raise FileProblem(source, "holds no video.")
            frame = next(reader.decode(video=0))
            if frame.interlaced_frame:
                raise FileProblem(source, "is interlaced.", hint="Deinterlace it first.")
            return _looks_of(frame, scale, is_jpeg=reader.streams.video[0].codec_context.name == "mjpeg")
    except av.FFmpegError as error:
        raise FileProblem(source, f"is no video, or damaged ({error.strerror}).") from error
    except StopIteration as error:
        raise FileProblem(source, "holds no frame of video.") from error


def _looks_of(frame, scale: int, *, is_jpeg: bool) -> _Looks:
    name = frame.format.name
    is_yuv = name.startswith(("yuv4", "yuvj4", "nv12", "p010"))
    wide, high = 1, 1
    depth = 8
    if is_yuv:
        components = frame.format.components
        depth = 10 if components[0].bits > 8 else 8
        wide = round(frame.width / components[1].width) if frame.width > 1 else 1
        high = round(frame.height / components[1].height) if frame.height > 1 else 1
    # H.264 takes whole chroma samples only; a size that has none keeps all of its colour.
    if (scale * frame.width) % wide or (scale * frame.height) % high:
        wide, high = 1, 1
    sampling = {(1, 1): "444", (2, 1): "422", (2, 2): "420"}.get((wide, high), "444")
    pix_fmt = f"yuv{sampling}p" + ("10le" if depth == 10 else "")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        matrix = [int(entry) for entry in np.frombuffer(bytes(matrix), np.int32)]
        matrix[6:8] = [scale * entry for entry in matrix[6:8]]  # shifts, in pixels
    is_gray = name.startswith("gray")
    is_full = name.startswith("yuvj") or (frame.color_range == _FULL and is_yuv)
    return _Looks(
        width=frame.width,
        height=frame.height,
        pix_fmt=pix_fmt,
        needs_conversion=name.replace("yuvj", "yuv") != pix_fmt,
        is_centred=is_jpeg,
        colour_range=_FULL if is_full else _LIMITED,
        colourspace=int(frame.colorspace) if is_yuv or is_gray else _BT601,
        primaries=int(frame.color_primaries),
        transfer=int(frame.color_trc),
        display_matrix=None if matrix is None else tuple(matrix),
    )


def _encoder(writer, video, scale: int, looks: _Looks, options: dict[str, str]):
    rate = video.average_rate or video.guessed_rate or Fraction(25)
    stream = writer.add_stream("libx264", rate=rate, options=options)
    stream.width, stream.height, stream.pix_fmt = scale * looks.width, scale * looks.height, looks.pix_fmt
    context = stream.codec_context
    context.time_base = video.time_base
    context.color_range, context.colorspace = looks.colour_range, looks.colourspace
    context.color_primaries, context.color_trc = looks.primaries, looks.transfer
    if video.sample_aspect_ratio:
        context.sample_aspect_ratio = video.sample_aspect_ratio
    if looks.display_matrix is not None:
        stream.set_display_matrix(looks.display_matrix)
    stream.metadata.update({k: v for k, v in video.metadata.items() if k.lower() not in ("rotate", "encoder")})
    return stream


def _copied_stream(source: Path, writer, stream):
    try:
        copy = writer.add_stream_from_template(stream)
    except ValueError as error:
        raise FileProblem(
            source,
            f"its stream {stream.index} ({stream.type}) cannot be put into {writer.format.name}.",
            hint="Write an .mkv, which holds nearly everything.",
        ) from error
    copy.metadata.update(stream.metadata)
    copy.disposition = stream.disposition
    return copy


def _packets(av: ModuleType, source: Path, reader, indices: list[int]) -> Iterator:
    try:
        yield from reader.demux(*(reader.streams[index] for index in indices))
    except av.error.InvalidDataError as error:
        raise FileProblem(source, f"is damaged ({error.strerror}).") from error


def _decoded(av: ModuleType, source: Path, packet, done: int) -> list:
    try:
        return packet.decode()
    except av.FFmpegError as error:
        raise FileProblem(source, f"is damaged after frame {done} ({error.strerror}).") from error


class _FrameUpscaler:
    """Frame in, larger frame out, of one size and format."""

    def __init__(self, run: Runner, looks: _Looks):
        self._run, self._looks = run, looks
        self._taps: dict[tuple[int, int, bool], tuple] = {}

    def __call__(self, frame):
        looks, scale = self._looks, self._run.scale
        if (frame.width, frame.height) != (looks.width, looks.height):
            raise FileProblem(
                "video", f"its frames change size, from {looks.width}×{looks.height} to {frame.width}×{frame.height}."
            )
        large = type(frame)(scale * looks.width, scale * looks.height, looks.pix_fmt)
        source = frame.reformat(format=looks.pix_fmt, dst_colorspace="DEFAULT") if looks.needs_conversion else frame
        peak = 1023 if looks.pix_fmt.endswith("10le") else 255
        unit = np.float32(1020 if peak == 1023 else 255)  # ten bits are four times eight bits
        small = [_view(plane, peak) for plane in source.planes[:3]]
        luma = self._run((small[0].astype(np.float32) / unit)[None, :, :, None])[0, :, :, 0]
        targets = [_view(plane, peak) for plane in large.planes[:3]]
        _store(luma * unit, targets[0], peak)
        for plane, target in zip(small[1:], targets[1:], strict=True):
            _store(self._chroma(plane.astype(np.float32), target.shape), target, peak)
        large.pts, large.time_base = frame.pts, frame.time_base
        large.color_range, large.colorspace = looks.colour_range, looks.colourspace
        return large

    def _chroma(self, plane: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        subsampled = plane.shape[1] < self._looks.width and not self._looks.is_centred
        rows = self._contributions(plane.shape[0], shape[0], False)
        columns = self._contributions(plane.shape[1], shape[1], subsampled)
        return resample(resample(plane, *rows, axis=0), *columns, axis=1)

    def _contributions(self, length: int, out_length: int, is_left: bool):
        """Chroma that lies under the left one of two luma pixels does so again in the larger picture."""
        key = (length, out_length, is_left)
        if key not in self._taps:
            scale = self._run.scale
            shift = 0.25 - 0.25 / scale if is_left else 0.0
            self._taps[key] = contributions(length, out_length, scale, shift=shift)
        return self._taps[key]


def _view(plane, peak: int) -> np.ndarray:
    """The samples of a plane, without the padding of its rows."""
    samples = np.frombuffer(plane, np.uint8 if peak == 255 else np.dtype("<u2"))
    return samples.reshape(plane.height, -1)[:, : plane.width]


def _store(values: np.ndarray, target: np.ndarray, peak: int) -> None:
    values += np.float32(0.5)
    np.clip(values, 0, peak, out=values)
    target[...] = values


def _av() -> ModuleType:
    try:
        import av
        import av.error
    except ImportError as error:
        raise MissingDependency("av", "Upscaling video", "video") from error
    return av
