"""H.264 and H.265 encoding in which each macroblock of each frame has a quality of its own.

FFmpeg passes regions of interest to libx264 and libx265 as side data of a frame, and PyAV has no call that attaches it.
So it is attached through libavutil itself, or, where that cannot be trusted, by the filter `addroi`, whose list is then
overwritten. Encoders that drop regions without a word are refused.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from keras_efficient.errors import ConversionError, WrongArgument
from keras_efficient.macroblocks import BLOCK, grid
from keras_efficient.video.frames import Appearance, packages, studio

__all__ = ["Packet", "RoiEncoder", "decoded", "is_as_asked", "packet_of", "qp_map", "rectangles"]

CODECS = ("libx264", "libx265")
PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo")
MOST_OFFSET = 51
MOST_BASE = 61
FILTERED = 128  # rectangles that the filter's list has room for: its cost grows with their square
_REGION = np.dtype([(name, "<i4") for name in ("self_size", "top", "bottom", "left", "right", "num", "den")])
# QP = base + offset on every macroblock. An aq-strength of 0 would drop the offsets silently.
_EXACT = {
    "libx264": "aq-mode=1:aq-strength=0.0001:qcomp=1:mbtree=0:ipratio=1:pbratio=1:scenecut=0",
    "libx265": "aq-mode=1:aq-strength=0.0001:qcomp=1:cutree=0:ipratio=1:pbratio=1:scenecut=0",
}
# As most presets have it; the fastest have none, and would drop the offsets silently.
_ADAPTIVE = {"libx264": "aq-mode=1:aq-strength=1", "libx265": "aq-mode=2:aq-strength=1"}
DECODERS = {"libx264": "h264", "libx265": "hevc"}
_PARAMETERS = {"libx264": "x264-params", "libx265": "x265-params"}


@dataclass(frozen=True)
class Packet:
    """A coded picture, in the order in which a decoder takes them.

    Attributes:
        data: Annex B: parameter sets are repeated at each key frame.
        pts, dts: in ticks of 1/fps.
        is_key: whether decoding may begin here.
    """

    data: bytes
    pts: int
    dts: int
    is_key: bool


class RoiEncoder:
    """An encoder that takes a QP offset for each macroblock of each frame.

    ```python
    encoder = video.RoiEncoder(1280, 720, 30, base=34)
    for frame in frames:                                   # (720, 1280, 3) uint8, or av.VideoFrame
        packets += encoder.encode(frame, offsets)          # (45, 80) integers; lower is better
    packets += encoder.flush()
    ```

    Args:
        width, height: of frames; any, odd ones are refused by 4:2:0.
        fps: frames a second, a number or a `Fraction`.
        codec: `"libx264"` or `"libx265"`.
        mode: `"offset"`: offsets are added to what the encoder's own adaptive quantisation and tree decide, which
            compresses best. `"exact"`: each coded macroblock has the QP `base + offset`.
        base: quality of a macroblock without an offset: the encoder's crf, in exact mode the QP. Above 51, the worst
            that there is, up to 61: what has no lower offset stays at 51, and the rest becomes worse.
        bitrate: bits a second to keep instead, in offset mode.
        preset: effort of the encoder.
        key_every: frames from one key frame to the next; `None`: the first is the only one.
        b_frames: at most so many in a row; `None`: as the preset says. With 0 a packet comes out for each frame.
        low_delay: a packet comes out for each frame, at the price of more bytes.
        threads: of the encoder; 0: as many as it likes.
        appearance: of the frames, as `Video.appearance` says; it is written into the stream.
        options: further options of the encoder's own parameter string, such as `{"rc-lookahead": 10}`.

    Raises:
        MissingDependency: PyAV is not installed.
        WrongArgument: a codec or options that drop offsets silently (constant QP, no adaptive quantisation, AV1), a
            preset that changes single QPs in exact mode, numbers out of range.
    """

    def __init__(
        self,
        width: int,
        height: int,
        fps: float | Fraction,
        *,
        codec: str = "libx264",
        mode: str = "offset",
        base: float = 34,
        bitrate: int | None = None,
        preset: str = "veryfast",
        key_every: int | None = None,
        b_frames: int | None = None,
        low_delay: bool = False,
        threads: int = 0,
        appearance: Appearance | None = None,
        options: Mapping[str, Any] | None = None,
    ):
        # Encoders take both spellings, of which the checks know one.
        options = {str(name).replace("_", "-"): value for name, value in (options or {}).items()}
        _check(width, height, codec, mode, base, bitrate, preset, options)
        self._settings: dict[str, Any] = {
            "codec": codec,
            "mode": mode,
            "base": base,
            "bitrate": bitrate,
            "preset": preset,
            "key_every": key_every,
            "b_frames": b_frames,
            "low_delay": low_delay,
            "threads": threads,
            "appearance": appearance,
            "options": options,
        }
        self.width, self.height, self.codec, self.mode, self.base = width, height, codec, mode, base
        self.rows, self.columns = grid(height, width)
        self.fps = rate = Fraction(fps).limit_denominator(60000)
        parameters: dict[str, float | str] = {"keyint": key_every or "infinite", "repeat-headers": 1, "annexb": 1}
        if codec == "libx265":
            # Closed groups of pictures: else the frames before a key frame are lost where a decoder begins at it.
            parameters = {"keyint": key_every or -1, "repeat-headers": 1, "open-gop": 0, "log-level": "error"}
        if b_frames is not None:
            parameters["bframes"] = b_frames
        if bitrate is not None:
            # Else either misses the bitrate of a clip by up to a tenth, to keep quality even.
            kilobits = max(bitrate // 1000, 1)
            of_codec = {"vbv-maxrate": kilobits, "vbv-bufsize": kilobits, "vbv-init": 0.5}
            parameters |= {"ratetol": 0.05} if codec == "libx264" else of_codec
        text = [(_EXACT if mode == "exact" else _ADAPTIVE)[codec]]
        text += [f"{name}={value}" for name, value in {**parameters, **options}.items()]
        settings = {"preset": preset, _PARAMETERS[codec]: ":".join(text)}
        if low_delay:
            settings["tune"] = "zerolatency"
        # Neither crf nor QP goes beyond 51, but offsets may be raised.
        self._raised = max(math.ceil(base - MOST_OFFSET), 0) if bitrate is None else 0
        if bitrate is None:
            settings["crf"] = str(base - self._raised)
        av = packages()
        context = av.CodecContext.create(codec, "w")
        context.width, context.height, context.pix_fmt = width, height, "yuv420p"
        context.time_base, context.framerate = 1 / rate, rate
        context.thread_count = threads
        self._appearance = look = appearance or Appearance()
        context.colorspace, context.color_primaries, context.color_trc = look.matrix, look.primaries, look.transfer
        context.color_range = av.video.reformatter.ColorRange.MPEG
        context.sample_aspect_ratio = look.aspect
        if bitrate is not None:
            context.bit_rate = bitrate
        context.options = settings
        context.open()
        self._context, self._count = context, 0
        self._graphs: dict[int, Any] = {}
        self._time_base = 1 / rate

    def encode(self, frame: Any, offsets: np.ndarray | None = None, *, key: bool = False) -> list[Packet]:
        """Takes a frame; gives the packets that are ready.

        Args:
            frame: (height, width, 3) uint8 RGB, or an `av.VideoFrame`.
            offsets: (rows, columns) integers of −51 to 51, rows = ⌈height / 16⌉; `None`: zeros.
            key: whether the frame must be a key frame.
        """
        av = packages()
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24") if isinstance(frame, np.ndarray) else frame
        if (picture.width, picture.height) != (self.width, self.height):
            raise WrongArgument(
                f"A frame is {picture.width}×{picture.height}, the encoder's {self.width}×{self.height}."
            )
        regions = _regions(self._raise(self._checked(offsets)))
        picture = studio(picture, self._appearance.matrix)
        kind = av.video.frame.PictureType.I if key else av.video.frame.PictureType.NONE
        with _lent(picture, (self._count, self._time_base, kind), regions, self._graphs) as lent:
            self._count += 1
            return [packet_of(packet) for packet in self._context.encode(lent)]

    def flush(self) -> list[Packet]:
        """The packets that are left. The encoder takes no frame after it."""
        return [packet_of(packet) for packet in self._context.encode(None)]

    def self_check(self, frames: int = 6) -> str:
        """Encodes noise with a map of its own, by an encoder like this one, and looks whether the map was heeded.

        Returns:
            `"read back"`: an H.264 decoder showed the QPs that were asked for, on every coded macroblock (exact mode);
            `"indirect"`: where offsets were lower, the error was smaller, and the picture took more bytes.

        Raises:
            ConversionError: it was not.
        """
        random = np.random.default_rng(0)
        pictures = [_noise(random, self.height, self.width) for _ in range(frames)]
        if self.mode == "exact" and self.codec == "libx264":
            maps = [random.choice([-8, 0, 6], size=(self.rows, self.columns)) for _ in pictures]
            coded, _ = self._coded_again(pictures, maps)
            for frame, offsets in zip(decoded(coded, self.codec, quality=True), maps, strict=True):
                found, wanted = qp_map(frame), np.clip(round(self.base) + offsets, 0, MOST_OFFSET)
                wrong = ~is_as_asked(found, wanted)
                # All of a first frame of noise is coded. One QP everywhere would be that of the macroblock before, too.
                if wrong.any() or (frame.pts == 0 and (found == wanted).mean() < 0.9):
                    wrong = wrong | (found != wanted)
                    raise ConversionError(
                        f"{wrong.sum()} macroblocks of frame {frame.pts} have another QP than asked for."
                    )
            return "read back"
        half = np.zeros((self.rows, self.columns), int)
        half[:, : self.columns // 2] = -10
        plain, size = self._coded_again(pictures, [half * 0] * frames)
        favoured, larger = self._coded_again(pictures, [half] * frames)
        edge = self.columns // 2 * BLOCK
        before, after = (_luma_error(pictures, decoded(coded, self.codec), edge) for coded in (plain, favoured))
        if not (before > 1.05 * after and (larger > size or self._settings.get("bitrate"))):
            raise ConversionError("The encoder did not heed the offsets: a favoured half of the picture was no better.")
        return "indirect"

    def _coded_again(self, pictures: Sequence[np.ndarray], maps: Sequence[np.ndarray]) -> tuple[list[Packet], int]:
        twin = RoiEncoder(self.width, self.height, self.fps, **self._settings)
        packets = [
            packet for picture, offsets in zip(pictures, maps, strict=True) for packet in twin.encode(picture, offsets)
        ]
        packets += twin.flush()
        return packets, sum(len(packet.data) for packet in packets)

    def _raise(self, offsets: np.ndarray | None) -> np.ndarray | None:
        if not self._raised:
            return offsets
        whole = np.zeros((self.rows, self.columns), int) if offsets is None else offsets
        raised: np.ndarray = np.minimum(whole + self._raised, MOST_OFFSET)
        return raised

    def _checked(self, offsets: np.ndarray | None) -> np.ndarray | None:
        if offsets is None:
            return None
        offsets = np.asarray(offsets)
        if offsets.shape != (self.rows, self.columns) or offsets.dtype.kind not in "iu":
            raise WrongArgument(
                f"Offsets must be integers ({self.rows}, {self.columns}), got {offsets.dtype} {offsets.shape}."
            )
        if offsets.size and np.abs(offsets).max() > MOST_OFFSET:
            raise WrongArgument(f"Offsets must be from −{MOST_OFFSET} to {MOST_OFFSET}, got {np.abs(offsets).max()}.")
        return offsets


def decoded(packets: Iterable[Packet], codec: str = "libx264", *, quality: bool = False) -> Iterator[Any]:
    """The frames of some packets, of which the first is a key frame, in the order in which they are shown.

    Args:
        packets: of one encoder.
        codec: of that encoder.
        quality: whether frames carry the QPs that they were decoded with, for `qp_map`.
    """
    av = packages()
    decoder = av.CodecContext.create(DECODERS[codec], "r")
    if quality:
        decoder.options = {"export_side_data": "venc_params"}
    decoder.thread_count = 1  # threads would hold frames back
    for packet in packets:
        coded = av.Packet(packet.data)
        coded.pts, coded.dts = packet.pts, packet.dts
        yield from decoder.decode(coded)
    yield from decoder.decode(None)


def qp_map(frame: Any) -> np.ndarray:
    """(rows, columns): the QP that an H.264 decoder had at each macroblock.

    A macroblock without a coded residual has none; the decoder shows that of the one before it, in reading order.

    Raises:
        WrongArgument: the frame does not carry it: it was decoded without `quality`, or is of another format.
    """
    listed = frame.side_data.get("VIDEO_ENC_PARAMS")
    if listed is None:
        raise WrongArgument("The frame does not say its QPs: H.264 does, decoded with quality=True.")
    return np.asarray(listed.qp_map(), np.int32)


def is_as_asked(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Which macroblocks have the QP that was asked for, or show that of the one before for want of their own."""
    before = np.concatenate([found.ravel()[:1], found.ravel()[:-1]]).reshape(found.shape)
    return (found == wanted) | (found == before)


