"""Upscaling of a picture: luma through a model, colour and alpha by bicubic interpolation, rounded once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

import numpy as np

from keras_efficient.errors import WrongArgument
from keras_efficient.superres.colour import from_unit, rgb_to_ycbcr, to_unit, ycbcr_to_rgb
from keras_efficient.superres.image import Image
from keras_efficient.superres.receptive_field import ReceptiveField
from keras_efficient.superres.resize import contributions, resample
from keras_efficient.superres.runner import Model, Progress, Runner, Tile, runner

__all__ = ["planes_of", "upscale", "upscale_pixels"]

Picture = TypeVar("Picture", np.ndarray, Image)

# Pixels that are worked on at a time where a picture is taken in strips of rows.
_STRIP = 1 << 18
# How far a model is taken to look whose receptive field is not known.
_UNKNOWN_RADIUS = 16
# Input pixels on each side that bicubic interpolation of the opacity looks at.
_OPACITY_RADIUS = 2
# Below this opacity a colour is not to be seen, and dividing by the opacity would only blow up noise.
_INVISIBLE = 1 / 512
_NEUTRAL = 128 / 255


def upscale(
    image: Picture,
    model: Model,
    *,
    scale: int | None = None,
    tile: Tile = "auto",
    halo: int | None = None,
    channels: int | None = None,
    on_progress: Progress | None = None,
) -> Picture:
    """Makes a picture `scale` times larger.

    Y goes through the model; Cb and Cr are resized by bicubic interpolation in floating point (RGB models get R, G, B
    instead). Gray pictures are taken as Y from 0 to 1. Alpha is resized by itself; colours are weighted by it, so that
    those of transparent pixels do not bleed into their neighbours. Nothing is rounded before the end.

    Args:
        image: H×W, or H×W×C with C = 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGB, alpha); uint8, uint16, or floating
            point in [0, 1]; or an `Image`.
        model: N×H×W×1 to N×sH×sW×1 (or 3 channels), float32 in [0, 1]: a Keras model, a loaded file, a function.
        scale: s; found from the model where it is not given.
        tile: tile of the model's input in pixels: "auto" (the model's own size, or at most about 512×512), a number,
            (height, width), or None for one pass.
        halo: radius of the model's receptive field in pixels, needed for tiles. By default the model's attribute
            `halo`, or derived from its layers.
        channels: 1 or 3, what the model takes. By default read from `model.input_shape`, else 1.
        on_progress: called with (tiles done, tiles in all).

    Returns:
        What `image` was, of the same type, sH×sW. An `Image` keeps its colour profile.

    Raises:
        WrongArgument: another type, rank or range of `image`; a model that does not fit.
    """
    run = runner(model, scale=scale, tile=tile, halo=halo, channels=channels)
    if isinstance(image, Image):
        return replace(image, pixels=upscale_pixels(image.pixels, run, on_progress=on_progress))
    return upscale_pixels(image, run, on_progress=on_progress)


def upscale_pixels(pixels: np.ndarray, run: Runner, *, on_progress: Progress | None = None) -> np.ndarray:
    """`upscale` of an array by a model that `runner` made ready."""
    pixels = _checked(pixels)
    layered = pixels[:, :, None] if pixels.ndim == 2 else pixels
    height, width, count = layered.shape
    has_alpha = count in (2, 4)
    colour, alpha = (layered[:, :, :-1], to_unit(layered[:, :, -1])) if has_alpha else (layered, None)
    if alpha is not None and alpha.min() == 1:
        alpha = None  # opaque: the same pixels as without
    planes = planes_of(colour, run.channels)
    if alpha is not None:
        # A result's pixel may be visible as far from visible inputs as its opacity looks.
        radius = run.field.radius if isinstance(run.field, ReceptiveField) else _UNKNOWN_RADIUS
        _hide(planes[: run.channels], alpha, reach=radius + _OPACITY_RADIUS)

    inputs = np.moveaxis(planes[: run.channels], 0, -1)[None]
    large = run(np.ascontiguousarray(inputs), on_progress=on_progress)[0]

    out = np.empty((run.scale * height, run.scale * width, count), pixels.dtype)
    enlarge = _Enlarger(height, width, run.scale)
    if alpha is not None:
        # Premultiplied, around the neutral colour.
        planes[run.channels :] = (planes[run.channels :] - np.float32(_NEUTRAL)) * alpha
    for rows in _strips(*out.shape[:2]):
        opacity = None if alpha is None else enlarge(alpha, rows)
        strip = _colour_strip(large[rows], planes[run.channels :], colour.shape[2], enlarge, rows, opacity)
        if has_alpha:
            opacity = np.ones(strip.shape[:2], np.float32) if opacity is None else opacity
            out[rows, :, -1] = from_unit(opacity, out.dtype)
        out[rows, :, : colour.shape[2]] = from_unit(strip, out.dtype)
    return out.reshape(*out.shape[:2], *pixels.shape[2:])


class _Enlarger:
    """Bicubic interpolation of some rows of the result."""

    def __init__(self, height: int, width: int, scale: int):
        self._rows = contributions(height, scale * height, scale)
        self._columns = contributions(width, scale * width, scale)

    def __call__(self, plane: np.ndarray, rows: slice) -> np.ndarray:
        indices, weights = self._rows
        return resample(resample(plane, indices[rows], weights[rows], axis=0), *self._columns, axis=1)


def _colour_strip(large, chroma, count, enlarge, rows, opacity) -> np.ndarray:
    """Some rows of the result, gray or RGB, in [0, 1] or a little beyond."""
    if count == 1:  # gray; an RGB model was fed three equal channels
        return large.mean(axis=2, keepdims=True)
    if large.shape[2] == 3:
        return large.astype(np.float32)
    ycbcr = np.empty((*large.shape[:2], 3), np.float32)
    ycbcr[:, :, 0] = large[:, :, 0]
    for index, plane in enumerate(chroma, start=1):
        enlarged = enlarge(plane, rows)
        if opacity is not None:
            visible = opacity > _INVISIBLE
            enlarged = np.where(visible, enlarged / np.where(visible, opacity, 1), enlarged)
            enlarged = np.clip(enlarged + np.float32(_NEUTRAL), 0, 1)
        ycbcr[:, :, index] = enlarged
    return ycbcr_to_rgb(ycbcr)


def planes_of(colour: np.ndarray, channels: int) -> np.ndarray:
    """What the model takes, then what is interpolated: Y or gray; Y, Cb, Cr; or R, G, B (float32, C×H×W)."""
    height, width, count = colour.shape
    planes = np.empty((max(count, channels), height, width), np.float32)
    for rows in _strips(height, width):
        strip = to_unit(colour[rows]) if count == 1 or channels == 3 else rgb_to_ycbcr(colour[rows])
        planes[:, rows] = np.moveaxis(strip, -1, 0)
    return planes


def _hide(planes: np.ndarray, alpha: np.ndarray, *, reach: int) -> None:
    """Overwrites fully transparent pixels near visible ones by the mean of these: a model shall not mix them in."""
    known = np.pad(alpha > 0, 1)
    if not known.any() or known[1:-1, 1:-1].all():
        return
    grown = np.pad(planes, ((0, 0), (1, 1), (1, 1)))
    for _ in range(reach):
        count = _neighbours(known.astype(np.float32))
        fresh = (count > 0) & ~known[1:-1, 1:-1]
        if not fresh.any():
            break
        for plane in grown:
            plane[1:-1, 1:-1][fresh] = (_neighbours(plane * known) / np.maximum(count, 1))[fresh]
        known[1:-1, 1:-1] |= fresh
    planes[...] = grown[:, 1:-1, 1:-1]


def _neighbours(padded: np.ndarray) -> np.ndarray:
    """Sums over 3×3."""
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]


def _strips(height: int, width: int) -> Iterator[slice]:
    rows = max(1, _STRIP // width)
    return (slice(start, min(start + rows, height)) for start in range(0, height, rows))


def _checked(pixels: np.ndarray) -> np.ndarray:
    pixels = np.asarray(pixels)
    if 0 in pixels.shape or not (pixels.ndim == 2 or (pixels.ndim == 3 and 1 <= pixels.shape[2] <= 4)):
        raise WrongArgument(f"A picture is H×W or H×W×(1 … 4), with no empty axis, not {pixels.shape}.")
    if pixels.dtype.kind == "f":
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # false for NaN too
            raise WrongArgument(
                "A floating-point picture must lie in [0, 1].", hint="Divide it by 255, or give uint8 or uint16."
            )
    elif pixels.dtype not in (np.uint8, np.uint16):
        raise WrongArgument(f"A picture is uint8, uint16 or floating point in [0, 1], not {pixels.dtype}.")
    return pixels
