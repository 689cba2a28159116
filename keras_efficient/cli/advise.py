"""`keras-efficient advise`: what in a model could be smaller, and a copy in which it is; or faster on a GPU."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keras_efficient.cli import parse
from keras_efficient.cli.output import out
from keras_efficient.errors import UnknownName, WrongArgument

if TYPE_CHECKING:
    import keras

    from keras_efficient.compress import EmbeddingAdvice, EmbeddingSetting
    from keras_efficient.export.bolt.advice import Advice

__all__ = ["advise"]

_TABLES = {
    "path": "layer",
    "entities": "entities",
    "width": "width",
    "nbytes": "bytes",
    "share": "of the model",
    "advice": "advice",
}
_SETTINGS = {
    "path": "layer",
    "compression": "compression",
    "form": "form",
    "bits": "bits",
    "nbytes": "bytes",
    "table_error": "table error",
    "sampled": "rows tried",
}
_GPU = {"layer": "layer", "kind": "about", "what": "advice", "gain": "time"}
_BITS = (1, 2, 4, 8, 16, 32)


class Form(StrEnum):
    """How a compressed embedding makes its vectors."""

    subspace = "subspace"
    codebooks = "codebooks"
    scaled = "scaled"


def advise(
    model: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A zoo model, or a .keras file.")],
    embedding: Annotated[bool, typer.Option("--embedding", help="About embedding tables.")] = False,
    target: Annotated[
        str | None, typer.Option("--target", metavar="cuda-sm…", help="About layers, for this GPU: cuda-sm90a is H200.")
    ] = None,
    input_shape: Annotated[
        str | None, typer.Option("--input-shape", metavar="SIZE", help="With --target: 1080x1920, 64 or a=64,b=8.")
    ] = None,
    apply: Annotated[
        Path | None, typer.Option("--apply", metavar="OUT.keras", help="Write the model with its tables compressed.")
    ] = None,
    compression: Annotated[
        float | None, typer.Option("--compression", help="Of each table, with --apply.  [default: 16]")
    ] = None,
    form: Annotated[Form | None, typer.Option("--form", help="With --apply.  [default: subspace]")] = None,
    bits: Annotated[
        int | None, typer.Option("--bits", help="1 to 32, with --apply.  [default: 2 for subspace, else 8]")
    ] = None,
    counts: Annotated[
        list[str] | None,
        typer.Option("--counts", metavar="LAYER=FILE.npy", help="How often each id occurs, with --apply; repeatable."),
    ] = None,
    freeze: Annotated[
        bool, typer.Option("--freeze", help="With --apply: write the small integers; they are not trained further.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what could be compressed in a trained model, and do so; or what would suit a GPU better."""
    if embedding == (target is not None):
        raise typer.BadParameter("needs one kind of advice: give either --embedding or --target cuda-sm90a.")
    if target is None and input_shape is not None:
        raise typer.BadParameter("--input-shape belongs to --target.")
    given = {"compression": compression, "form": form and form.value, "bits": bits, "counts": counts}
    given["freeze"] = freeze or None
    options = {name: value for name, value in given.items() if value is not None}
    if target is not None and apply is not None:
        raise typer.BadParameter("--apply belongs to --embedding.")
    if apply is None and (options or force):
        raise typer.BadParameter(f"--{next(iter(options), 'force')} belongs to --apply OUT.keras.")
    if bits is not None and bits not in _BITS:
        raise typer.BadParameter(f"--bits must be one of {', '.join(map(str, _BITS))}, not {bits}.")
    shape = parse.shape(input_shape)
    out.begin(as_json=as_json)
    if target is not None:
        _advise_gpu(model, target, shape)
    elif apply is None:
        _advise(model)
    else:
        _apply(model, apply, options, force)


def _advise(name: str) -> None:
    model = _open(name)
    from keras_efficient.compress import embeddings  # after wrong names and missing files are found out

    with out.stages("trying") as show, out.hushed():
        tables = embeddings.advise_embeddings(model, on_progress=show)
    _check_any(name, tables)
    values = {"model": name, "nbytes": embeddings.weights_nbytes(model), "tables": _plain(tables), "applied": None}
    if out.as_json:
        return out.record(values)
    out.rows([_table_row(table) for table in tables], _TABLES)
    rows = [_setting_row(table, setting) for table in tables for setting in table.settings]
    if rows:
        out.text("")
        out.rows(rows, _SETTINGS)
        out.text(f"\n{_EXPLANATION}")


def _advise_gpu(name: str, target: str, shape: parse.Shape | None) -> None:
    from keras_efficient.export.bolt import advice as advising
    from keras_efficient.export.bolt.architectures import architecture
    from keras_efficient.export.targets.cuda import ARCHITECTURES

    if target not in ARCHITECTURES:
        raise UnknownName("target of advice", target, ARCHITECTURES)
    advising.check_installed()
    arch = architecture(ARCHITECTURES[target][0])
    model = _open(name)
    with out.stages("advising") as show, out.hushed():
        network, sizes = advising.converted(model, shape, show)
        show("estimating kernels")
        advice = advising.advise(network, sizes, arch)
    plain = [dataclasses.asdict(one) for one in advice]
    if out.as_json:
        return out.record({"model": name, "target": target, "sizes": sizes, "advice": plain})
    if not advice and not out.as_json:
        return out.message("Nothing to advise.")
    out.rows([_gpu_row(one) for one in advice], _GPU)
    out.text(f"\n{_ESTIMATES.format(device=arch.device)}")


