"""Training data for super-resolution, resident in memory: pictures in, patches drawn by index."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from keras_efficient.errors import WrongArgument
from keras_efficient.superres.colour import rgb_to_y
from keras_efficient.superres.evaluation import Pair
from keras_efficient.superres.resize import imresize

__all__ = ["PatchPlan", "PatchSet", "read_pairs", "split_by_name"]

_SUFFIXES = {".bmp", ".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp"}


def split_by_name(paths: Iterable[Path], share: float = 0.05) -> tuple[list[Path], list[Path]]:
    """Splits files into (training, validation) by a hash of folder and name: the same split on every machine."""
    training: list[Path] = []
    validation: list[Path] = []
    for path in sorted(paths):
        digest = hashlib.sha256(f"{path.parent.name}/{path.name}".encode()).digest()
        (validation if int.from_bytes(digest[:4], "big") < share * 2**32 else training).append(path)
    return training, validation


def list_images(folder: str | Path) -> list[Path]:
    """All pictures below a folder, by name."""
    return sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in _SUFFIXES)


def read_pairs(
    paths: Sequence[Path],
    scale: int,
    *,
    shrink: float = 1.0,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Pair]:
    """Reads pictures and makes their low-resolution halves as the benchmark does: bicubic on 8 bits, then Y.

    Gray files are taken to be studio-range Y already. `shrink` below 1 makes the picture smaller first: more variety
    from the same pictures. Pictures that leave less than 24 pixels are left out.
    """
    pairs = []
    for number, path in enumerate(paths, start=1):
        with Image.open(path) as file:
            image = np.asarray(file.convert("L" if file.mode in ("L", "1") else "RGB"))
        if shrink != 1.0:
            image = imresize(image, shrink)
        rows, columns = (n - n % scale for n in image.shape[:2])
        if min(rows, columns) >= 24 * scale:
            image = image[:rows, :columns]
            pairs.append(Pair(path.stem, _luma(imresize(image, 1 / scale)), _luma(image)))
        if on_progress is not None:
            on_progress(number, len(paths))
    return pairs


def _luma(image: np.ndarray) -> np.ndarray:
    if image.ndim == 2:
        return (image / 255.0).astype(np.float32)
    return rgb_to_y(image).astype(np.float32)


@dataclass(frozen=True)
class PatchPlan:
    """Which patches a run of training steps sees; each array is (steps, batch), int32.

    Pixel (i, j) of a patch is sample `origin + i·down + j·right` of the flat arrays of a `PatchSet`; the eight flips
    and
    turns of a patch are eight choices of the three. `turn` numbers them, for the order of the pixels inside a sample.
    """

    origin: np.ndarray
    down: np.ndarray
    right: np.ndarray
    turn: np.ndarray


class PatchSet:
    """All training pictures in two flat arrays, from which patches are gathered by index.

    A sample is one low-resolution pixel and the scale² high-resolution pixels under it (in the order of
    `keras.ops.depth_to_space`), 16 bits each: 139 million luma pixels at scale 2 take 350 MB. There is no file access,
    no decoding and no Python while training, and the same seed gives the same patches on every backend.

    Attributes:
        low: (samples,) uint16, Y · 65535.   high: (samples, scale²) uint16.
        turns: (8, scale²) int32: `high` of a turned patch is `take_along_axis(high, turns[turn])`.
    """

    def __init__(self, pairs: Sequence[Pair], scale: int, patch: int):
        usable = [pair for pair in pairs if min(pair.low.shape) >= patch]
        if not usable:
            raise WrongArgument(f"No picture is as large as a patch of {patch}×{patch} low-resolution pixels.")
        self.scale, self.patch = scale, patch
        self.low = np.concatenate([_to_16_bits(pair.low).ravel() for pair in usable])
        self.high = np.concatenate([_pixels_under_each(_to_16_bits(pair.high), scale) for pair in usable])
        self.turns = np.stack([_order_in_a_turned_sample(turn, scale) for turn in range(8)])
        sizes = np.array([pair.low.shape for pair in usable])
        self._rows, self._columns = sizes.T
        self._starts = np.concatenate([[0], np.cumsum(sizes.prod(axis=1))[:-1]])
        places = (self._rows - patch + 1) * (self._columns - patch + 1)
        # Between "every place alike" (large, smooth pictures rule) and "every picture alike" (small ones repeat).
        self._share = np.sqrt(places) / np.sqrt(places).sum()

    def plan(self, steps: int, batch: int, seed: int) -> PatchPlan:
        """Draws the patches of `steps` training steps; the same `seed` draws the same."""
        random = np.random.default_rng(seed)
        shape = (steps, batch)
        picture = random.choice(len(self._share), size=shape, p=self._share)
        columns, last = self._columns[picture], self.patch - 1
        top = random.integers(0, self._rows[picture] - self.patch + 1)
        left = random.integers(0, columns - self.patch + 1)
        turn = random.integers(0, 8, size=shape)
        flip_rows, flip_columns, transpose = turn & 1, (turn >> 1) & 1, (turn >> 2) & 1
        origin = self._starts[picture] + (top + flip_rows * last) * columns + left + flip_columns * last
        down, right = columns * (1 - 2 * flip_rows), 1 - 2 * flip_columns
        down, right = np.where(transpose, right, down), np.where(transpose, down, right)
        return PatchPlan(*(a.astype(np.int32) for a in (origin, down, right, turn)))


def _to_16_bits(image: np.ndarray) -> np.ndarray:
    return np.round(image * 65535).astype(np.uint16)


def _pixels_under_each(high: np.ndarray, scale: int) -> np.ndarray:
    rows, columns = high.shape[0] // scale, high.shape[1] // scale
    blocks = high.reshape(rows, scale, columns, scale).transpose(0, 2, 1, 3)
    return blocks.reshape(rows * columns, scale * scale)


def _order_in_a_turned_sample(turn: int, scale: int) -> np.ndarray:
    """Position inside a stored sample of each pixel of a turned one."""
    order = np.arange(scale * scale, dtype=np.int32).reshape(scale, scale)
    if turn & 1:
        order = order[::-1]
    if turn & 2:
        order = order[:, ::-1]
    if turn & 4:
        order = order.T
    return order.ravel()
