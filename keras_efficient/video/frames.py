"""Frames of video files and of pictures: upright, 8 bits, 4:2:0, of even sides, one size in a clip."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from keras_efficient.errors import FileProblem, MissingDependency

__all__ = [
    "VIDEOS",
    "Appearance",
    "Video",
    "calibration",
    "opened",
    "packages",
    "rgb",
    "stream_of",
    "studio",
    "upright",
]

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".ts", ".webm")
PIX_FMT = "yuv420p"
MOST_VALUES = 40_000_000  # of calibration data


MATRICES = (1, 4, 5, 7)  # BT.709, FCC, BT.470 and BT.601, SMPTE 240M: those that swscale has under the same number
UNSPECIFIED = 2  # of FFmpeg's numbers for colours


@dataclass(frozen=True)
class Appearance:
    """What players and networks need to know to show frames as they were taken.

    Attributes:
        matrix, primaries, transfer: of colours, by FFmpeg's numbers (`AVCOL_SPC`, `AVCOL_PRI`, `AVCOL_TRC`).
        aspect: width of a pixel over its height.
    """

    matrix: int = UNSPECIFIED
    primaries: int = UNSPECIFIED
    transfer: int = UNSPECIFIED
    aspect: Fraction = Fraction(1)


@dataclass(frozen=True)
class Video:
    """The first video stream of a file.

    Attributes:
        path: the file.
        width, height: of upright frames, in pixels; odd sides lose their last column or row.
        rate: frames a second, on average.
        frames: how many the file says it has; 0 where it does not.
        appearance: of upright frames, for `RoiEncoder`.

    Raises:
        MissingDependency: PyAV is not installed.
        FileProblem: the file is missing, empty, damaged at its beginning, or has no video.
    """

    path: Path
    width: int
    height: int
    rate: Fraction
    frames: int
    appearance: Appearance = Appearance()

    @classmethod
    def open(cls, path: str | Path) -> Video:
        """Reads what the file says, and its first frame."""
        path = Path(path)
        with opened(path) as container:
            stream = stream_of(path, container)
            rate = stream.average_rate or stream.guessed_rate or Fraction(25)
            first = next(_decoded(path, container, stream), None)
            if first is None:
                raise FileProblem(path, "has no frame that can be decoded.")
            look = _appearance(stream.codec_context, is_turned=bool(_turns(first) % 2))
            first = upright(first)
            return cls(path, first.width, first.height, Fraction(rate), stream.frames or 0, look)

    def __iter__(self) -> Iterator[Any]:
        """The frames, `av.VideoFrame` in yuv420p, with the time stamps of the file.

        Raises:
            FileProblem: the file is damaged, cut off, or changes its size: the message says at which frame.
        """
        with opened(self.path) as container:
            decoded = _decoded(self.path, container, stream_of(self.path, container))
            for number, frame in enumerate(map(upright, decoded)):
                if (frame.width, frame.height) != (self.width, self.height):
                    sizes = f"{self.width}×{self.height} to {frame.width}×{frame.height}"
                    raise FileProblem(self.path, f"changes from {sizes} at frame {number}.", hint="Cut it there.")
                yield frame


def rgb(frame: Any) -> np.ndarray:
    """(h, w, 3) uint8 of an `av.VideoFrame`."""
    array: np.ndarray = frame.to_ndarray(format="rgb24")
    return array


def calibration(path: str | Path, size: tuple[int, int], *, limit: int = 96) -> np.ndarray:
    """Frames of a video as a camera model takes them, for `export.save(..., calibration=…)`.

    Args:
        path: of the video.
        size: (height, width) of what the model takes.
        limit: largest number of frames. They are spread over the video.

    Returns:
        (frames, height, width, 3), float32 from 0 to 255.

    Raises:
        FileProblem: the video cannot be read.
    """
    video, (height, width) = Video.open(path), size
    limit = max(1, min(limit, MOST_VALUES // (3 * height * width)))
    count = sum(1 for _ in video)
    wanted = set(np.linspace(0, count - 1, min(limit, count)).round().astype(int).tolist())
    area = packages().video.reformatter.Interpolation.AREA
    found = [
        frame.reformat(width, height, "rgb24", interpolation=area).to_ndarray()
        for number, frame in enumerate(video)
        if number in wanted
    ]
    return np.stack(found).astype(np.float32)


def opened(path: Path) -> Any:
    """PyAV's container of a file or a device, or a `FileProblem`."""
    av, device = packages(), path.is_char_device()
    if path.is_fifo():
        raise FileProblem(path, "is a pipe, which cannot be opened twice.", hint="Give a file, or a camera's device.")
    try:
        return av.open(str(path), format="v4l2" if device else None, metadata_errors="ignore")
    except FileNotFoundError as error:
        raise FileProblem(path, "no such file.") from error
    except (av.FFmpegError, OSError) as error:
        reason = "is empty." if path.is_file() and not path.stat().st_size else "is no video that can be read."
        if device:
            reason = f"cannot be read as a camera: {error.strerror}."
        raise FileProblem(path, reason) from error
    except ValueError as error:  # no such format
        hint = "PyAV's wheels for Linux have it."
        raise FileProblem(path, "cannot be read as a camera: this PyAV has no v4l2.", hint=hint) from error


