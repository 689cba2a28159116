"""A picture through a fully convolutional model in tiles, with the same pixels as in one pass.

A tile is `tile` pixels of the input. Where it ends inside the picture, the outer `halo` pixels of its result are wrong
(the model saw its own zero padding there) and are left out; where it ends at the picture's border, that zero padding is
what one pass sees as well, and its result is kept to the last pixel. So tiles are laid flush with the picture's
borders, overlap by two halos or more, and all have one shape, which a file of fixed shape needs. The halo must be at
least the radius of the model's receptive field (see `receptive_field`): m + 4 for SESR with m blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from keras_efficient.errors import WrongArgument

__all__ = ["input_shape", "tiled", "tiles"]

# (start, stop) of a tile in the picture, and (start, stop) of the part of it that is kept.
_Span = tuple[int, int, int, int]


def tiled(
    model: Callable[[np.ndarray], Any],
    image: np.ndarray,
    *,
    tile: int | tuple[int, int],
    halo: int,
    scale: int,
    batch: int = 1,
    multiple: int = 1,
    fixed: bool | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Computes model(image) tile by tile.

    Integer (int8) models give exactly the numbers of one pass; floating-point ones up to the order of their sums.
    Memory: the result, and what `batch` tiles need.

    Args:
        model: n×h×w×C to n×sh×sw×D for any h, w, or for the one size `tile`.
        image: N×H×W×C.
        tile: height and width of a tile in input pixels, halos included. Where the picture is smaller, a model of free
            size gets a smaller tile.
        halo: radius of the receptive field in input pixels.
        scale: s.
        batch: tiles in one call of the model (the last call may have fewer, unless `fixed`).
        multiple: for models that work at 1/`multiple` of the resolution: positions and sizes of tiles are multiples of
            it. A picture that is not is padded by its edge pixels, and the result is cropped.
        fixed: whether the model takes `tile` only. A picture smaller than that is padded by its edge pixels, and the
            result is cropped: then, and only then, its last `halo` pixels differ from those of one pass at the
            picture's own size. By default true where `input_shape(model)` has height and width.
        on_progress: called with (tiles done, tiles in all).

    Returns:
        N×sH×sW×D.

    Raises:
        WrongArgument: a tile too small for the halo, or a model that returned another shape.
    """
    image = np.asarray(image)
    if image.ndim != 4 or 0 in image.shape:
        raise WrongArgument(f"tiled takes N×H×W×C with no empty axis, not the shape {image.shape}.")
    size = (tile, tile) if isinstance(tile, int) else tile
    fixed = None not in input_shape(model)[1:3] if fixed is None else fixed
    count, height, width = image.shape[:3]
    padded = _padded(image, size if fixed else (1, 1), multiple)
    places = [
        (index, rows, columns)
        for index in range(count)
        for rows, columns in tiles(*padded.shape[1:3], tile=size, halo=halo, multiple=multiple)
    ]
    out = np.empty(0)
    for done, group in enumerate(places[i : i + batch] for i in range(0, len(places), batch)):
        inputs = np.concatenate([padded[i : i + 1, r[0] : r[1], c[0] : c[1]] for i, r, c in group])
        if fixed and len(group) < batch:
            inputs = np.concatenate([inputs, np.repeat(inputs[-1:], batch - len(group), axis=0)])
        results = np.asarray(model(inputs))
        _check_shape(results, inputs, scale)
        if not out.size:
            out = np.empty((count, scale * height, scale * width, results.shape[3]), results.dtype)
        for (index, rows, columns), result in zip(group, results, strict=False):
            _place(out[index], result, rows, columns, scale)
        if on_progress is not None:
            on_progress(min((done + 1) * batch, len(places)), len(places))
    return out


def tiles(
    height: int, width: int, *, tile: int | tuple[int, int], halo: int, multiple: int = 1
) -> Iterator[tuple[_Span, _Span]]:
    """Where the tiles of a picture lie, row by row.

    Yields:
        For rows and for columns: (start, stop) of the tile, (start, stop) of the part that it contributes. These parts
        cover the picture once.
    """
    size = (tile, tile) if isinstance(tile, int) else tile
    if len(size) != 2 or min(size) < 1 or halo < 0 or multiple < 1:
        raise WrongArgument(f"tile must be positive and halo not negative, not {tile!r} and {halo!r}.")
    if any(n % multiple for n in (*size, height, width)):
        raise WrongArgument(f"The sizes of tile {size} and picture {height}×{width} must be multiples of {multiple}.")
    halo += -halo % multiple
    yield from itertools.product(_spans(height, size[0], halo), _spans(width, size[1], halo))


def _spans(length: int, tile: int, halo: int) -> list[_Span]:
    if length <= tile:
        return [(0, length, 0, length)]
    if tile <= 2 * halo and length > 2 * (tile - halo):
        raise WrongArgument(
            f"A tile of {tile} pixels has no room between two halos of {halo}.",
            hint=f"Take a tile of {2 * halo + 1} pixels or more; several times the halo is efficient.",
        )
    spans = []
    kept = 0
    while kept < length:
        start = min(max(kept - halo, 0), length - tile)
        stop = start + tile
        keep_to = length if stop == length else stop - halo
        spans.append((start, stop, kept, keep_to))
        kept = keep_to
    return spans


def _place(out: np.ndarray, result: np.ndarray, rows: _Span, columns: _Span, scale: int) -> None:
    """Copies what a tile contributes; a result of padding beyond `out` is left out."""
    (top, _, row_from, row_to), (left, _, column_from, column_to) = ([scale * n for n in s] for s in (rows, columns))
    target = out[row_from:row_to, column_from:column_to]
    part = result[row_from - top : row_to - top, column_from - left : column_to - left]
    target[...] = part[: target.shape[0], : target.shape[1]]


def _padded(image: np.ndarray, least: tuple[int, int], multiple: int) -> np.ndarray:
    height, width = (max(n + -n % multiple, m) for n, m in zip(image.shape[1:3], least, strict=True))
    if (height, width) == image.shape[1:3]:
        return image
    return np.pad(image, ((0, 0), (0, height - image.shape[1]), (0, width - image.shape[2]), (0, 0)), mode="edge")


def input_shape(model) -> tuple[int | None, int | None, int | None, int | None]:
    """N, H, W, C that a model takes, None where it is free or not known.

    Read from `input_shape` (as Keras models have), or `input_shapes`, a dict of one entry (as exported files have).
    """
    shape = getattr(model, "input_shape", None)
    named = getattr(model, "input_shapes", None)
    if shape is None and isinstance(named, Mapping) and len(named) == 1:
        shape = next(iter(named.values()))
    return tuple(shape) if isinstance(shape, tuple | list) and len(shape) == 4 else (None,) * 4


def _check_shape(results: np.ndarray, inputs: np.ndarray, scale: int) -> None:
    expected = (inputs.shape[0], scale * inputs.shape[1], scale * inputs.shape[2])
    if results.ndim != 4 or results.shape[:3] != expected:
        raise WrongArgument(
            f"The model returned {results.shape}, not {(*expected, 'channels')}, for {inputs.shape} at scale {scale}."
        )
