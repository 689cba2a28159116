"""`keras-efficient upscale`: larger pictures and videos.

With an exported file neither Keras nor TensorFlow is imported, which saves seconds and 700 MB.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from keras_efficient.cli import parse
from keras_efficient.cli.output import out
from keras_efficient.errors import FileProblem, KerasEfficientError, WrongArgument

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
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Folders with their sub-folders.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of objects.")] = False,
) -> None:
    """Make pictures and videos larger."""
    options: dict[str, Any] = {"tile": parse.tile(tile), "halo": halo, "overwrite": force}
    out.begin(as_json=as_json)
    _check_inputs(inputs, output)
    run = _open(model, threads or os.cpu_count() or 1)
    into_folder = len(inputs) > 1 or output.is_dir() or inputs[0].is_dir()
    results: list[dict[str, Any]] = []
    for source in inputs:
        if source.is_dir():
            results += _folder(source, _place_of_folder(source, inputs, output), run, recursive, options)
        else:
            results.append(_file(source, output / source.name if into_folder else output, run, options, len(inputs)))
    _show(results, single=len(inputs) == 1 and not inputs[0].is_dir())


def _check_inputs(inputs: list[Path], output: Path) -> None:
    """Refuses what cannot work before a model is loaded."""
    for source in inputs:
        if not source.exists():
            raise FileProblem(source, "no such file or folder.")
    if len(inputs) > 1 or inputs[0].is_dir():
        if output.exists() and not output.is_dir():
            raise FileProblem(output, "is a file; several results need a folder.")
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise FileProblem(output, f"cannot be made: {err.strerror or err}.") from err
    elif output.exists() and not output.is_dir() and output.samefile(inputs[0]):
        raise WrongArgument(f"{output} is the input itself.", hint="Choose another name.")


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


def _folder(source: Path, target: Path, run: Any, recursive: bool, options: dict[str, Any]) -> list[dict[str, Any]]:
    from keras_efficient import superres

    with out.progress(source.name) as show:
        report = superres.upscale_folder(source, target, run, recursive=recursive, on_progress=show, **options)
    rows = [{"input": str(source), "output": str(path), "status": "done"} for path in report.done]
    rows += [{"input": str(source), "output": str(path), "status": "kept"} for path in report.kept]
    return rows + [
        {"input": str(path), "output": None, "status": "failed", "reason": reason} for path, reason in report.failed
    ]


def _place_of_folder(source: Path, inputs: list[Path], output: Path) -> Path:
    """Several folders keep their names, so that their pictures do not meet."""
    return output if len(inputs) == 1 else output / source.resolve().name


def _file(source: Path, target: Path, run: Any, options: dict[str, Any], count: int) -> dict[str, Any]:
    """One picture or video; where it is one of several, a failure is noted and the others go on."""
    from keras_efficient import superres
    from keras_efficient.superres.video import VIDEO_SUFFIXES

    work = superres.upscale_video if source.suffix.lower() in VIDEO_SUFFIXES else superres.upscale_file
    try:
        with out.progress(source.name) as show:
            work(source, target, run, on_progress=show, **options)
    except KerasEfficientError as err:
        if count == 1:
            raise
        return {"input": str(source), "output": None, "status": "failed", "reason": err.message}
    return {"input": str(source), "output": str(target), "status": "done"}


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
