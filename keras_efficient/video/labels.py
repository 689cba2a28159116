"""What a camera model is trained on: frames, and what each of their macroblocks is worth to a server."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keras_efficient.atomic import replacing
from keras_efficient.errors import FileProblem, WrongArgument
from keras_efficient.macroblocks import grid
from keras_efficient.video.encoder import Packet, RoiEncoder, decoded
from keras_efficient.video.found import sureness
from keras_efficient.video.frames import VIDEOS, Video, packages, rgb
from keras_efficient.video.gradient import accuracy_gradient
from keras_efficient.video.servers import Server

__all__ = ["Coding", "Labels", "clips_of", "labels_of"]

PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
TOGETHER = 4  # frames of one gradient
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
    folder: Path | None = None,
    name: str = "",
    most: int | None = None,
    on_frames: Callable[[int], None] = lambda count: None,
) -> Labels:
    """Codes a video, or a picture, well and badly, and asks the server what each macroblock is worth.

    Args:
        server: what looks at frames.
        path: of the clip.
        coding: the qualities.
        size: (height, width) to which the kept frames are shrunk; `None`: as they are.
        folder: where labels are kept; those that are there are not made again.
        name: of the server, which tells its labels from another's.
        most: labelled frames, spread over the clip.
        on_frames: called with the number of labelled frames.

    Raises:
        FileProblem: the clip cannot be read.
    """
    video = Video.open(path)  # FFmpeg reads a picture as a video of one frame
    kept = None if folder is None else folder / f"{_key(path, coding, size, name, most)}.npz"
    if kept is not None and kept.exists():
        return _read(kept, (video.height, video.width))
    made = _made(server, video, coding, size, most, on_frames)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept, overwrite=True) as temporary, temporary.open("wb") as file:
            np.savez(file, frames=made.frames, gains=made.gains)
    return made


def _made(
    server: Server,
    video: Video,
    coding: Coding,
    size: tuple[int, int] | None,
    most: int | None,
    on_frames: Callable[[int], None],
) -> Labels:
    if coding.label == "found":
        return _found(server, video, coding, size, most, on_frames)
    encoders = [_encoder(video, qp, coding.preset) for qp in (coding.high, *coding.low)]
    streams: list[list[Packet]] = [[] for _ in encoders]
    count = 0
    for frame in video:  # in two passes: packets are small, and frames are not
        for encoder, packets in zip(encoders, streams, strict=True):
            packets += encoder.encode(frame)
        count += 1
    for encoder, packets in zip(encoders, streams, strict=True):
        packets += encoder.flush()
    wanted = np.arange(0, count, coding.every)
    if most is not None and len(wanted) > most:
        wanted = wanted[np.linspace(0, len(wanted) - 1, most).round().astype(int)]
    frames: list[np.ndarray] = []
    gains: list[np.ndarray] = []
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    all_of_them = zip(video, *(decoded(packets) for packets in streams), strict=True)
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
            on_frames(len(frames))
    found = _averaged(np.concatenate(gains), coding.average).astype(np.float32)
    return Labels(np.stack(frames), found, (video.height, video.width))


def _found(
    server: Server,
    video: Video,
    coding: Coding,
    size: tuple[int, int] | None,
    most: int | None,
    on_frames: Callable[[int], None],
) -> Labels:
    frames: list[np.ndarray] = []
    gains: list[np.ndarray] = []
    for number, frame in enumerate(video):
        if number % coding.every == 0:
            (found,) = server.predict(rgb(frame)[None])
            frames.append(_shrunk(frame, size))
            gains.append(NOTHING + sureness(found, video.height, video.width))
            on_frames(len(frames))
    chosen = np.linspace(0, len(frames) - 1, min(most or len(frames), len(frames))).round().astype(int)
    averaged = _averaged(np.stack(gains), coding.average).astype(np.float32)
    return Labels(np.stack([frames[number] for number in chosen]), averaged[chosen], (video.height, video.width))


def _averaged(gains: np.ndarray, count: int) -> np.ndarray:
    """The mean over the `count` nearest frames, fewer at the ends."""
    starts = np.maximum(np.arange(len(gains)) - (count - 1) // 2, 0)
    ends = np.minimum(np.arange(len(gains)) + count // 2 + 1, len(gains))
    return np.stack([gains[start:end].mean(axis=0) for start, end in zip(starts, ends, strict=True)])


def _encoder(video: Video, qp: int, preset: str) -> RoiEncoder:
    return RoiEncoder(video.width, video.height, video.rate, mode="exact", base=qp, preset=preset)


def _shrunk(frame: Any, size: tuple[int, int] | None) -> np.ndarray:
    if size is None or size == (frame.height, frame.width):
        return rgb(frame)
    # Of colours in full: shrunk in 4:2:0, a camera's small frame would have hardly any.
    whole = packages().VideoFrame.from_ndarray(rgb(frame), format="rgb24")
    array: np.ndarray = whole.reformat(width=size[1], height=size[0], interpolation="AREA").to_ndarray()
    return array


def _key(path: Path, coding: Coding, size: tuple[int, int] | None, name: str, most: int | None) -> str:
    """What labels hang on: the file's contents, how it is coded, and who looks."""
    digest = hashlib.sha256(json.dumps([str(coding), size, name, most]).encode())
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()[:32]


def _read(path: Path, size: tuple[int, int]) -> Labels:
    try:
        with np.load(path, allow_pickle=False) as file:
            frames, gains = file["frames"], file["gains"]
    except (OSError, ValueError, KeyError) as error:
        raise FileProblem(path, "is damaged.", hint="Remove it: it will be made again.") from error
    fits = frames.ndim == 4 and frames.dtype == np.uint8 and gains.ndim == 3 and gains.dtype == np.float32
    if not fits or gains.shape != (len(frames), *grid(*size)) or not np.isfinite(gains).all():
        raise FileProblem(path, "holds no labels.", hint="Remove it: it will be made again.")
    return Labels(frames, gains, size)
