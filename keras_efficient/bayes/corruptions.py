"""Pictures made worse in known steps, to see what becomes of predictions where inputs drift away."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from keras_efficient.errors import UnknownName, WrongArgument

__all__ = ["CORRUPTIONS", "SEVERITIES", "corrupted"]

SEVERITIES = (1, 2, 3, 4, 5)
CHUNK = 1024  # pictures at once: what turns them takes many times their memory


def corrupted(x: np.ndarray, name: str, severity: int, seed: int) -> np.ndarray:
    """Corrupts pictures, each by chances of its own.

    | name | does | at severities 1 to 5 |
    |---|---|---|
    | `gaussian_noise` | adds noise | of sd 0.08, 0.12, 0.18, 0.26, 0.38 |
    | `gaussian_blur` | smooths | by an sd of 4, 6, 8, 10, 12 % of a side |
    | `rotation` | turns to either side | by 10, 20, 30, 45, 60 degrees |
    | `translation` | shifts in any direction | by 5, 10, 15, 20, 25 % of a side |
    | `contrast` | draws values to the picture's mean | to 0.75, 0.5, 0.35, 0.2, 0.1 of the distance |
    | `brightness` | adds | 0.1, 0.2, 0.3, 0.4, 0.5 |
    | `pixelate` | averages over squares | until 3/4, 1/2, 3/8, 1/4, 1/8 of a side's pixels are left |

    Chances do not hang on the severity: a picture that turns left at 1 turns further left at 5. What comes in from
    beyond an edge is the edge's own value.

    Args:
        x: (n, height, width) or (n, height, width, channels), from 0 to 1.
        name: one of `CORRUPTIONS`.
        severity: one of `SEVERITIES`.
        seed: of the chances.

    Returns:
        As x, float32 from 0 to 1.

    Raises:
        UnknownName: another name.
        WrongArgument: another severity, or no such pictures.

    Source: the idea and most names, Hendrycks, Dietterich, ICLR 2019, https://arxiv.org/abs/1903.12261. The sizes are
    of this package: they go with pictures from 8 pixels on.
    """
    if name not in CORRUPTIONS:
        raise UnknownName("corruption", name, CORRUPTIONS)
    if severity not in SEVERITIES or isinstance(severity, bool):
        raise WrongArgument(f"A severity is one of {', '.join(map(str, SEVERITIES))}, not {severity!r}.")
    x = np.asarray(x, np.float32)
    if x.ndim not in (3, 4) or 0 in x.shape:
        raise WrongArgument(f"Pictures are (n, height, width) or (n, height, width, channels), not {x.shape}.")
    if not (x.min() >= 0 and x.max() <= 1):
        raise WrongArgument("Pictures are from 0 to 1, without NaN.")
    random = np.random.default_rng([seed, *name.encode()])
    pictures = x if x.ndim == 4 else x[..., None]
    parts = [pictures[start : start + CHUNK] for start in range(0, len(x), CHUNK)]
    found = np.concatenate([CORRUPTIONS[name](part, severity, random) for part in parts])
    return np.clip(found, 0, 1).astype(np.float32).reshape(x.shape)


def _noise(x: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    sd = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    return x + np.float32(sd) * random.standard_normal(x.shape, np.float32)


def _blur(x: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    def weights(size: int) -> np.ndarray:
        places = np.arange(size)
        # What lies beyond an edge is the edge's pixel: its weight is added to the edge's.
        wide = np.arange(-4 * size, 5 * size)
        sd = 0.02 * (1 + severity) * size
        kernel = np.exp(-0.5 * ((wide - places[:, None]) / sd) ** 2)
        found = np.zeros((size, size))
        np.add.at(found.T, np.clip(wide, 0, size - 1), kernel.T)
        normalised: np.ndarray = found / found.sum(axis=1, keepdims=True)
        return normalised

    return _along_sides(x, weights)


def _rotation(x: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    angle = np.deg2rad((10, 20, 30, 45, 60)[severity - 1]) * random.choice([-1.0, 1.0], len(x))
    height, width = x.shape[1:3]
    rows, columns = (np.arange(size) - (size - 1) / 2 for size in (height, width))
    cosine, sine = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    from_row = cosine * rows[:, None] - sine * columns + (height - 1) / 2
    from_column = sine * rows[:, None] + cosine * columns + (width - 1) / 2
    return _sampled(x, from_row, from_column)


def _translation(x: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    angle, share = random.uniform(0, 2 * math.pi, len(x))[:, None, None], 0.05 * severity
    height, width = x.shape[1:3]
    shape = (len(x), height, width)
    from_row = np.broadcast_to(np.arange(height)[:, None] + share * height * np.sin(angle), shape)
    from_column = np.broadcast_to(np.arange(width) + share * width * np.cos(angle), shape)
    return _sampled(x, from_row, from_column)


def _contrast(x: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    mean = x.mean(axis=(1, 2), keepdims=True)
    return mean + (0.75, 0.5, 0.35, 0.2, 0.1)[severity - 1] * (x - mean)


def _brightness(x: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    return x + 0.1 * severity


def _pixelate(x: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    share = (3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8)[severity - 1]

    def weights(size: int) -> np.ndarray:
        left = max(round(share * size), 1)
        edges, pixels = np.linspace(0, size, left + 1), np.arange(size)
        covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
        squares = np.clip(covered, 0, None) * left / size
        found: np.ndarray = squares[np.minimum((pixels + 0.5) * left / size, left - 1).astype(int)]
        return found

    return _along_sides(x, weights)


CORRUPTIONS: Mapping[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = MappingProxyType(
    {
        "gaussian_noise": _noise,
        "gaussian_blur": _blur,
        "rotation": _rotation,
        "translation": _translation,
        "contrast": _contrast,
        "brightness": _brightness,
        "pixelate": _pixelate,
    }
)


def _along_sides(x: np.ndarray, weights: Callable[[int], np.ndarray]) -> np.ndarray:
    """Each pixel a weighted mean of its column, then of its row; `weights` of a side's size is (size, size)."""
    down, across = (weights(size).astype(np.float32) for size in x.shape[1:3])
    found: np.ndarray = np.einsum("ih,jw,nhwc->nijc", down, across, x, optimize=True)
    return found


def _sampled(x: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Values at fractions of pixels, (n, height, width) each, by the four around."""
    height, width = x.shape[1:3]
    rows, columns = np.clip(rows, 0, height - 1), np.clip(columns, 0, width - 1)
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    bottom, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    down, across = ((one % 1).astype(np.float32)[..., None] for one in (rows, columns))
    which = np.arange(len(x))[:, None, None]
    upper = x[which, top, left] * (1 - across) + x[which, top, right] * across
    lower = x[which, bottom, left] * (1 - across) + x[which, bottom, right] * across
    found: np.ndarray = upper * (1 - down) + lower * down
    return found
