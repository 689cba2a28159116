"""Pictures as calibration data for integer files of upscalers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from keras_efficient.errors import WrongArgument
from keras_efficient.export.calibration import image_files
from keras_efficient.superres.image import read_image
from keras_efficient.superres.upscale import planes_of

__all__ = ["calibration"]


def calibration(folder: str | Path, *, channels: int = 1, size: int = 128, limit: int = 96) -> np.ndarray:
    """Crops of a folder's pictures, as the upscalers of the zoo take them, for `export.save(..., calibration=…)`.

    Args:
        folder: holds pictures of the kind and size that the exported model will see; sub-folders are not read.
        channels: 1 gives Y of BT.601 in studio range divided by 255, as in training and in `upscale`; 3 gives RGB.
        size: side of the crops in pixels. Smaller pictures are continued by their mirror image.
        limit: largest number of crops. They are spread over all pictures, and over each picture.

    Returns:
        `(crops, size, size, channels)`, float32 in [0, 1].

    Raises:
        FileProblem: there is no such folder, or a picture cannot be read.
        CalibrationError: the folder holds no picture.
        WrongArgument: another number of channels.
    """
    if channels not in (1, 3):
        raise WrongArgument(f"channels is {channels}; upscalers take 1 (Y) or 3 (RGB).")
    files = image_files(Path(folder))
    if len(files) > limit:
        files = [files[index] for index in np.linspace(0, len(files) - 1, limit).round().astype(int)]
    each = max(1, limit // len(files))
    return np.concatenate([_crops(path, channels, size, each) for path in files])


def _crops(path: Path, channels: int, size: int, count: int) -> np.ndarray:
    pixels = read_image(path).pixels
    layered = pixels[:, :, None] if pixels.ndim == 2 else pixels
    colour = layered[:, :, :-1] if layered.shape[2] in (2, 4) else layered  # without alpha
    image = np.moveaxis(planes_of(colour, channels)[:channels], 0, -1)
    short = [(0, max(0, size - length)) for length in image.shape[:2]]
    image = np.pad(image, [*short, (0, 0)], mode="symmetric")
    # A grid of as many crops as there is room for, the central ones first.
    height, width = image.shape[:2]
    grid = np.stack(np.meshgrid(_starts(height, size), _starts(width, size), indexing="ij"), axis=-1).reshape(-1, 2)
    distance = np.abs(grid - (np.array([height, width]) - size) / 2).sum(axis=1)
    corners = grid[np.argsort(distance, kind="stable")[:count]]
    return np.stack([image[top : top + size, left : left + size] for top, left in corners]).astype(np.float32)


def _starts(length: int, size: int) -> np.ndarray:
    """Where crops begin that reach from one end to the other; a single one lies in the middle."""
    count = length // size
    return np.array([(length - size) // 2]) if count == 1 else np.arange(count) * (length - size) // (count - 1)