def rectangles(offsets: np.ndarray) -> list[tuple[int, int, int, int, int]]:
    """The macroblocks with an offset as rectangles (top, bottom, left, right, offset), of macroblocks; none overlap.

    Runs of equal offsets in a row, joined with those of the rows above that have the same columns.
    """
    found: list[tuple[int, int, int, int, int]] = [tuple(one) for one in _rectangles(np.asarray(offsets)).tolist()]
    return sorted(found)


def _rectangles(offsets: np.ndarray) -> np.ndarray:
    """(n, 5): they are found for each frame of a camera, so without a loop."""
    columns = offsets.shape[1]
    begins = np.ones(offsets.shape, bool)
    begins[:, 1:] = offsets[:, 1:] != offsets[:, :-1]
    places = np.flatnonzero(begins)
    values, lengths = offsets.ravel()[places], np.diff(places, append=offsets.size)
    has = values != 0
    values, lengths, (row, left) = values[has], lengths[has], np.divmod(places[has], columns)
    same = (left * (columns + 1) + lengths) * (2 * MOST_OFFSET + 1) + values  # runs that may be joined
    order = np.lexsort((row, same))
    same, row = same[order], row[order]
    first = np.ones(len(order), bool)
    first[1:] = (same[1:] != same[:-1]) | (row[1:] != row[:-1] + 1)
    top, bottom, order = row[first], row[np.roll(first, -1)] + 1, order[first]
    return np.stack([top, bottom, left[order], left[order] + lengths[order], values[order]], axis=1)


