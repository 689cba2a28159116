"""`keras-efficient zoo`: which models there are, and what is known about them. Reads cards only."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keras_efficient.cli.output import out

if TYPE_CHECKING:
    from keras_efficient.zoo.schema import Card, Metric

__all__ = ["app"]

app = typer.Typer(help="Pretrained models: list them, show their cards.", no_args_is_help=True)

_COLUMNS = {
    "name": "name",
    "task": "task",
    "parameters": "weights",
    "bytes": "bytes",
    "quality": "quality",
    "licence": "licence",
}


class Format(StrEnum):
    """How a card is printed."""

    table = "table"
    json = "json"
    hub = "hub"
    arm = "arm"


@app.command("list")
def list_models(
    pattern: Annotated[str, typer.Argument(help="Shell wildcards, such as 'sesr-*-x2'.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of objects.")] = False,
) -> None:
    """List the models of the zoo."""
    from keras_efficient import zoo

    out.begin(as_json=as_json)
    rows = [_row(zoo.card(name)) for name in zoo.list_models(pattern)]
    if not rows:
        out.message(f"No model is called {pattern!r}.")
    out.rows([{**row, "quality": _quality(row["metrics"])} if not as_json else row for row in rows], _COLUMNS)


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="A model out of `zoo list`.")],
    format_: Annotated[
        Format, typer.Option("--format", help="For people; all data; a README for a model hub; Arm's definition.yaml.")
    ] = Format.table,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Show all that is known about one model."""
    from keras_efficient import zoo
    from keras_efficient.zoo import formats
    from keras_efficient.zoo.schema import to_dict

    out.begin(as_json=as_json or format_ is Format.json)
    card = zoo.card(name)
    if format_ is Format.hub and not as_json:
        out.text(formats.to_hub(card))
    elif format_ is Format.arm and not as_json:
        out.text(formats.to_arm(card))
    else:
        out.record(to_dict(card), shown=_shown(card))


def _row(card: Card) -> dict[str, Any]:
    metrics = [
        {"name": m.name, "value": m.value, "unit": m.unit, "dataset": m.dataset, "protocol": m.protocol}
        for m in card.metrics
    ]
    return {
        "name": card.name,
        "system": card.system,
        "task": card.task,
        "summary": card.summary,
        "parameters": card.parameters,
        "bytes": card.weights.size,
        "metrics": metrics,
        "licence": card.licence,
    }


def _quality(metrics: list[dict[str, Any]]) -> str:
    """The first few metrics in short; the card has all."""
    return ", ".join(f"{m['dataset']} {m['value']:.4g} {m['unit'] or m['name']}" for m in metrics[:3])


def _shown(card: Card) -> dict[str, Any]:
    def tensors(items: Any) -> list[str]:
        return [f"{t.name} {_shape(t.shape)} {t.dtype}: {t.meaning}" for t in items]

    arguments = ", ".join(f"{key}={value!r}" for key, value in card.builder.arguments.items())
    return {
        "name": card.name,
        "summary": card.summary,
        "task": f"{card.task} ({card.system})",
        "builder": f"models.{card.builder.function}({arguments})",
        "weights": f"{card.parameters:,} when deployed; {card.weights.file}, {card.weights.size:,} bytes",
        "sha256": card.weights.sha256,
        "takes": tensors(card.preprocessing.inputs),
        "gives": tensors(card.preprocessing.outputs),
        "facts": dict(card.preprocessing.facts),
        "quality": [_metric(metric) for metric in card.metrics],
        "trained on": [f"{item.data} ({item.terms})" for item in card.trained_on],
        "recipe": f"{card.recipe.command} (seed {card.recipe.seed})",
        "exports": [f"{e.target} {e.precision}: {e.bytes:,} bytes, largest error {e.error:.3g}" for e in card.exports],
        "licence": card.licence,
        "paper": card.paper and f"{card.paper.title}: {card.paper.url}",
        "limits": list(card.limitations),
    }


def _metric(metric: Metric) -> str:
    return f"{metric.dataset}: {metric.name} {metric.value:g} {metric.unit or ''} ({metric.protocol})"


def _shape(shape: tuple[int | None, ...]) -> str:
    return "×".join("?" if size is None else str(size) for size in shape)
