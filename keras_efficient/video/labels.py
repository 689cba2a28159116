"""What a camera model is trained on: frames, and what each of their macroblocks is worth to a server."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keras_efficient.atomic import replacing
from keras_efficient.errors import FileProblem, WrongArgument
from keras_efficient.macroblocks import grid
from keras_efficient.video.encoder import Packet, RoiEncoder, decoded
from keras_efficient.video.found import sureness
from keras_efficient.video.frames import VIDEOS, Video, opened, packages, rgb, stream_of, upright
from keras_efficient.video.gradient import accuracy_gradient
from keras_efficient.video.servers import Server

__all__ = ["Coding", "Labels", "clips_of", "labels_of"]

PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
TOGETHER = 4  # frames of one gradient
PIECE = 16  # frames of a video that are coded together where there is no time for all of it
JUMPS = (0, 4, 16, 64)  # seconds before a piece, at which decoding is tried
DAMAGED = (EOFError, KeyError, OSError, ValueError, zipfile.BadZipFile)  # what NumPy says of a damaged file
NOTHING = 0.02  # worth of a macroblock in which nothing is found


@dataclass(frozen=True)
class Coding:
    """How labels are made: how frames are coded for them, and how much of a gradient counts.

    Attributes:
        label: what a macroblock is worth: `"gradient"`, that of the server's accuracy, or `"found"`: how surely the
            server finds something there, in the clip as it is; of what follows that heeds `every` and `average` alone.
            For detectors it is the better one: what is in a box needs its bits, wherever in it the gradient is.
        high: QP of the good frames.
        low: QPs of the bad ones, which take turns.
        every: so many frames of a video lie from one labelled frame to the next.
        preset: of libx264.
        weight: of `accuracy_gradient`. `"difference"` has in it how badly a macroblock was coded; `"none"` only how
            much the server heeds it, and the encoder's own adaptive quantisation has to know the rest.
        each: of `accuracy_gradient`.
        average: over so many neighbouring labelled frames, and with them over the qualities `low`.
    """

    label: str = "gradient"
    high: int = 30
    low: tuple[int, ...] = (36, 40, 44)
    every: int = 2
    preset: str = "veryfast"
    weight: str = "difference"
    each: bool = False
    average: int = 1

    def __post_init__(self) -> None:
        if self.label not in ("gradient", "found"):
            raise WrongArgument(f'`label` must be "gradient" or "found", not {self.label!r}.')
        if not self.low or not 0 < self.high < min(self.low) or max(self.low) > 51 or min(self.every, self.average) < 1:
            raise WrongArgument(f"Frames cannot be coded so: {self}.", hint="QPs: 0 < high < low <= 51.")


@dataclass(frozen=True, eq=False)
class Labels:
    """Some frames of one clip.

    Attributes:
        frames: (n, h, w, 3) uint8, as the camera sees them.
        gains: (n, ⌈H/16⌉, ⌈W/16⌉) float32, of the clip's own size H × W, which may be larger than that of `frames`.
        size: (H, W).
    """

    frames: np.ndarray
    gains: np.ndarray
    size: tuple[int, int]


def clips_of(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """The videos and pictures of a source: files, and what lies in folders, by name.

    Raises:
        FileProblem: there is none, or one that does not exist.
    """
    paths = [Path(path) for path in ([source] if isinstance(source, (str, Path)) else source)]
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileProblem(path, "no such file or folder.")
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found += [one for one in inside if one.suffix.lower() in PICTURES + VIDEOS]
    if not found:
        raise FileProblem(paths[0] if paths else "source", "holds no video and no picture.")
    return found


def labels_of(
    server: Server,
    path: Path,
    coding: Coding,
    *,
    size: tuple[int, int] | None = None,
    frame_size: tuple[int, int] | None = None,
    folder: Path | None = None,
    name: str = "",
    deadline: float | None = None,
) -> Labels:
    """Codes a video, or a picture, well and badly, and asks the server what each macroblock is worth.

    Args:
        server: what looks at frames.
        path: of the clip.
        coding: the qualities.
        size: (height, width) to which the kept frames are shrunk; `None`: as they are.
        frame_size: (height, width) to which a picture is scaled before it is coded, and cut where its sides are of
            another ratio, since each size costs a gradient that is compiled for it. `None`: as it is, as videos are.
        folder: where labels are kept; those that are there are not made again.
        name: of the server, which tells its labels from another's.
        deadline: of `time.monotonic()`: short pieces from all over a video are coded and labelled until then, one at
            least. `None`: all of it, coded as a whole.

    Raises:
        FileProblem: the clip, or what is kept of it, cannot be read; or its frames cannot be coded.
    """
    video = Video.open(path)  # FFmpeg reads a picture as a video of one frame
    is_picture = path.suffix.lower() in PICTURES
    scaled = (frame_size[0] & ~1, frame_size[1] & ~1) if is_picture and frame_size is not None else None
    clip_size = scaled or (video.height, video.width)
    kept = None if folder is None else folder / f"{_key(path, coding, size, name, scaled)}.npz"
    if kept is not None and kept.exists():
        return _read(kept, clip_size)
    pieces: dict[float, Labels] = {}
    for start in [] if deadline is None or is_picture else _starts(video, coding.every):
        if pieces and deadline is not None and time.monotonic() >= deadline:
            break
        part = None if kept is None else kept.with_stem(f"{kept.stem}-{start:.2f}")
        if part is not None and part.exists():
            pieces[start] = _read(part, clip_size)
        elif piece := _piece(video, start):
            # Counted from the last one: the first is coded by itself, as hardly any of a camera's frames is.
            wanted = range((len(piece) - 1) % coding.every, len(piece), coding.every)
            pieces[start] = _made(server, video, piece, wanted, clip_size, coding, size)
            _write(part, pieces[start])
    if pieces:
        parts = [pieces[start] for start in sorted(pieces)]
        frames, gains = (np.concatenate([getattr(one, kind) for one in parts]) for kind in ("frames", "gains"))
        return Labels(frames, gains, clip_size)
    source = [_fitted(frame, scaled) for frame in video] if scaled is not None else video
    whole = _made(server, video, source, None, clip_size, coding, size)
    _write(kept, whole)
    return whole


def _made(
    server: Server,
    video: Video,
    source: Iterable[Any],
    wanted: range | None,
    clip_size: tuple[int, int],
    coding: Coding,
    size: tuple[int, int] | None,
) -> Labels:
    """Of the `wanted` frames of a source, which is read twice; by default of one in `every`, from the first on."""
    if coding.label == "found":
        return _found(server, source, wanted, clip_size, coding, size)
    try:
        encoders = [_encoder(video, clip_size, qp, coding.preset) for qp in (coding.high, *coding.low)]
    except WrongArgument as error:
        raise FileProblem(video.path, f"cannot be coded: {error.message}") from error
    streams: list[list[Packet]] = [[] for _ in encoders]
    count = 0
    for frame in source:  # in two passes: packets are small, and frames are not
        for encoder, packets in zip(encoders, streams, strict=True):
            packets += encoder.encode(frame)
        count += 1
    for encoder, packets in zip(encoders, streams, strict=True):
        packets += encoder.flush()
    wanted = range(0, count, coding.every) if wanted is None else wanted
    frames: list[np.ndarray] = []
    gains: list[np.ndarray] = []
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    all_of_them = zip(source, *(decoded(packets) for packets in streams), strict=True)
    for number, (frame, high, *lows) in enumerate(all_of_them):
        if number not in wanted:
            continue
        low = lows[len(frames) % len(lows)]
        frames.append(_shrunk(frame, size))
        waiting.append((rgb(high), rgb(low)))
        if len(waiting) == TOGETHER or len(frames) == len(wanted):
            both = [np.stack(some) for some in zip(*waiting, strict=True)]
            gains.append(accuracy_gradient(server, *both, weight=coding.weight, each=coding.each))
            waiting.clear()
    found = _averaged(np.concatenate(gains), coding.average).astype(np.float32)
    return Labels(np.stack(frames), found, clip_size)


def _starts(video: Video, every: int) -> list[float]:
    """Seconds at which the pieces of a video begin, in such an order that at any time they are from all over it."""
    with opened(video.path) as container:
        stream = stream_of(video.path, container)
        begin = float((stream.start_time or 0) * stream.time_base)
        if stream.duration:
            length = float(stream.duration * stream.time_base)
        elif container.duration:
            length = container.duration / packages().time_base
        else:  # as of a recording whose end was not written
            stamps = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
            length = float(max(stamps, default=0) * stream.time_base) - begin
    step = max(PIECE, every) / float(video.rate)
    count = max(1, math.ceil(length / step))
    bits = (count - 1).bit_length()
    return [begin + step * index for index in sorted(range(count), key=lambda index: f"{index:0{bits}b}"[::-1])]


def _piece(video: Video, start: float) -> list[Any]:
    """Frames from some second on; fewer, or none, at the end of a video and where its time stamps leap."""
    half = 0.5 / float(video.rate)
    frames: Iterator[Any] = iter(())
    with opened(video.path) as container:
        stream = stream_of(video.path, container)
        stream.codec_context.options = {}  # behind a jump a reference may be missing, which is no damage
        for back in JUMPS:
            try:
                container.seek(max(0, math.floor((start - back) / stream.time_base)), stream=stream)
                frames = (frame for frame in container.decode(stream) if frame.time is not None)
                first = next(frames, None)
            except packages().FFmpegError:
                continue
            # Some files do not say where their key frames are: decoding then begins at the next one, which is too late.
            if first is not None:
                frames = itertools.chain([first], frames)
                if first.time < start + half:
                    break
        found: list[Any] = []
        try:
            for frame in frames:
                if frame.time >= start + (2 * PIECE - 1) * half or len(found) == PIECE:
                    break
                if frame.time >= start - half and not frame.is_corrupt:
                    found.append(upright(frame))
        except packages().FFmpegError as error:
            raise FileProblem(video.path, f"is damaged at second {start:.0f} ({error.strerror}).") from error
    if any((frame.width, frame.height) != (video.width, video.height) for frame in found):
        raise FileProblem(video.path, f"changes its size at second {start:.0f}.", hint="Cut it there.")
    return found


def _fitted(frame: Any, size: tuple[int, int]) -> Any:
    """A frame scaled to (height, width); of what then is too wide or too high, the middle."""
    array = rgb(frame)
    ratio = max(want / have for want, have in zip(size, array.shape[:2], strict=True))
    rows, columns = (min(have, round(want / ratio)) for want, have in zip(size, array.shape[:2], strict=True))
    top, left = (array.shape[0] - rows) // 2, (array.shape[1] - columns) // 2
    cut = np.ascontiguousarray(array[top : top + rows, left : left + columns])
    whole = packages().VideoFrame.from_ndarray(cut, format="rgb24")
    return whole.reformat(size[1], size[0], "yuv420p", interpolation="BICUBIC")


def _found(
    server: Server,
    source: Iterable[Any],
    wanted: range | None,
    clip_size: tuple[int, int],
    coding: Coding,
    size: tuple[int, int] | None,
) -> Labels:
    """As `_made`, of what the server finds; frames are not coded."""
    frames: list[np.ndarray] = []
    gains: list[np.ndarray] = []
    for number, frame in enumerate(source):
        if number % coding.every == 0 if wanted is None else number in wanted:
            (found,) = server.predict(rgb(frame)[None])
            frames.append(_shrunk(frame, size))
            gains.append(NOTHING + sureness(found, *clip_size))
    return Labels(np.stack(frames), _averaged(np.stack(gains), coding.average).astype(np.float32), clip_size)


def _averaged(gains: np.ndarray, count: int) -> np.ndarray:
    """The mean over the `count` nearest frames, fewer at the ends."""
    starts = np.maximum(np.arange(len(gains)) - (count - 1) // 2, 0)
    ends = np.minimum(np.arange(len(gains)) + count // 2 + 1, len(gains))
    return np.stack([gains[start:end].mean(axis=0) for start, end in zip(starts, ends, strict=True)])


def _encoder(video: Video, size: tuple[int, int], qp: int, preset: str) -> RoiEncoder:
    return RoiEncoder(size[1], size[0], video.rate, mode="exact", base=qp, preset=preset)


def _shrunk(frame: Any, size: tuple[int, int] | None) -> np.ndarray:
    if size is None or size == (frame.height, frame.width):
        return rgb(frame)
    # Of colours in full: shrunk in 4:2:0, a camera's small frame would have hardly any.
    whole = packages().VideoFrame.from_ndarray(rgb(frame), format="rgb24")
    array: np.ndarray = whole.reformat(width=size[1], height=size[0], interpolation="AREA").to_ndarray()
    return array


def _key(path: Path, coding: Coding, size: tuple[int, int] | None, name: str, scaled: tuple[int, int] | None) -> str:
    """What labels hang on: the file's contents, how it is scaled and coded, and who looks."""
    digest = hashlib.sha256(json.dumps([str(coding), size, name, scaled]).encode())
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()[:32]


def _write(path: Path | None, labels: Labels) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, overwrite=True) as temporary, temporary.open("wb") as file:
        np.savez(file, frames=labels.frames, gains=labels.gains)


def _read(path: Path, size: tuple[int, int]) -> Labels:
    try:
        with np.load(path, allow_pickle=False) as file:
            frames, gains = file["frames"], file["gains"]
    except DAMAGED as error:
        raise FileProblem(path, "is damaged.", hint="Remove it: it will be made again.") from error
    fits = frames.ndim == 4 and frames.dtype == np.uint8 and gains.ndim == 3 and gains.dtype == np.float32
    if not fits or gains.shape != (len(frames), *grid(*size)) or not np.isfinite(gains).all():
        raise FileProblem(path, "holds no labels.", hint="Remove it: it will be made again.")
    return Labels(frames, gains, size)