def _regions(offsets: np.ndarray | None) -> np.ndarray | None:
    """FFmpeg's list of regions; `None` where there is no offset."""
    if offsets is None or not offsets.any():
        return None
    found = _rectangles(offsets).T
    regions = np.zeros(found.shape[1], _REGION)
    for name, values in zip(("top", "bottom", "left", "right"), found[:4] * BLOCK, strict=True):
        regions[name] = values
    regions["num"] = found[4]
    regions["self_size"], regions["den"] = _REGION.itemsize, MOST_OFFSET
    return regions


def _check(
    width: int,
    height: int,
    codec: str,
    mode: str,
    base: float,
    bitrate: int | None,
    preset: str,
    options: Mapping[str, Any],
) -> None:
    if codec not in CODECS:
        hint = "libsvtav1 takes regions without a word and drops them." if "av1" in codec else None
        raise WrongArgument(f"`codec` must be one of {', '.join(CODECS)}, not {codec!r}.", hint=hint)
    if mode not in ("offset", "exact"):
        raise WrongArgument(f'`mode` must be "offset" or "exact", not {mode!r}.')
    if preset not in PRESETS:
        raise WrongArgument(f"`preset` must be one of {', '.join(PRESETS)}, not {preset!r}.")
    if width % 2 or height % 2 or width < 16 or height < 16:
        raise WrongArgument(f"Frames must have even sides from 16 on, not {width}×{height}.")
    if not 0 < base <= MOST_BASE:
        raise WrongArgument(f"`base` must be above 0 and at most {MOST_BASE}, not {base!r}.")
    if mode == "exact" and base != round(base):
        raise WrongArgument(f"QPs are whole numbers, so that `base` must be one in exact mode, not {base!r}.")
    if bitrate is not None and (mode == "exact" or bitrate < 1000):
        raise WrongArgument("`bitrate` is bits a second from 1000 on, and for offset mode.")
    if "qp" in options or options.get("rc") == "cqp":
        raise WrongArgument("Constant QP drops offsets silently.", hint="Give base= and mode='exact'.")
    mode_of_aq, strength, effort = (_number(options, name) for name in ("aq-mode", "aq-strength", "subme"))
    if mode_of_aq == 0 or strength == 0:
        raise WrongArgument(
            "Without adaptive quantisation the encoder drops offsets.", hint="aq-strength=0.0001 will do."
        )
    fine = preset in PRESETS[-2:] or (effort or 0) >= 10
    if mode == "exact" and codec == "libx264" and fine:
        raise WrongArgument(
            "subme 10 and above changes the QP of single macroblocks.", hint="Take preset slower, or a faster one."
        )


