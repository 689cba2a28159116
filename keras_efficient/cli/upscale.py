"""`keras-efficient upscale`: larger pictures and videos.

With an exported file neither Keras nor TensorFlow is imported, which saves seconds and 700 MB.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keras_efficient.cli import parse
from keras_efficient.cli.output import out
from keras_efficient.errors import FileProblem, KerasEfficientError, WrongArgument

if TYPE_CHECKING:
    from keras_efficient.superres.runner import Runner

__all__ = ["upscale"]

DEFAULT_MODEL = "sesr-m5-x2"


def upscale(
    inputs: Annotated[list[Path], typer.Argument(metavar="IN...", help="Pictures, folders of pictures, or videos.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A file for one picture or video, else a folder.")],
    model: Annotated[
        str, typer.Option("--model", metavar="NAME|FILE", help="A zoo model, or a .tflite, .onnx or .keras file.")
    ] = DEFAULT_MODEL,
    tile: Annotated[
        str,
        typer.Option("--tile", metavar="HxW|auto|none", help="Work on tiles of this size; the pixels are the same."),
    ] = "auto",
    halo: Annotated[
        int | None, typer.Option("--halo", help="Overlap of tiles, for a file that does not know its own.", min=0)
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", help="For .tflite and .onnx; by default one a processor.", min=1)
    ] = None,
    quality: Annotated[int, typer.Option("--quality", help="Of JPEG and WebP pictures.", min=1, max=100)] = 95,
    crf: Annotated[
        float,
        typer.Option("--crf", help="Of videos: 0 lossless, 23 usual, 51 worst.", min=0, max=51),
    ] = 18,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Folders with their sub-folders.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of objects.")] = False,
) -> None:
    """Make pictures and videos larger."""
    tiles = parse.tile(tile)
    out.begin(as_json=as_json)
    for source in inputs:
        if not source.exists():
            raise FileProblem(source, "no such file or folder.")
    single = len(inputs) == 1 and not inputs[0].is_dir() and not output.is_dir()
    jobs = [(inputs[0], output)] if single else _planned(inputs, output, recursive)
    _check_outputs(jobs, output, single=single, force=force)
    from keras_efficient.superres.runner import runner

    run = runner(_open(model, threads or os.cpu_count() or 1), tile=tiles, halo=halo)
    how = {"quality": quality, "crf": crf, "overwrite": force}
    if single:
        _show([_work(*jobs[0], run, how)], single=True)
    else:
        _show([_attempt(*job, run, how) for job in jobs], single=False)


def _planned(inputs: list[Path], output: Path, recursive: bool) -> list[tuple[Path, Path]]:
    """Which file becomes which in the folder `output`."""
    from keras_efficient.superres.files import planned
    from keras_efficient.superres.image import WRITABLE_SUFFIXES

    if not output.is_dir() and output.suffix.lower() in WRITABLE_SUFFIXES:
        raise WrongArgument(f"-o {output}: several results need a folder, and this is the name of a picture.")
    if output.exists() and not output.is_dir():
        raise FileProblem(output, "is a file; several results need a folder.")
    return planned(inputs, output, recursive=recursive)


def _check_outputs(jobs: list[tuple[Path, Path]], output: Path, *, single: bool, force: bool) -> None:
    """Refuses what could not be written in the end, before a model is loaded."""
    from keras_efficient.atomic import check_apart, check_target

    if single:
        check_apart([jobs[0][0]], [output])
        check_target(output, overwrite=force)
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise FileProblem(output, f"cannot be made: {err.strerror or err}.") from err


def _open(model: str, threads: int) -> Any:
    """A callable from N×H×W×C to N×sH×sW×C."""
    from keras_efficient.cli import models

    if Path(model).suffix.lower() in models.EXPORTED:
        return models.ExportedUpscaler(models.open_exported(model, threads))
    network = models.open_keras(model)
    if not models.is_image_model(network):
        raise WrongArgument(f"{model}: takes and gives something else than one picture (N×H×W×1 or N×H×W×3).")
    from keras_efficient.deploy import deploy

    return deploy(network)


def _attempt(source: Path, target: Path, run: Runner, how: dict[str, Any]) -> dict[str, Any]:
    """One of several: a failure is noted while the others go on."""
    from keras_efficient.superres.files import reason_of

    try:
        return _work(source, target, run, how)
    except KerasEfficientError as err:
        return {"input": str(source), "output": None, "status": "failed", "reason": reason_of(err)}


def _work(source: Path, target: Path, run: Runner, how: dict[str, Any]) -> dict[str, Any]:
    """One picture or video; what exists is kept."""
    from keras_efficient.superres.files import upscale_as_planned

    with out.progress(source.name) as show:
        is_new = upscale_as_planned(source, target, run, on_progress=show, **how)
    return {"input": str(source), "output": str(target), "status": "done" if is_new else "kept"}


def _show(results: list[dict[str, Any]], *, single: bool) -> None:
    counts = {status: sum(row["status"] == status for row in results) for status in ("done", "kept", "failed")}
    if out.as_json:
        out.rows(results, {})
    for row in results:
        if row["status"] == "failed":
            out.error(f"{row['input']}: {row['reason']}", None)
    if counts["kept"]:
        out.message(f"{counts['kept']} existing files were kept; --force replaces them.")
    if single:
        out.detail(f"{results[0]['output']} written")
    else:
        out.message(f"{counts['done']} written, {counts['kept']} kept, {counts['failed']} failed")
    if counts["failed"]:
        raise typer.Exit(1)
