"""Scores of an upscaler by the standard protocol of the literature, on folders like Set5, Set14 and BSD100.

The protocol: crop the picture to a multiple of the scale; shrink the 8-bit RGB picture by MATLAB's bicubic; take Y
(studio BT.601, not rounded) of both; upscale; clip to [0, 1]; leave out `scale` pixels on each side; PSNR and SSIM on
0–255; mean over the pictures.

**Gray pictures.** One of Set14's pictures (bridge) is stored as gray. The MATLAB scripts of the literature take it as
it is, 0–255 (`gray="literature"`). Tools that open everything as RGB squeeze it into studio range, 16–235
(`gray="studio"`), which lifts that picture by 1.32 dB and the mean of Set14 by 0.09 dB. Name the one you report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from keras_efficient.errors import FileProblem, WrongArgument
from keras_efficient.superres.colour import rgb_to_y, to_unit
from keras_efficient.superres.metrics import psnr, ssim
from keras_efficient.superres.resize import imresize
from keras_efficient.superres.runner import Runner, runner

__all__ = ["Bicubic", "Evaluation", "Gray", "ImageScore", "Pair", "evaluate", "load_pairs"]

Gray = Literal["literature", "studio"]

_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Pair:
    """A picture of a benchmark: `low` (H×W) and `high` (sH×sW), Y in [0, 1], float32."""

    name: str
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class ImageScore:
    """PSNR in dB and SSIM of one picture."""

    name: str
    psnr: float
    ssim: float


@dataclass(frozen=True)
class Evaluation:
    """Scores of one data set: means of the pictures' dB and SSIM, the conventions used, and each picture's own."""

    dataset: str
    scale: int
    gray: Gray
    rounding: bool
    psnr: float
    ssim: float
    images: tuple[ImageScore, ...]


def evaluate(
    upscale_y: Callable[[np.ndarray], Any],
    dataset: str | Path | Sequence[Pair],
    scale: int,
    *,
    gray: Gray = "literature",
    rounding: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measures PSNR and SSIM by the standard protocol (see the module's text).

    Args:
        upscale_y: Y in [0, 1], float32 1×H×W×1, to 1×sH×sW×1: a Keras model, a loaded file, a function. One of fixed
            size is run in tiles (see `upscale`).
        dataset: folder of pictures, or what `load_pairs` made of one (to measure often, read once).
        scale: 2, 3, 4, …
        gray: how a gray picture is taken; see above. Ignored for pairs, which were made by one of them.
        rounding: round the result to 8 bits before it is compared, as files and int8 models do. About −0.03 dB at
            37 dB. The literature compares floating point.
        on_progress: called with (pictures done, pictures in all).

    Returns:
        The scores, pictures in the order of their names.

    Raises:
        FileProblem: the folder is missing or has no pictures.
        WrongArgument: `upscale_y` returned another shape, or NaN.
    """
    if isinstance(dataset, str | Path):
        name, pairs = Path(dataset).name, load_pairs(dataset, scale, gray=gray)
    else:
        name, pairs = "pairs", tuple(dataset)
    if not pairs:
        raise WrongArgument("No pictures to measure.")
    run = runner(upscale_y, scale=scale, tile=None)
    scores = []
    for pair in pairs:
        scores.append(_score(run, pair, scale, rounding))
        if on_progress is not None:
            on_progress(len(scores), len(pairs))
    return Evaluation(
        dataset=name,
        scale=scale,
        gray=gray,
        rounding=rounding,
        psnr=float(np.mean([score.psnr for score in scores])),
        ssim=float(np.mean([score.ssim for score in scores])),
        images=tuple(scores),
    )


def load_pairs(folder: str | Path, scale: int, *, gray: Gray = "literature") -> tuple[Pair, ...]:
    """Reads all pictures of a folder (not of its sub-folders) and makes their low-resolution halves.

    Raises:
        FileProblem: the folder is missing, has no pictures, or one cannot be read.
    """
    folder = Path(folder)
    if gray not in ("literature", "studio"):
        raise WrongArgument(f"Unknown gray: {gray!r}.", hint="Known: 'literature', 'studio'.")
    if not (isinstance(scale, int) and scale > 1):
        raise WrongArgument(f"scale is a whole number above 1, not {scale!r}.")
    if not folder.is_dir():
        raise FileProblem(folder, "no such folder.", hint="Give the folder that holds a data set's pictures.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise FileProblem(folder, "no pictures in it.", hint=f"Known suffixes: {', '.join(sorted(_SUFFIXES))}.")
    return tuple(_pair(path, scale, gray) for path in paths)


@dataclass(frozen=True)
class Bicubic:
    """The baseline of every table: N×H×W×1 to N×sH×sW×1 by bicubic interpolation, not rounded."""

    scale: int
    halo: ClassVar[int] = 2  # how far the kernel reaches, for tiling

    def __call__(self, y: np.ndarray) -> np.ndarray:
        return np.stack([imresize(image, self.scale) for image in np.asarray(y)])


def _pair(path: Path, scale: int, gray: Gray) -> Pair:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            is_gray = file.mode in ("1", "L")
            image = np.asarray(file.convert("L" if is_gray and gray == "literature" else "RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise FileProblem(path, f"cannot be read as an image ({error}).") from error
    height, width = (n - n % scale for n in image.shape[:2])
    if not (height and width):
        raise FileProblem(path, f"smaller than {scale}×{scale} pixels.")
    high = image[:height, :width]
    low = imresize(high, 1 / scale)
    to_y = to_unit if image.ndim == 2 else rgb_to_y
    return Pair(path.stem, to_y(low), to_y(high))


def _score(run: Runner, pair: Pair, scale: int, rounding: bool) -> ImageScore:
    result = run(pair.low[None, :, :, None])
    if result.shape != (1, *pair.high.shape, 1):
        raise WrongArgument(f"{pair.name}: the upscaler returned {result.shape}, not {(1, *pair.high.shape, 1)}.")
    result = np.clip(result[0, :, :, 0].astype(np.float64), 0, 1) * 255
    if not np.isfinite(result).all():
        raise WrongArgument(f"{pair.name}: the upscaler returned NaN.")
    if rounding:
        result = np.floor(result + 0.5)
    reference = pair.high.astype(np.float64) * 255
    return ImageScore(
        pair.name,
        psnr=psnr(result, reference, shave=scale, data_range=255.0),
        ssim=ssim(result, reference, shave=scale, data_range=255.0),
    )
