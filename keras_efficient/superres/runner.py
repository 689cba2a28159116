"""A model made ready to run on pictures of any size: its scale, channels and tiling are settled once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from keras_efficient.errors import KerasEfficientError, WrongArgument
from keras_efficient.superres.receptive_field import ReceptiveField, receptive_field
from keras_efficient.superres.tiling import input_shape, tiled

__all__ = ["Model", "Progress", "Runner", "Tile", "runner"]

Model = Callable[[np.ndarray], Any]
Progress = Callable[[int, int], None]
Tile = Literal["auto"] | int | tuple[int, int] | None

# Largest tile that "auto" makes, in pixels. One 16-channel float32 map of it has 16 MiB.
_AUTO_PIXELS = 512 * 512
_PROBE = 32


@dataclass(frozen=True)
class Runner:
    """Calls a model tile by tile, N×H×W×C to N×sH×sW×C. Made by `runner`.

    Attributes:
        model: the callable.
        scale: s.
        channels: 1 (luma) or 3 (RGB).
        tile: the tile asked for.
        size: the one input size (height, width) that the model takes, or None.
        field: its receptive field, or the error that says why it is not known.
    """

    model: Model
    scale: int
    channels: int
    tile: Tile
    size: tuple[int, int] | None
    field: ReceptiveField | KerasEfficientError

    def __call__(self, image: np.ndarray, *, on_progress: Progress | None = None) -> np.ndarray:
        """Runs the model on float32 N×H×W×C in [0, 1]."""
        multiple = 1 if isinstance(self.field, Exception) else self.field.multiple
        height, width = (n + -n % multiple for n in image.shape[1:3])
        tile = self._tile(height, width, multiple)
        one_pass = tile[0] >= height and tile[1] >= width
        return tiled(
            self.model,
            image,
            tile=tile,
            halo=0 if one_pass else self._radius(),
            scale=self.scale,
            multiple=multiple,
            fixed=self.size is not None,
            on_progress=on_progress,
        )

    def _tile(self, height: int, width: int, multiple: int) -> tuple[int, int]:
        if self.size is not None:
            return self.size
        if self.tile is None:
            return height, width
        if self.tile != "auto":
            tile = (self.tile, self.tile) if isinstance(self.tile, int) else self.tile
            return tile[0] + -tile[0] % multiple, tile[1] + -tile[1] % multiple
        if height * width <= _AUTO_PIXELS:
            return height, width
        halo = self._radius()
        halo += -halo % multiple
        columns = _even_tile(width, max(math.isqrt(_AUTO_PIXELS), 4 * halo), halo, multiple)
        return _even_tile(height, max(_AUTO_PIXELS // columns, 4 * halo), halo, multiple), columns

    def _radius(self) -> int:
        if isinstance(self.field, Exception):
            raise self.field
        return self.field.radius


def runner(
    model: Model,
    *,
    scale: int | None = None,
    tile: Tile = "auto",
    halo: int | None = None,
    channels: int | None = None,
) -> Runner:
    """Settles what is not given.

    Args:
        model: n×h×w×C to n×sh×sw×C in [0, 1]: a Keras model, a loaded file, a function. Its `input_shape`, and its
            attributes or entries of its `metadata` called `scale`, `halo` and `multiple`, are used where it has them.
        scale: s; else taken from the model, or found by running it on a small picture.
        tile: size of the tiles, halos included; "auto" takes the model's own fixed size, or else at most about 512×512;
            `None` is one pass.
        halo: radius of the receptive field; else the model's attribute, or derived from a functional Keras model.
        channels: 1 or 3; else the last entry of the model's input shape, or 1.

    Raises:
        WrongArgument: arguments that contradict the model, or one that it needs and cannot be found out.
    """
    shape = input_shape(model)
    channels = channels or shape[3] or 1
    if channels not in (1, 3):
        raise WrongArgument(f"The model takes {channels} channels; 1 (Y) or 3 (RGB) can be fed.")
    size = None if shape[1] is None or shape[2] is None else (shape[1], shape[2])
    _check_tile(tile, size)
    field = _field(model, halo)
    if scale is None:
        derived = field.scale if isinstance(field, ReceptiveField) else 0
        scale = _noted(model, "scale") or derived or _probed_scale(model, size, channels)
    if not (isinstance(scale, int) and scale >= 1):
        raise WrongArgument(f"scale is a whole number from 1, not {scale!r}.")
    return Runner(model, scale, channels, tile, size, field)


def _field(model: Model, halo: int | None) -> ReceptiveField | KerasEfficientError:
    """The model's receptive field; its scale is 0 where that is not known."""
    halo = _noted(model, "halo") if halo is None else halo
    multiple = _noted(model, "multiple")
    if halo is not None and not (isinstance(halo, int) and halo >= 0):
        raise WrongArgument(f"halo is a whole number from 0, not {halo!r}.")
    if halo is not None and multiple is not None:
        return ReceptiveField(halo, multiple, 0)
    try:
        found = receptive_field(model)
    except KerasEfficientError as error:
        return error if halo is None else ReceptiveField(halo, multiple or 1, 0)
    return ReceptiveField(found.radius if halo is None else halo, found.multiple, found.scale)


def _noted(model: Model, name: str) -> int | None:
    """A number that the model carries as an attribute or in its metadata."""
    value = getattr(model, name, None)
    if value is None and isinstance(metadata := getattr(model, "metadata", None), Mapping):
        value = metadata.get(name)
    return value if isinstance(value, int) else None


def _check_tile(tile: Tile, size: tuple[int, int] | None) -> None:
    if tile is None or tile == "auto":
        return
    sides = (tile, tile) if isinstance(tile, int) else tuple(tile)
    if len(sides) != 2 or not all(isinstance(n, int) and n > 0 for n in sides):
        raise WrongArgument(f"tile is 'auto', None, a number of pixels or (height, width), not {tile!r}.")
    if size is not None and sides != size:
        raise WrongArgument(f"The model takes {size[0]}×{size[1]} only, not tiles of {sides[0]}×{sides[1]}.")


def _probed_scale(model: Model, size: tuple[int, int] | None, channels: int) -> int:
    height, width = size or (_PROBE, _PROBE)
    result = np.asarray(model(np.zeros((1, height, width, channels), np.float32)))
    scale = result.shape[1] // height if result.ndim == 4 else 0
    if scale < 1 or result.shape != (1, scale * height, scale * width, channels):
        raise WrongArgument(
            f"The model made {result.shape} of {(1, height, width, channels)}, which is no upscaled picture.",
            hint="It must take and give N×H×W×1 (Y) or N×H×W×3 (RGB, channels=3).",
        )
    return scale


def _even_tile(length: int, largest: int, halo: int, multiple: int) -> int:
    """The tile that covers `length` in as few tiles as `largest` does, all about equally used."""
    if length <= largest:
        return length
    count = math.ceil((length - 2 * halo) / (largest - 2 * halo))
    tile = math.ceil((length - 2 * halo) / count) + 2 * halo
    return tile + -tile % multiple
