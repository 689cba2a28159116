"""Upscaling of picture files, one or a folder of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from keras_efficient.atomic import check_target
from keras_efficient.errors import FileProblem, KerasEfficientError, WrongArgument
from keras_efficient.superres.image import WRITABLE_SUFFIXES, check_quality, check_suffix, read_image, write_image
from keras_efficient.superres.runner import Model, Progress, Runner, Tile, runner
from keras_efficient.superres.upscale import upscale_pixels

__all__ = ["PICTURE_SUFFIXES", "FolderReport", "upscale_file", "upscale_folder"]

PICTURE_SUFFIXES = (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class FolderReport:
    """What became of each picture of a folder.

    Attributes:
        done: files written.
        kept: files that were there already and were not touched.
        failed: pictures that could not be upscaled, each with the reason.
    """

    done: tuple[Path, ...]
    kept: tuple[Path, ...]
    failed: tuple[tuple[Path, str], ...]


def upscale_file(
    source: str | Path,
    target: str | Path,
    model: Model,
    *,
    scale: int | None = None,
    tile: Tile = "auto",
    halo: int | None = None,
    channels: int | None = None,
    quality: int = 95,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> None:
    """Reads a picture, upscales it (see `upscale`), and writes it (see `write_image`).

    The target is checked before any work is done, and appears whole or not at all.

    Raises:
        FileProblem: the source cannot be read, or the target exists already or cannot be written.
        WrongArgument: a suffix that cannot hold the picture, or a model that does not fit.
    """
    check_target(check_suffix(target), overwrite=overwrite)
    check_quality(quality)
    run = runner(model, scale=scale, tile=tile, halo=halo, channels=channels)
    _upscale_file(Path(source), Path(target), run, quality, overwrite, on_progress)


def upscale_folder(
    source: str | Path,
    target: str | Path,
    model: Model,
    *,
    recursive: bool = False,
    suffix: str | None = None,
    scale: int | None = None,
    tile: Tile = "auto",
    halo: int | None = None,
    channels: int | None = None,
    quality: int = 95,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> FolderReport:
    """Upscales every picture of a folder into another, under its own name.

    What exists in the target is kept, so a run that was broken off goes on where it stopped. A picture that cannot be
    read is left out and reported.

    Args:
        source: folder of pictures. Hidden files, and files without a picture's suffix, are passed over.
        target: folder for the results; made where it is missing. It may lie inside `source`.
        model, scale, tile, halo, channels: see `upscale`.
        recursive: take sub-folders too, and make the same ones in `target`.
        suffix: format of the results, such as ".png"; by default that of each picture, or .png where it cannot be
            written. Where two pictures would get one name, both keep their old suffix inside it (a.gif.png).
        quality, overwrite: see `write_image`.
        on_progress: called with (pictures looked at, pictures in all).

    Raises:
        FileProblem: `source` is no folder, or `target` cannot be made.
        WrongArgument: source and target are one folder; a suffix that cannot be written; a model that does not fit.
    """
    source, target = Path(source), Path(target)
    check_quality(quality)
    if suffix is not None:
        check_suffix(f"a{suffix}")
    pictures = _pictures(source, target, recursive)
    run = runner(model, scale=scale, tile=tile, halo=halo, channels=channels)
    done, kept, failed = [], [], []
    for number, (picture, result) in enumerate(_results(source, target, pictures, suffix), start=1):
        try:
            if result.exists() and not overwrite:
                kept.append(result)
            else:
                _make_folder(result.parent)
                _upscale_file(picture, result, run, quality, overwrite, None)
                done.append(result)
        except KerasEfficientError as error:
            failed.append((picture, getattr(error, "reason", error.message)))
        if on_progress is not None:
            on_progress(number, len(pictures))
    return FolderReport(tuple(done), tuple(kept), tuple(failed))


def _upscale_file(source: Path, target: Path, run: Runner, quality, overwrite, on_progress) -> None:
    picture = read_image(source)
    large = upscale_pixels(picture.pixels, run, on_progress=on_progress)
    write_image(target, replace(picture, pixels=large), quality=quality, overwrite=overwrite)


def _pictures(source: Path, target: Path, recursive: bool) -> list[Path]:
    if not source.is_dir():
        raise FileProblem(source, "no such folder.")
    if target.exists() and target.samefile(source):
        raise WrongArgument(f"{target}: results cannot go where the pictures are.", hint="Name another folder.")
    inside = target.resolve()
    return sorted(
        path
        for path in (source.rglob("*") if recursive else source.iterdir())
        if path.suffix.lower() in PICTURE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(source).parts)
        and inside not in path.resolve().parents
        and path.is_file()
    )


def _results(source: Path, target: Path, pictures: list[Path], suffix: str | None) -> Iterator[tuple[Path, Path]]:
    """Each picture with the name of its result."""

    def natural(path: Path) -> Path:
        own = path.suffix if path.suffix.lower() in WRITABLE_SUFFIXES else ".png"
        return target / path.relative_to(source).with_suffix(suffix or own)

    names = [natural(path) for path in pictures]
    folded = [str(name).casefold() for name in names]
    for path, name in zip(pictures, names, strict=True):
        clash = folded.count(str(name).casefold()) > 1
        yield path, name.with_name(path.name + name.suffix) if clash and path.suffix != name.suffix else name


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileProblem(folder, f"cannot be made: {error.strerror}.") from error
