"""A camera: frames in, packets out, with bits where a server's network looks."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_efficient.errors import WrongArgument
from keras_efficient.macroblocks import grid
from keras_efficient.video.allocation import graded_offsets
from keras_efficient.video.encoder import Packet, RoiEncoder
from keras_efficient.video.frames import packages
from keras_efficient.video.interpolation import reach, resized
from keras_efficient.video.motion import carried, small_luma

if TYPE_CHECKING:
    import keras

__all__ = ["Camera", "Saliency"]

STRENGTH = 2.0  # QPs for each doubling of what a macroblock is worth


class Saliency:
    """A camera model for frames of any size: they are scaled to what it takes, and its scores to their macroblocks.

    Args:
        model: a `models.AccModel`, another Keras model from RGB frames (0 to 255) to (batch, rows, columns) scores, or
            the path of an exported file of one (.tflite, .onnx).
        threads: of a file's runtime.

    Raises:
        WrongArgument: the model takes or gives something else.
    """

    def __init__(self, model: keras.Model | str | Path, *, threads: int = 2):
        self._network, self.size = _from_file(model, threads) if isinstance(model, str | Path) else _inner(model)

    def __call__(self, frame: Any) -> np.ndarray:
        """(rows, columns) float32 of an `av.VideoFrame`: logarithms, base 2, of what macroblocks are worth."""
        area = packages().video.reformatter.Interpolation.AREA
        small = frame.reformat(self.size[1], self.size[0], "rgb24", interpolation=area).to_ndarray()
        scores = self._network(small[None].astype(np.float32))
        size = (frame.height, frame.width)
        have, want = reach(self.size, scores.shape[1:]), reach(size, grid(*size))
        found: np.ndarray = resized(scores, grid(*size), have=have, want=want)[0]
        return found


class Camera:
    """Looks at some frames with a camera model, carries what it found to the next ones, and encodes all.

    ```python
    camera = video.Camera(zoo.load("accmodel-yolox-nano"), 1280, 720, 30, base=40)
    for frame in video.Video.open("road.mp4"):
        packets += camera.encode(frame)
    packets += camera.flush()
    ```

    Args:
        model: for `Saliency`; `None`: the encoder alone.
        width, height, fps: of frames.
        every: frames from one that the model looks at to the next. Between them scores move with the picture.
        allocate: scores (rows, columns) to offsets; `None`: `graded_offsets(2 ** scores, strength=2)`.
        options: of `RoiEncoder`: `base` or `bitrate`, `codec`, `preset`, and so on.

    Attributes:
        offsets: of the last frame, (rows, columns) integers, or `None`.

    Raises:
        WrongArgument: `every` is below 1, or what the model and the encoder refuse.
    """

    def __init__(
        self,
        model: keras.Model | str | Path | None,
        width: int,
        height: int,
        fps: float | Fraction,
        *,
        every: int = 10,
        allocate: Callable[[np.ndarray], np.ndarray] | None = None,
        **options: Any,
    ):
        if every < 1:
            raise WrongArgument(f"`every` must be 1 or more, not {every!r}.")
        self.encoder = RoiEncoder(width, height, fps, **options)
        self.offsets: np.ndarray | None = None
        self._saliency = None if model is None else Saliency(model)
        self._allocate = allocate or (lambda scores: graded_offsets(2.0**scores, strength=STRENGTH))
        self._every, self._count, self._last = every, 0, 0
        self._seen: tuple[np.ndarray, np.ndarray] | None = None

    def encode(self, frame: Any, *, key: bool = False) -> list[Packet]:
        """Takes a frame, (height, width, 3) uint8 RGB or an `av.VideoFrame`; gives the packets that are ready."""
        if isinstance(frame, np.ndarray):
            frame = packages().VideoFrame.from_ndarray(frame, format="rgb24")
        if self._saliency is not None:
            self.offsets = self._allocate(self._scores(frame, key))
        self._count += 1
        return self.encoder.encode(frame, self.offsets, key=key)

    def flush(self) -> list[Packet]:
        """The packets that are left. The camera takes no frame after it."""
        return self.encoder.flush()

    def _scores(self, frame: Any, key: bool) -> np.ndarray:
        assert self._saliency is not None
        if self._seen is None or key or self._count - self._last >= self._every:
            scores, self._last = self._saliency(frame), self._count
            self._seen = (scores, small_luma(frame)) if self._every > 1 else (scores, scores)
            return scores
        return carried(*self._seen, small_luma(frame))


Network = Callable[[np.ndarray], np.ndarray]


def _inner(model: keras.Model) -> tuple[Network, tuple[int, int]]:
    """A Keras model as a function, and the size of the frames that it takes."""
    import keras
    from keras import ops

    from keras_efficient.models import without_shrink

    if not isinstance(model, keras.Model):
        raise WrongArgument(f"A camera model is a Keras model or the path of a file, not {type(model).__name__}.")
    inner = without_shrink(model)  # scaling does that already
    _check(tuple(inner.input_shape), tuple(inner.output_shape), model.name)

    def run(frames: np.ndarray) -> np.ndarray:
        found: np.ndarray = ops.convert_to_numpy(inner.predict_on_batch(frames))
        return found

    height, width = inner.input_shape[1:3]
    return run, (height, width)


def _from_file(path: str | Path, threads: int) -> tuple[Network, tuple[int, int]]:
    from keras_efficient import export

    file = export.load(path, threads=threads)
    shape = next(iter(file.input_shapes.values())) if len(file.input_shapes) == 1 else ()
    _check(shape, None, str(path))

    def run(frames: np.ndarray) -> np.ndarray:
        found: np.ndarray = file(frames)
        if found.ndim != 3:
            raise WrongArgument(f"{path} gives {found.shape}, not (batch, rows, columns) of scores.")
        return found

    height, width = (size or 0 for size in shape[1:3])
    return run, (height, width)


def _check(taken: Any, given: Any, name: str) -> None:
    if len(taken) != 4 or None in taken[1:] or taken[3] != 3:
        raise WrongArgument(f"{name} takes {taken}, not RGB frames (batch, height, width, 3) of one size.")
    if given is not None and len(given) != 3:
        raise WrongArgument(f"{name} gives {given}, not (batch, rows, columns) of scores.")
