"""The ways of coding a clip that are compared: those of today, those of the literature, and ours.

All use libx264 with one preset, one distance of key frames, and one thread.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from keras_efficient.errors import FileProblem, UnknownName, WrongArgument
from keras_efficient.macroblocks import BLOCK
from keras_efficient.video.allocation import graded_offsets, two_levels
from keras_efficient.video.camera import STRENGTH, Camera, Saliency
from keras_efficient.video.encoder import PRESETS, Packet, RoiEncoder, decoded, packet_of
from keras_efficient.video.found import boxes_of, covered
from keras_efficient.video.frames import Video, packages, rgb
from keras_efficient.video.gradient import accuracy_gradient
from keras_efficient.video.servers import Server

__all__ = ["SCHEMES", "Clip", "Coded", "Scheme", "coding_schemes", "uniform"]

OUTSIDE = 6  # QPs by which what is outside of boxes is worse
FEEDBACK = 2  # frames for which the boxes of a first pass hold
FED_BACK = 10  # QPs by which a second pass is better than the first
HIGH, LOWS = 30, (36, 40, 44)  # QPs between which an oracle takes its gradients
GRADIENTS = 3  # frames from one gradient to the next

BETTER, SHARE = 10, 0.2  # two levels: QPs from one to the other, and share of a frame's best that is on the better one
AGE = 2 / 3  # seconds that pass at least until boxes of a server are back, at the rates that are compared

OF_MODEL = ("camera", "two-levels", "camera-short", "camera-live")
OFF = {"aq-mode": 0, "mbtree": 0, "bframes": 0}
AQ = {"aq-mode": 1, "mbtree": 0, "bframes": 0}
SHORT = {"rc-lookahead": 0, "mbtree": 0}


@dataclass(frozen=True)
class Clip:
    """A video, or its beginning, which can be gone through any number of times."""

    video: Video
    frames: int | None = None

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.video, self.frames)


@dataclass(frozen=True, eq=False)
class Coded:
    """A clip as it comes to the server.

    Attributes:
        pictures: gives the frames that the server looks at, (h, w, 3) uint8 each.
        sizes: (frames,) bytes sent for each.
        out_at: (frames,): the number of the frame after which the encoder gave each out.
        encoding: seconds of a processor that nobody else uses, for all frames.
        looking: seconds of a model on the camera on the clock, for all frames.
        offsets: of each frame, (rows, columns), or `None`.
        passes: how often the clip goes to the server; each one after the first costs a round trip.
    """

    pictures: Callable[[], Iterator[np.ndarray]]
    sizes: np.ndarray
    out_at: np.ndarray
    encoding: float
    looking: float = 0.0
    offsets: list[np.ndarray] | None = None
    passes: int = 1


@dataclass(frozen=True, eq=False)
class Scheme:
    """A way of coding.

    Attributes:
        name: of the curve.
        about: one line on how it codes.
        code: a clip and a setting to what comes to the server.
        settings: the ones that make a curve: QPs or crf.
        key: what results hang on besides name, clip and setting.
    """

    name: str
    about: str
    code: Callable[[Clip, float], Coded]
    settings: Sequence[float]
    key: str = ""


def coding_schemes(
    names: Iterable[str],
    server: Server,
    model: Any = None,
    *,
    preset: str = "veryfast",
    key_every: int | None = None,
    chunk: int = 10,
    step: int = 2,
) -> list[Scheme]:
    """Some of `SCHEMES`, ready to use.

    Args:
        names: of `SCHEMES`.
        server: whose boxes or gradients some of them use.
        model: of the camera, for `"camera"`, those that begin so, and `"two-levels"`: a Keras model, or a file's path.
        preset: of libx264.
        key_every: frames from one key frame to the next; `None`: the first is the only one.
        chunk: frames that are sent together.
        step: from one setting of a curve to the next.

    Raises:
        UnknownName: another name.
        WrongArgument: one that uses a camera model, without one; another preset.
    """
    if preset not in PRESETS:
        raise WrongArgument(f"`preset` must be one of {', '.join(PRESETS)}, not {preset!r}.")
    form = _Form(server, model, preset, key_every, chunk)
    found = []
    for name in names:
        if name not in SCHEMES:
            raise UnknownName("scheme", name, SCHEMES)
        if name in OF_MODEL and model is None:
            raise WrongArgument(f"The scheme {name!r} needs a camera model: give model=, or --model.")
        about, (least, most), code = SCHEMES[name]
        key = f"{preset} {key_every} {chunk}" + (f" {_digest(model)}" if name in OF_MODEL else "")
        found.append(Scheme(name, about, code(form), range(least, most + 1, step), key))
    return found


@dataclass(frozen=True, eq=False)
class _Form:
    """What all ways of coding share."""

    server: Any
    model: Any = None
    preset: str = "veryfast"
    key_every: int | None = None
    chunk: int = 10

    def plain(
        self, options: Mapping[str, Any], mode: str = "crf", *, live: bool = False
    ) -> Callable[[Clip, float], Coded]:
        """libx264 as it is; mode "qp" is its constant QP, where the first frame is 3 better."""
        tune = {"tune": "zerolatency"} if live else {}

        def code(clip: Clip, quality: float) -> Coded:
            return _coded(self._stream(clip, clip.video, {mode: quality, **tune}, options))

        return code

    def _stream(self, frames: Iterable[Any], video: Video, quality: dict[str, Any], options: Mapping[str, Any]) -> Any:
        context = packages().CodecContext.create("libx264", "w")
        context.width, context.height, context.pix_fmt = video.width, video.height, "yuv420p"
        rate = Fraction(video.rate).limit_denominator(60000)
        context.time_base, context.framerate, context.thread_count = 1 / rate, rate, 1
        parameters = {"keyint": self.key_every or "infinite", "repeat-headers": 1, "annexb": 1, **options}
        text = ":".join(f"{name}={value}" for name, value in parameters.items())
        context.options = {"preset": self.preset, "x264-params": text, **{k: str(v) for k, v in quality.items()}}

        def encode(number: int, frame: Any) -> list[Packet]:
            frame.pts, frame.time_base = number, 1 / rate
            frame.pict_type = packages().video.frame.PictureType.NONE  # else that of the file's picture is kept
            return [packet_of(packet) for packet in context.encode(frame)]

        return _streamed(frames, encode, lambda: [packet_of(packet) for packet in context.encode(None)])

    def roi(self, clip: Clip, maps: Sequence[np.ndarray | None], base: float, mode: str = "offset") -> Coded:
        """Offsets that hold for a chunk each."""
        video = clip.video
        options: dict[str, Any] = {"preset": self.preset, "key_every": self.key_every, "threads": 1, "mode": mode}
        encoder = RoiEncoder(video.width, video.height, video.rate, base=base, **options)
        used: list[np.ndarray] = []

        def encode(number: int, frame: Any) -> list[Packet]:
            offsets = maps[number // self.chunk]
            used.append(np.zeros((encoder.rows, encoder.columns), int) if offsets is None else offsets)
            return encoder.encode(frame, offsets)

        return _coded(_streamed(clip, encode, encoder.flush), offsets=used)

    def boxes(self, *, old: bool = False, mode: str) -> Callable[[Clip, float], Coded]:
        """Offsets inside and outside of the boxes of the chunk's first frame, or of the last one of an older chunk.

        The boxes are the server's own on the source, the best that such a detector could find.
        """
        place = -1 if old else 0

        @cache
        def outside(clip: Clip) -> tuple[list[np.ndarray | None], float]:
            masks, seconds = [], []
            for number, frame in enumerate(clip):
                if (number - place) % self.chunk == 0:
                    begun = time.perf_counter()
                    masks.append(self._inside(frame))
                    seconds.append(time.perf_counter() - begun)
            maps = [np.where(mask, 0, OUTSIDE) for mask in masks]
            # Older boxes come from the server; those of its own frame the camera has to find itself.
            if old:
                return [None] * self.back_after(clip.video.rate) + maps, 0.0
            return list(maps), len(maps) * float(np.median(seconds))

        def code(clip: Clip, quality: float) -> Coded:
            maps, looking = outside(clip)
            return replace(self.roi(clip, maps, quality, mode), looking=looking)

        return code

    def back_after(self, rate: Fraction | float) -> int:
        """Chunks from one whose last frame the server saw to the first that can heed what it found."""
        return 1 + math.ceil(AGE * float(rate) / self.chunk)

    def _inside(self, frame: Any) -> np.ndarray:
        picture = frame if isinstance(frame, np.ndarray) else rgb(frame)
        return covered(boxes_of(self.server.predict(picture[None])[0]), *picture.shape[:2])

    def dds(self) -> Callable[[Clip, float], Coded]:
        """A bad pass over all, and then what lies in the server's boxes well, black around it.

        The server looks at the second pass inside of the boxes and at the first one elsewhere.
        """

        def code(clip: Clip, quality: float) -> Coded:
            first = self._stream(clip, clip.video, {"qp": quality}, OFF)
            masks: list[np.ndarray] = []
            for number, frame in enumerate(decoded(first.packets)):
                masks.append(masks[-1] if number % FEEDBACK else self._inside(frame))
            second = self._stream(_blackened(clip, masks), clip.video, {"qp": max(quality - FED_BACK, 1)}, OFF)

            def pictures() -> Iterator[np.ndarray]:
                for bad, good, mask in zip(decoded(first.packets), decoded(second.packets), masks, strict=True):
                    yield np.where(_pixels(mask, bad.height, bad.width), rgb(good), rgb(bad))

            sizes, out_at = first.sizes + second.sizes, np.maximum(first.out_at, second.out_at)
            offsets = [np.where(mask, -FED_BACK, 0) for mask in masks]
            return Coded(
                pictures, sizes, out_at, float((first.seconds + second.seconds).sum()), offsets=offsets, passes=2
            )

        return code

    def oracle(self) -> Callable[[Clip, float], Coded]:
        """The clip's own gradients, averaged over each chunk: what a camera model could know at best."""

        @cache
        def maps(clip: Clip) -> list[np.ndarray]:
            streams = [self._stream(clip, clip.video, {"qp": qp}, OFF).packets for qp in (HIGH, *LOWS)]
            chunks: list[list[np.ndarray]] = []
            for number, (high, *lows) in enumerate(zip(*map(decoded, streams), strict=True)):
                if number % self.chunk == 0:
                    chunks.append([])
                if number % self.chunk % GRADIENTS == 0:
                    low = lows[number % self.chunk // GRADIENTS % len(lows)]
                    both = (rgb(high)[None], rgb(low)[None])
                    chunks[-1].append(accuracy_gradient(self.server, *both, weight="none")[0])
            return [graded_offsets(np.mean(gains, axis=0), strength=STRENGTH) for gains in chunks]

        return lambda clip, quality: self.roi(clip, maps(clip), quality)

    def camera(self, **further: Any) -> Callable[[Clip, float], Coded]:
        """`video.Camera`, its model at the first frame of each chunk; `further` of its options."""

        def code(clip: Clip, quality: float) -> Coded:
            video = clip.video
            options: dict[str, Any] = {"preset": self.preset, "key_every": self.key_every, "threads": 1}
            options |= {"every": self.chunk, "base": quality, **further}
            camera = Camera(self.model, video.width, video.height, video.rate, **options)
            used: list[np.ndarray] = []

            def encode(number: int, frame: Any) -> list[Packet]:
                packets = camera.encode(frame)
                assert camera.offsets is not None
                used.append(camera.offsets)
                return packets

            stream = _streamed(clip, encode, camera.flush)
            count, each = len(stream.sizes), stream.seconds
            # Frames that the model looks at, which it is compiled for at the first, take as long to encode as others.
            others = each[:-1][np.arange(count) % self.chunk > 0]
            encoding = others.mean() * count + each[-1] if len(others) else each.sum()
            looking = self._look(clip) * -(-count // self.chunk)
            return replace(_coded(stream, offsets=used), encoding=float(encoding), looking=looking)

        return code

    def _look(self, clip: Clip) -> float:
        """Seconds of one look on the clock, the median of some."""
        saliency, frame, times = Saliency(self.model), next(iter(clip)), []
        for _ in range(9):
            begun = time.perf_counter()
            saliency(frame)
            times.append(time.perf_counter() - begun)
        return float(np.median(times[1:]))


# name: what it is, QPs or crf of its curve, and how it is made
SCHEMES: dict[str, tuple[str, tuple[int, int], Callable[[_Form], Callable[[Clip, float], Coded]]]] = {
    "uniform": (
        "one QP everywhere (AWStream): constant QP, no AQ, no mbtree, no B-frames",
        (30, 50),
        lambda form: form.plain(OFF, "qp"),
    ),
    "defaults": ("x264's own: crf, AQ, mbtree, B-frames", (22, 51), lambda form: form.plain({})),
    "aq": ("x264's AQ alone: crf, no mbtree, no B-frames", (24, 51), lambda form: form.plain(AQ)),
    "boxes": (
        f"x264's defaults, +{OUTSIDE} outside of the chunk's first boxes, by the server's detector on the camera",
        (20, 46),
        lambda form: form.boxes(mode="offset"),
    ),
    "vigil": (
        f"two QPs, {OUTSIDE} apart: boxes of the chunk's first frame, by the server's own detector, run on the camera",
        (24, 51),
        lambda form: form.boxes(mode="exact"),
    ),
    "eaar": (
        f"two QPs, {OUTSIDE} apart: the server's boxes of a last frame, when they are back, {AGE:.2f} s later or more",
        (24, 51),
        lambda form: form.boxes(old=True, mode="exact"),
    ),
    "dds": (
        f"two passes: all at one QP, then what is in the server's boxes {FED_BACK} better, black around it",
        (32, 50),
        lambda form: form.dds(),
    ),
    "oracle": (
        "x264's defaults with offsets from the clip's own accuracy gradients, averaged over each chunk",
        (28, 57),
        lambda form: form.oracle(),
    ),
    "camera": ("x264's defaults with offsets from the camera model", (28, 57), lambda form: form.camera()),
    "two-levels": (
        f"two QPs, {BETTER} apart: what scores a fifth of the frame's best, and what is near it (the paper's)",
        (38, 61),
        lambda form: form.camera(mode="exact", allocate=_two_levels),
    ),
    "defaults-short": (
        "x264's own but for what looks ahead: crf, AQ, B-frames; no mbtree",
        (24, 51),
        lambda form: form.plain(SHORT),
    ),
    "camera-short": (
        "x264's own but for what looks ahead, with offsets from the camera model",
        (28, 57),
        lambda form: form.camera(options=SHORT),
    ),
    "defaults-live": (
        "x264's own, tuned for no delay: crf, AQ; no look ahead, no mbtree, no B-frames",
        (24, 51),
        lambda form: form.plain({}, live=True),
    ),
    "camera-live": (
        "x264's own, tuned for no delay, with offsets from the camera model",
        (28, 57),
        lambda form: form.camera(low_delay=True),
    ),
}


def _two_levels(scores: np.ndarray) -> np.ndarray:
    return two_levels(scores, threshold=float(scores.max() + np.log2(SHARE)), high=-BETTER, dilation=1)


def uniform(clip: Clip, qp: float) -> Iterator[np.ndarray]:
    """The frames of a clip coded at one QP, as the scheme of this name codes it."""
    return _Form(None).plain(OFF, "qp")(clip, qp).pictures()


@dataclass(frozen=True, eq=False)
class _Stream:
    packets: list[Packet]
    sizes: np.ndarray
    out_at: np.ndarray
    seconds: np.ndarray  # of each frame, and of what is left at the end


def _streamed(
    frames: Iterable[Any], encode: Callable[[int, Any], list[Packet]], flush: Callable[[], list[Packet]]
) -> _Stream:
    packets: list[Packet] = []
    out_at: dict[int, int] = {}
    seconds: list[float] = []
    number = 0
    for number, frame in enumerate(itertools.chain(frames, [None])):
        begun = time.thread_time()  # others that use the machine do not count
        found = flush() if frame is None else encode(number, frame)
        seconds.append(time.thread_time() - begun)
        packets += found
        out_at |= {packet.pts: number - (frame is None) for packet in found}
    sizes = np.zeros(number, int)
    for packet in packets:
        sizes[packet.pts] += len(packet.data)
    return _Stream(packets, sizes, np.array([out_at[index] for index in range(number)], int), np.array(seconds))


def _coded(stream: _Stream, *, offsets: list[np.ndarray] | None = None) -> Coded:
    def pictures() -> Iterator[np.ndarray]:
        return map(rgb, decoded(stream.packets))

    return Coded(pictures, stream.sizes, stream.out_at, float(stream.seconds.sum()), offsets=offsets)


def _pixels(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    return mask.repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)[:height, :width, None]


def _blackened(clip: Clip, masks: Sequence[np.ndarray]) -> Iterator[Any]:
    av = packages()
    for frame, mask in zip(clip, masks, strict=True):
        array = np.ascontiguousarray(rgb(frame) * _pixels(mask, frame.height, frame.width))
        yield av.VideoFrame.from_ndarray(array, format="rgb24").reformat(format="yuv420p")


def _digest(model: Any) -> str:
    """What tells a camera model from another."""
    digest = hashlib.sha256()
    if isinstance(model, str | Path):
        try:
            digest.update(Path(model).read_bytes())
        except OSError as error:
            raise FileProblem(model, "no such file.") from error
    else:
        for weights in model.get_weights():
            digest.update(np.ascontiguousarray(weights).tobytes())
    return digest.hexdigest()[:16]