def stream_of(path: Path, container: Any) -> Any:
    """The first video stream, or a `FileProblem`."""
    # A cover picture of a sound file is a video stream, too.
    streams = [s for s in container.streams.video if not s.disposition & packages().stream.Disposition.attached_pic]
    if not streams:
        raise FileProblem(path, "has no video stream.")
    streams[0].thread_type = "AUTO"
    streams[0].codec_context.options = {"err_detect": "explode"}  # else damaged pictures are made up without a word
    return streams[0]


def _decoded(path: Path, container: Any, stream: Any) -> Iterator[Any]:
    av, number, last = packages(), 0, Fraction(0)
    _check_size(path, stream)
    try:
        for packet in container.demux(stream):
            if packet.pts is not None:
                last = max(last, packet.pts * packet.time_base)
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise FileProblem(path, f"is damaged or cut off at frame {number}.")
                yield frame
                number += 1
    except av.FFmpegError as error:
        raise FileProblem(path, f"is damaged or cut off at frame {number} ({error.strerror}).") from error
    _check_end(path, stream, last, number)


def _check_size(path: Path, stream: Any) -> None:
    """An MP4 says at its beginning where each frame lies; FFmpeg gives those that are there without a word."""
    entries = getattr(stream, "index_entries", None) or ()
    end = max((entry.pos + entry.size for entry in entries), default=0)
    if path.is_file() and end > path.stat().st_size:
        raise FileProblem(path, f"is cut off: it has {path.stat().st_size} bytes of {end} or more.")


def _check_end(path: Path, stream: Any, last: Fraction, frames: int) -> None:
    """A Matroska file says how long a stream is; what does not, such as .ts, is taken as far as it goes."""
    told = stream.metadata.get("DURATION", "").split(":")
    try:
        hours, minutes, seconds = (float(part) for part in told)
    except ValueError:
        return
    missing = 3600 * hours + 60 * minutes + seconds - float(last)
    if missing > max(0.5, 5 / float(stream.average_rate or 25)):
        raise FileProblem(path, f"is cut off after {frames} frames: {missing:.1f} seconds are missing.")


def _appearance(context: Any, *, is_turned: bool) -> Appearance:
    aspect = Fraction(context.sample_aspect_ratio or 1) or Fraction(1)
    matrix, primaries, transfer = (
        int(getattr(context, name)) for name in ("colorspace", "color_primaries", "color_trc")
    )
    return Appearance(matrix, primaries, transfer, 1 / aspect if is_turned else aspect)


def _turns(frame: Any) -> int:
    """Quarters, against the clock, by which a frame is to be turned."""
    return round(frame.rotation / 90) % 4 if frame.rotation else 0


def upright(frame: Any) -> Any:
    """The frame as it is looked at, with even sides, in the one format of this package, in studio range."""
    width, height, turns = frame.width & ~1, frame.height & ~1, _turns(frame)
    if not turns and (width, height) == (frame.width, frame.height):
        return studio(frame)
    array = np.ascontiguousarray(np.rot90(rgb(frame)[:height, :width], turns))
    found = studio(packages().VideoFrame.from_ndarray(array, format="rgb24"), frame.colorspace)
    found.pts, found.time_base = frame.pts, frame.time_base
    return found


def studio(frame: Any, matrix: int = UNSPECIFIED) -> Any:
    """A frame in the one format of this package, in studio range; from RGB by a matrix (`AVCOL_SPC`)."""
    ranges = packages().video.reformatter.ColorRange
    is_full = frame.color_range == ranges.JPEG or frame.format.name.startswith("yuvj")
    if frame.format.name == PIX_FMT and not is_full:
        return frame
    return frame.reformat(
        format=PIX_FMT,
        dst_colorspace=matrix if frame.format.is_rgb and matrix in MATRICES else None,
        src_color_range=ranges.JPEG if is_full else None,
        dst_color_range=ranges.MPEG if is_full else None,
    )


def packages() -> Any:
    """PyAV.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        import av
        import av.filter
        import av.sidedata.sidedata
        import av.stream
        import av.video.frame
    except ImportError as error:
        raise MissingDependency("av", "Video", "video") from error
    return av