def _gpu_row(advice: Advice) -> dict[str, Any]:
    others = len(advice.layers) - 1
    more = f" and {others} {'other' if others == 1 else 'others'}" if others > 0 else ""
    gain = "" if advice.gain is None else str(advice.gain)
    return {**vars(advice), "layer": f"{advice.layer}{more}", "gain": gain}


def _counts(given: list[str]) -> dict[str, Any]:
    """``["items=counts.npy"]`` to ``{"items": array}``."""
    from keras_efficient.export.calibration import read_arrays

    found = {}
    for text in given:
        layer, separator, file = text.partition("=")
        if not separator or not file.endswith(".npy"):
            raise WrongArgument(f"--counts {text}: is not LAYER=FILE.npy.", hint="advise --embedding lists the layers.")
        found[layer] = read_arrays(Path(file))
    return found


def _apply(name: str, path: Path, options: dict[str, Any], force: bool) -> None:
    """Only lists the tables: who applies a setting has made a choice, and the fits for estimates take time."""
    from keras_efficient.atomic import check_apart, check_target, replacing

    if path.suffix.lower() != ".keras":
        raise WrongArgument(f"--apply {path}: a model is written.", hint="Give a name that ends in .keras.")
    check_apart([Path(name)], [path])
    check_target(path, overwrite=force)
    counts = _counts(options.pop("counts", []))
    frozen = options.pop("freeze", False)
    model = _open(name)
    from keras_efficient.compress import embeddings  # as above

    tables = embeddings.advise_embeddings(model, ratios=())
    _check_any(name, tables)
    with out.stages("compressing"), out.hushed():
        compressed = embeddings.compress_embeddings(model, counts=counts, frozen=frozen, **options)
    with out.stages("saving"), out.hushed(), replacing(path, overwrite=force) as temporary:
        compressed.save(temporary)
    _show_applied(name, path, model, compressed, tables, frozen)


def _open(name: str) -> keras.Model:
    from keras_efficient.cli.models import open_keras

    return open_keras(name)


def _check_any(name: str, tables: list[EmbeddingAdvice]) -> None:
    if not tables:
        raise WrongArgument(
            f"{name}: has no embedding table that could be compressed.",
            hint="Looked for keras.layers.Embedding, and for CompressedEmbedding that compresses nothing.",
        )


def _show_applied(
    name: str, path: Path, model: keras.Model, compressed: keras.Model, tables: list[EmbeddingAdvice], frozen: bool
) -> None:
    from keras_efficient.compress import embeddings

    before, after = embeddings.weights_nbytes(model), embeddings.weights_nbytes(compressed)
    left = {table.path for table in embeddings.advise_embeddings(compressed, ratios=())}
    applied = {
        "output": str(path),
        "file_nbytes": path.stat().st_size,
        "nbytes_before": before,
        "nbytes_after": after,
        "ratio": before / after,
        "replaced": [table.path for table in tables if table.path not in left],
        "left": [table.path for table in tables if table.path in left],
    }
    shown: dict[str, Any] = {
        "written": f"{path}, {applied['file_nbytes']:,} bytes",
        "replaced": applied["replaced"],
        "left as they are": applied["left"],
        "bytes of weights": f"{before:,} before, {after:,} after: {before / after:.3g} times less",
        "next": [
            "Measure it: nothing was trained since. A few epochs at a low rate help the scaled form much.",
            "Open it in Python after `import keras_efficient.layers`.",
        ],
    }
    if not frozen:
        shown["next"].append("The file holds floats, to be trained; --freeze or an export makes the bytes so few.")
    out.record({"model": name, "nbytes": before, "tables": _plain(tables), "applied": applied}, shown=shown)


def _plain(tables: list[EmbeddingAdvice]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(table) for table in tables]


def _table_row(table: EmbeddingAdvice) -> dict[str, Any]:
    if not table.worth_it:
        advice = "not worth it (under 64 KiB)"
    elif all(setting.nbytes is None for setting in table.settings):
        advice = "too narrow for these ratios"
    else:
        advice = "see below"
    return {**dataclasses.asdict(table), "share": f"{table.share:.1%}", "advice": advice}


def _setting_row(table: EmbeddingAdvice, setting: EmbeddingSetting) -> dict[str, Any]:
    row = {**dataclasses.asdict(setting), "path": table.path, "compression": f"{setting.compression:g}×"}
    if setting.nbytes is None:
        return {**row, "table_error": f"impossible: {setting.largest:g}× at most", "sampled": ""}
    return {**row, "table_error": f"{setting.table_error:.4f}", "sampled": f"{setting.sampled:,}"}


_EXPLANATION = (
    "table error: the part of the vectors' squared length that is lost before any training, of the rows that were "
    "tried. An estimate of how far they move, not of the model's quality."
)

_ESTIMATES = (
    "Times are estimates for an {device}, not measured: at one end of a range all is hidden behind other work that can "
    "be, at the other nothing is.\nChannels: kernels compute in float16, of which 8 numbers are moved at once; in "
    "int8, which of GPUs only the target tensorrt has, these are 16: take multiples of 16 there."
)
