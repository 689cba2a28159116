"""Upscaling of files: which becomes which, one of them, a folder of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from keras_efficient.atomic import check_apart, check_target
from keras_efficient.errors import FileProblem, KerasEfficientError, WrongArgument
from keras_efficient.superres.image import (
    WRITABLE_SUFFIXES,
    check_fits,
    check_quality,
    check_suffix,
    read_image,
    write_image,
)
from keras_efficient.superres.runner import Model, Progress, Runner, Tile, runner
from keras_efficient.superres.upscale import upscale_pixels
from keras_efficient.superres.video import VIDEO_SUFFIXES, encode_upscaled

__all__ = [
    "PICTURE_SUFFIXES",
    "FolderReport",
    "planned",
    "reason_of",
    "upscale_as_planned",
    "upscale_file",
    "upscale_folder",
]

PICTURE_SUFFIXES = (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class FolderReport:
    """What became of each picture and video of a folder.

    Attributes:
        done: files written.
        kept: files that were there already and were not touched.
        failed: what could not be upscaled, each with the reason.
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
        WrongArgument: a suffix that cannot hold the picture, a model that does not fit, or one file as source and
            target.
    """
    source, target = Path(source), Path(target)
    _check(source, target, quality, overwrite)
    run = runner(model, scale=scale, tile=tile, halo=halo, channels=channels)
    _upscale_picture(source, target, run, quality, overwrite, on_progress)


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
    """Upscales every picture and video of a folder into another, under its own name.

    What exists in the target is kept, so a run that was broken off goes on where it stopped. A file that cannot be
    read is left out and reported.

    Args:
        source: folder of pictures and videos. Hidden files, and files of other suffixes, are passed over.
        target: folder for the results; made where it is missing. It may lie inside `source`.
        model, scale, tile, halo, channels: see `upscale`.
        recursive: take sub-folders too, and make the same ones in `target`.
        suffix: format of the pictures' results, such as ".png"; by default that of each picture, or .png where it
            cannot be written. Where two would get one name, both keep their old suffix inside it (a.gif.png).
        quality, overwrite: see `write_image`.
        on_progress: called with (files looked at, files in all).

    Raises:
        FileProblem: `source` is no folder.
        WrongArgument: source and target are one folder; a result would replace a picture of the source or another
            result; a suffix that cannot be written; a model that does not fit.
    """
    source, target = Path(source), Path(target)
    check_quality(quality)
    if not source.is_dir():
        raise FileProblem(source, "no such folder.")
    jobs = planned([source], target, recursive=recursive, suffix=suffix)
    run = runner(model, scale=scale, tile=tile, halo=halo, channels=channels)
    done: list[Path] = []
    kept: list[Path] = []
    failed: list[tuple[Path, str]] = []
    for number, (picture, result) in enumerate(jobs, start=1):
        try:
            is_new = upscale_as_planned(picture, result, run, quality=quality, overwrite=overwrite)
            (done if is_new else kept).append(result)
        except KerasEfficientError as error:
            failed.append((picture, reason_of(error)))
        if on_progress is not None:
            on_progress(number, len(jobs))
    return FolderReport(tuple(done), tuple(kept), tuple(failed))


def planned(
    sources: Sequence[Path], target: Path, *, recursive: bool = False, suffix: str | None = None
) -> list[tuple[Path, Path]]:
    """Which file becomes which, before any work is done.

    Args:
        sources: files, and folders of pictures and videos.
        target: folder of the results. With several sources, the contents of a folder go below its name there.
        recursive, suffix: see `upscale_folder`.

    Raises:
        WrongArgument: a result would replace a source or another result, or go where the pictures are; a suffix that
            cannot be written.
    """
    if suffix is not None:
        check_suffix(f"a{suffix}")
    found: list[tuple[Path, Path]] = []  # each file with the folder of its result
    for source in sources:
        if source.is_dir():
            place = target if len(sources) == 1 else target / source.resolve().name
            if any(folder.exists() and folder.samefile(source) for folder in (target, place)):
                raise WrongArgument(f"{source}: results cannot go where the pictures are.", hint="Name another folder.")
            files = _contents(source, target, recursive)
            found += ((file, place / file.relative_to(source).parent) for file in files)
        else:
            found.append((source, target))
    jobs = _named(found, suffix)
    check_apart((source for source, _ in jobs), (result for _, result in jobs))
    taken: dict[Path, Path] = {}
    for source, result in jobs:
        if (other := taken.setdefault(result, source)) is not source:
            raise WrongArgument(
                f"{other} and {source} would both become {result}.", hint="Give them output folders of their own."
            )
    return jobs


def upscale_as_planned(
    source: Path,
    target: Path,
    run: Runner,
    *,
    quality: int = 95,
    crf: float = 18,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> bool:
    """Upscales a picture or a video, by its suffix, with a model that `runner` made ready; makes the target's folder.

    Returns:
        Whether that was done; not so where the target exists and `overwrite` is false.

    Raises:
        FileProblem, WrongArgument: see `upscale_file`, `upscale_video`.
    """
    if os.path.exists(target) and not overwrite:  # unlike Path.exists, it bears names that are too long
        return False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileProblem(target.parent, f"cannot be made: {error.strerror or error}.") from error
    if _is_video(source):
        encode_upscaled(source, target, run, crf=crf, overwrite=overwrite, on_progress=on_progress)
    else:
        _check(source, target, quality, overwrite)
        _upscale_picture(source, target, run, quality, overwrite, on_progress)
    return True


def reason_of(error: KerasEfficientError) -> str:
    """What a report says beside the name of a file that failed."""
    reason = getattr(error, "reason", error.message)
    return f"{reason} {error.hint}" if error.hint else reason


def _check(source: Path, target: Path, quality: int, overwrite: bool) -> None:
    check_apart([source], [check_suffix(target)])
    check_target(target, overwrite=overwrite)
    check_quality(quality)


def _upscale_picture(source: Path, target: Path, run: Runner, quality, overwrite, on_progress) -> None:
    picture = read_image(source)
    height, width, *channels = picture.pixels.shape
    check_fits(target, (run.scale * height, run.scale * width, *channels), picture.pixels.dtype)
    large = upscale_pixels(picture.pixels, run, on_progress=on_progress)
    write_image(target, replace(picture, pixels=large), quality=quality, overwrite=overwrite)


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def _contents(source: Path, target: Path, recursive: bool) -> list[Path]:
    """The pictures and videos of a folder, without results of earlier runs below it."""
    inside = target.resolve() if target.resolve().is_relative_to(source.resolve()) else None
    return sorted(
        path
        for path in (source.rglob("*") if recursive else source.iterdir())
        if path.suffix.lower() in (*PICTURE_SUFFIXES, *VIDEO_SUFFIXES)
        and not any(part.startswith(".") for part in path.relative_to(source).parts)
        and inside not in path.resolve().parents
        and path.is_file()
    )


def _named(found: list[tuple[Path, Path]], suffix: str | None) -> list[tuple[Path, Path]]:
    """Each file with its result in the folder that goes with it."""

    def natural(path: Path, folder: Path) -> Path:
        own = path.suffix if path.suffix.lower() in WRITABLE_SUFFIXES else ".png"
        return folder / (path.name if _is_video(path) else path.with_suffix(suffix or own).name)

    names = [natural(path, folder) for path, folder in found]
    uses = Counter(str(name).casefold() for name in names)
    return [
        (path, name.with_name(path.name + name.suffix))
        if uses[str(name).casefold()] > 1 and path.suffix != name.suffix
        else (path, name)
        for (path, _), name in zip(found, names, strict=True)
    ]