def _number(options: Mapping[str, Any], name: str) -> float | None:
    try:
        return float(options[name]) if name in options else None
    except (TypeError, ValueError) as error:
        raise WrongArgument(f"The option {name} is a number, not {options[name]!r}.") from error


def _noise(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A picture whose every macroblock has something to code."""
    small = random.integers(0, 256, (-(-height // 4), -(-width // 4), 3)).astype(np.uint8)
    return np.ascontiguousarray(small.repeat(4, axis=0).repeat(4, axis=1)[:height, :width])


def _luma_error(pictures: Sequence[np.ndarray], frames: Iterable[Any], edge: int) -> float:
    """The mean squared error of luma left of an edge."""
    av, errors = packages(), []
    for picture, frame in zip(pictures, frames, strict=True):
        first = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p").to_ndarray()
        both = [array[: frame.height, :edge].astype(np.float64) for array in (first, frame.to_ndarray())]
        errors.append(np.square(both[0] - both[1]).mean())
    return float(np.mean(errors))


@contextlib.contextmanager
def _lent(
    picture: Any, marks: tuple[int, Fraction, Any], regions: np.ndarray | None, graphs: dict[int, Any]
) -> Iterator[Any]:
    """The caller's picture with the encoder's marks, and the list, for as long as the encoder takes it."""
    names = ("pts", "time_base", "pict_type")
    before = {name: getattr(picture, name) for name in names}
    pointer = None if regions is None else _attach(picture, regions)
    try:
        lent = picture if regions is None or pointer else _filtered(picture, regions, graphs)
        for name, value in zip(names, marks, strict=True):
            setattr(lent, name, value)
        yield lent
    finally:
        for name, value in before.items():
            if value is not None or name == "pts":
                setattr(picture, name, value)
        if pointer:
            library, kind = _library()
            library.av_frame_remove_side_data(pointer, kind)


def _attach(picture: Any, regions: np.ndarray) -> int | None:
    """Attaches the list by libavutil's own call, and says to which `AVFrame`; `None`: that was not safe.

    The `AVFrame*` is the first field of PyAV's object. That is believed only if what it points at begins with the
    address of the picture's first plane, as an `AVFrame` does.
    """
    library, kind = _library()
    if library is None:
        return None
    header = 8 * 3  # reference count, type, and Cython's table of methods
    pointer = ctypes.c_void_p.from_address(id(picture) + header).value
    if not pointer or ctypes.c_void_p.from_address(pointer).value != picture.planes[0].buffer_ptr:
        return None
    library.av_frame_remove_side_data(pointer, kind)  # of the caller's: encoders heed the first list only
    data = library.av_frame_new_side_data(pointer, kind, regions.nbytes)
    if not data:
        return None
    # What is given back is a kind, and then where the memory is.
    ctypes.memmove(ctypes.c_void_p.from_address(data + 8), regions.ctypes.data, regions.nbytes)
    return pointer


@functools.cache
def _library() -> tuple[Any, int]:
    """libavutil as PyAV has it loaded, and the number of the kind of side data."""
    av = packages()
    files = sorted(Path(av.__file__).parent.parent.glob("av.libs/libavutil*"))
    if not files or ctypes.sizeof(ctypes.c_void_p) != 8:
        return None, 0
    library = ctypes.CDLL(str(files[0]))
    library.av_frame_new_side_data.restype = ctypes.c_void_p
    library.av_frame_new_side_data.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    library.av_frame_remove_side_data.restype = None
    library.av_frame_remove_side_data.argtypes = [ctypes.c_void_p, ctypes.c_int]
    return library, av.sidedata.sidedata.Type.REGIONS_OF_INTEREST.value


def _filtered(picture: Any, regions: np.ndarray, graphs: dict[int, Any]) -> Any:
    """The picture with the list in the memory that `addroi` filters allocate, without any call behind PyAV's back.

    `graphs` are those of one encoder, by the length of their list: they hold frames.
    """
    room = max(FILTERED, 1 << (len(regions) - 1).bit_length())
    if room not in graphs:
        graphs[room] = _graph(picture.width, picture.height, room)
    graph = graphs[room]
    picture.pts = 0
    graph.push(picture)
    found = graph.pull()
    listed = found.side_data["REGIONS_OF_INTEREST"]
    padded = np.zeros(room, _REGION)  # empty rectangles change nothing
    padded["self_size"], padded["den"] = _REGION.itemsize, MOST_OFFSET
    padded[: len(regions)] = regions
    ctypes.memmove(listed.buffer_ptr, padded.ctypes.data, padded.nbytes)
    return found


def _graph(width: int, height: int, room: int) -> Any:
    graph = packages().filter.Graph()
    last = graph.add_buffer(width=width, height=height, format="yuv420p", time_base=Fraction(1, 1000))
    for _ in range(room):
        region = graph.add("addroi", "x=0:y=0:w=16:h=16:qoffset=0")
        last.link_to(region)
        last = region
    last.link_to(graph.add("buffersink"))
    graph.configure()
    return graph


def packet_of(packet: Any) -> Packet:
    """An `av.Packet` of an encoder, as one of ours."""
    return Packet(bytes(packet), packet.pts, packet.dts, packet.is_keyframe)
