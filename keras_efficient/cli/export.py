"""`keras-efficient export`: from a model to a verified file for a target."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keras_efficient.cli import parse
from keras_efficient.cli.output import out
from keras_efficient.errors import CalibrationError, UnknownName, WrongArgument

if TYPE_CHECKING:
    import keras

    from keras_efficient.export import Report, Target

__all__ = ["export"]

SHARED = frozenset(("input_shape", "calibration", "overwrite", "verify", "mode", "members"))  # of every target
MOST_NOTES = 15


def export(
    model: Annotated[
        str | None, typer.Argument(metavar="NAME|FILE", help="A zoo model, a .keras file, or the .zip of a posterior.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The file to write.")] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="Where it will run; see --list-targets. By default by -o's suffix.")
    ] = None,
    precision: Annotated[str | None, typer.Option("--precision", help="By default the target's first.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration", help="Needed for int8: a folder of real pictures, a video, or .npy, or .npz by input."
        ),
    ] = None,
    behind: Annotated[
        str | None, typer.Option("--behind", metavar="LAYER", help="Export what comes after this layer alone.")
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option("--mode", help="Posterior: ensemble (by default), mean, sample, noise_input or distilled."),
    ] = None,
    members: Annotated[
        int | None, typer.Option("--members", min=1, help="Posterior: the first so many; by default all.")
    ] = None,
    input_shape: Annotated[
        str | None, typer.Option("--input-shape", metavar="SIZE", help="Fixes the size: 1080x1920, 64 or a=64,b=8.")
    ] = None,
    tile: Annotated[
        str | None, typer.Option("--tile", metavar="HxW|auto|none", help="NPU: work on tiles; auto takes the fastest.")
    ] = None,
    allow_cpu: Annotated[
        bool, typer.Option("--allow-cpu", help="NPU: let operators that it lacks run on the CPU.")
    ] = False,
    system_config: Annotated[
        str | None, typer.Option("--system-config", help="NPU: Vela's system configuration.")
    ] = None,
    memory_mode: Annotated[str | None, typer.Option("--memory-mode", help="NPU: Vela's memory mode.")] = None,
    tune: Annotated[
        float | None, typer.Option("--tune", metavar="SECONDS", help="CUDA: measure kernels on this machine's GPU.")
    ] = None,
    tune_cache: Annotated[
        Path | None, typer.Option("--tune-cache", metavar="FILE", help="CUDA: measurements, read and added to.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", metavar="NAME=VALUE", help="What else the target takes; see --list-targets. Repeatable."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Keep a file that misses its tolerance.")] = False,
    list_targets: Annotated[
        bool, typer.Option("--list-targets", help="List the targets and end; with --target its options.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Convert a model to a file for a phone, an NPU, a GPU or ONNX Runtime, and check it."""
    # TensorFlow reads it when it is imported. With oneDNN it keeps the memory of every tensor that it has let go.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    if list_targets:
        out.begin(as_json=as_json)
        return _list_targets(target)
    if model is None or output is None:
        raise typer.BadParameter("needs a model and -o OUT; keras-efficient zoo list shows the models.")
    options = _options(
        parse.options(option),
        allow_cpu=allow_cpu or None,
        system_config=system_config,
        memory_mode=memory_mode,
        tune=parse.seconds(tune, "--tune"),
        tune_cache=tune_cache and str(tune_cache),
    )
    if tile is not None:
        options["tile"] = parse.tile(tile)  # `None` is a choice of its own: one pass
    request: dict[str, Any] = {
        "input_shape": parse.shape(input_shape),
        "calibration": calibration,
        "overwrite": force,
        "verify": not no_verify,
        **options,
    }
    drawn = {name: value for name, value in (("mode", mode), ("members", members)) if value is not None}
    out.begin(as_json=as_json)
    if Path(model).suffix.lower() == ".zip":
        if behind is not None:
            raise WrongArgument("--behind cuts a Keras model, not a posterior.")
        return _show(_export_posterior(Path(model), output, target, precision, {**request, **drawn}))
    if drawn:
        raise WrongArgument(f"--{next(iter(drawn))} is of a posterior, a .zip; {model!r} is none.")
    return _show(_export(model, output, target, precision, behind, request))


def _options(named: dict[str, Any], **given: Any) -> dict[str, Any]:
    """Options of a target, by their own flags or by --option."""
    flags = {name: value for name, value in given.items() if value is not None}
    if twice := sorted(named.keys() & flags.keys()):
        raise WrongArgument(f"--option {twice[0]} and --{twice[0].replace('_', '-')} are the same: give one of them.")
    return {**flags, **named}


def _export(
    name: str, output: Path, target: str | None, precision: str | None, behind: str | None, request: dict[str, Any]
) -> Report:
    from keras_efficient import export as exporting
    from keras_efficient.cli.models import metadata_of, open_keras, part_behind
    from keras_efficient.export.targets import registry

    chosen = registry.find(target, output)
    precision = precision or chosen.precisions[0]
    _refuse_early(chosen, precision, output, request)
    model = open_keras(name)
    if behind is not None:
        model = part_behind(model, behind)
    metadata = metadata_of(name, model)
    if request["calibration"] is not None:
        request["calibration"] = _calibration(request["calibration"], model, pictures="halo" in metadata)
    with out.stages("exporting") as show, out.hushed():
        return exporting.save(
            model,
            output,
            target=chosen.name,
            precision=precision,
            metadata=metadata,
            on_progress=show,
            **request,
        )


def _export_posterior(
    path: Path, output: Path, target: str | None, precision: str | None, request: dict[str, Any]
) -> Report:
    from keras_efficient.cli.models import open_posterior
    from keras_efficient.export.targets import registry

    chosen = registry.find(target, output)
    precision = precision or chosen.precisions[0]
    _refuse_early(chosen, precision, output, request)
    posterior = open_posterior(path)
    with out.stages("exporting") as show, out.hushed():
        from keras_efficient.bayes.exporting import export_posterior

        return export_posterior(posterior, output, target=chosen.name, precision=precision, on_progress=show, **request)


def _calibration(path: Path, model: keras.Model, *, pictures: bool) -> Any:
    """What `export.save` does not read itself: pictures of an upscaler, and videos."""
    from keras_efficient.video.frames import VIDEOS
    from keras_efficient.video.frames import calibration as of_video

    if pictures and path.is_dir():
        from keras_efficient.superres import calibration as of_pictures

        return of_pictures(path, channels=model.input_shape[-1])
    if path.suffix.lower() in VIDEOS:
        from keras_efficient.export.signature import input_specs

        spec, *others = input_specs(model)
        if others or len(spec.shape) != 4 or None in spec.shape[1:] or spec.shape[3] != 3:
            raise CalibrationError(
                f"A video calibrates a model that takes RGB frames of one size, not {spec.name} {spec.shape}."
            )
        height, width = (int(side or 0) for side in spec.shape[1:3])
        return of_video(path, (height, width)) * (spec.white / 255)
    return path


def _refuse_early(target: Target, precision: str, output: Path, request: dict[str, Any]) -> None:
    """What `export.save` would refuse as well, found out before Keras is imported and a model loaded."""
    from keras_efficient.atomic import check_target

    if precision not in target.precisions:
        raise UnknownName(f"precision of target {target.name!r}", precision, target.precisions)
    given = {name: request[name] for name in request.keys() - SHARED}
    for name in given:
        if name not in target.options:
            see = f"keras-efficient export --list-targets --target {target.name}"
            raise UnknownName(f"option of target {target.name!r}", name, target.options, see=see)
    if precision in target.calibrated and request["calibration"] is None:
        raise CalibrationError(
            f"{precision} needs real inputs to set its ranges.", hint="Give --calibration FOLDER, or FILE.npy."
        )
    check_target(output, overwrite=request["overwrite"])
    if target.ready is not None:
        target.ready({name: given.get(name, option.default) for name, option in target.options.items()})


def _show(report: Report) -> None:
    """The report; people get notes and the NPU's figures a line each."""
    values = report.to_dict()
    shown = {key: value for key, value in values.items() if key not in ("npu", "kernels", "notes", "ops")}
    counts = {f"{name} {dtype}": n for name, dtypes in report.ops.items() for dtype, n in dtypes.items()}
    shown |= {"ops": [f"{n} × {operator}" for operator, n in counts.items()]}
    shown |= {f"npu {key}": value for key, value in (values["npu"] or {}).items()}
    for number, kernel in enumerate(values["kernels"] or ()):
        names, many = kernel["names"], f" … {kernel['names'][-1]} ({kernel['layers']} layers)"
        spills = f"{kernel['spills']} bytes spilled" if kernel["spills"] else "no spills"
        sizes = f"{kernel['registers']} registers a thread, {kernel['shared_bytes']:,} bytes shared a block, {spills}"
        layers = f"{names[0]}{many if len(names) > 1 else ''}"
        shown[f"kernel {number}"] = f"{kernel['template']}: {layers}, {sizes}, {_time_of(kernel)}"
    out.record(values, shown={**shown, "notes": _shortened(report.notes)})


def _shortened(notes: Sequence[str]) -> list[str]:
    """Notes with no more than `MOST_NOTES` of those that a large network has one of for each layer."""
    from keras_efficient.export.targets.cuda import NO_KERNEL_FOR

    many = [place for place, note in enumerate(notes) if note.startswith(NO_KERNEL_FOR)][MOST_NOTES:]
    kept = [note for place, note in enumerate(notes) if place not in many]
    if many:
        kept.insert(many[0], f"… and {len(many)} more; --json has all.")
    return kept


def _time_of(kernel: Mapping[str, Any]) -> str:
    if kernel["measured_ms"] is not None:
        return f"{kernel['measured_ms']:.3g} ms measured"
    return f"{kernel['estimated_ms']:.3g} ms estimated"


def _list_targets(name: str | None) -> None:
    from keras_efficient import export as exporting

    if name is not None and name not in exporting.targets:
        raise UnknownName("target", name, exporting.targets)
    rows = [
        {
            "name": target.name,
            "suffix": target.suffix,
            "precisions": list(target.precisions),
            "options": {name: option.help for name, option in target.options.items()},
            "summary": target.summary,
        }
        for target in exporting.targets.values()
        if name in (None, target.name)
    ]
    if name is not None and not out.as_json:
        return _list_options(exporting.targets[name])
    columns = {"name": "target", "suffix": "suffix", "precisions": "precisions", "summary": "what"}
    shown = [{**row, "precisions": " ".join(row["precisions"])} for row in rows]
    return out.rows(rows if out.as_json else shown, columns)


def _list_options(target: Target) -> None:
    """What `--option` takes for it."""
    rows = [
        {
            "option": name,
            "default": json.dumps(option.default),
            "choices": " ".join(json.dumps(one) for one in option.choices),
            "what": option.help,
        }
        for name, option in target.options.items()
    ]
    if not rows:
        return out.message(f"Target {target.name!r} has no options.")
    return out.rows(rows, {key: key for key in rows[0]})
