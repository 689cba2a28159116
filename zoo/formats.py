"""A card in the words of others: a model hub's README, and the definition file of Arm's ML-zoo."""

from __future__ import annotations

from typing import Any

from keras_efficient.zoo.schema import Card, Tensor

__all__ = ["to_arm", "to_hub"]

_HUB_TASKS = {"recommendation": "other"}  # hubs refuse a task that they do not know


def to_hub(card: Card) -> str:
    """A README for a model hub: YAML front matter with the results (`model-index`), then text in Markdown.

    Training data stands in the text: the front matter takes names of data sets on the hub only.
    """
    front = {
        "license": card.licence.lower(),
        "library_name": "keras",
        "pipeline_tag": _HUB_TASKS.get(card.task, card.task),
        "tags": ["keras", "keras-efficient", card.system],
        "model-index": [{"name": card.name, "results": [_result(card, metric) for metric in card.metrics]}],
    }
    return f"---\n{_yaml(front)}---\n\n{_text(card)}"


def to_arm(card: Card) -> str:
    """A `definition.yaml` in the layout of Arm's ML-zoo."""
    return _yaml(
        {
            "description": card.summary,
            "network": {
                "filename": card.weights.file,
                "file_size_bytes": card.weights.size,
                "hash": {"algorithm": "sha256", "value": card.weights.sha256},
                "framework": "Keras 3",
                "quality": [
                    {"dataset": m.dataset, "metric": m.name, "value": m.value, "unit": m.unit, "protocol": m.protocol}
                    for m in card.metrics
                ],
                "provenance": {
                    "recipe": card.recipe.command,
                    "seed": card.recipe.seed,
                    "trained_on": [{"data": item.data, "terms": item.terms} for item in card.trained_on],
                },
            },
            "network_parameters": {
                "input_nodes": [_node(tensor) for tensor in card.preprocessing.inputs],
                "output_nodes": [_node(tensor) for tensor in card.preprocessing.outputs],
                "test_tensors": card.golden,
            },
            "benchmark": [
                {"target": e.target, "precision": e.precision, "file_size_bytes": e.bytes, "largest_error": e.error}
                for e in card.exports
            ],
            "license": card.licence,
            "paper": card.paper and card.paper.url,
        }
    )


def _result(card: Card, metric: Any) -> dict[str, Any]:
    name = f"{metric.name} ({metric.unit})" if metric.unit else metric.name
    return {
        "task": {"type": card.task},
        "dataset": {"name": metric.dataset, "type": metric.dataset.lower().replace(" ", "-")},
        "metrics": [{"name": name, "type": metric.name.lower(), "value": metric.value, "args": metric.protocol}],
    }


def _node(tensor: Tensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "type": tensor.dtype,
        "description": tensor.meaning,
        "range": None if tensor.range is None else list(tensor.range),
    }


def _text(card: Card) -> str:
    lines = [f"# {card.name}", "", card.summary, "", "```python", "from keras_efficient import zoo", ""]
    lines += [f'model = zoo.load("{card.name}")', "```", "", f"{card.parameters:,} weights when deployed.", ""]
    lines += ["| data | metric | value | protocol |", "|---|---|---|---|"]
    lines += [f"| {m.dataset} | {m.name} | {m.value:g} {m.unit or ''} | {m.protocol} |" for m in card.metrics]
    lines += ["", "## Inputs and outputs", ""]
    for kind, tensors in (("in", card.preprocessing.inputs), ("out", card.preprocessing.outputs)):
        lines += [f"- {kind}: `{t.name}`, {list(t.shape)}, {t.dtype}: {t.meaning}" for t in tensors]
    lines += ["", "## Trained on", "", *(f"- {item.data} ({item.terms})" for item in card.trained_on)]
    lines += ["", f"Again: `{card.recipe.command}` (seed {card.recipe.seed})", ""]
    lines += ["## Limits", "", *(f"- {text}" for text in card.limitations)]
    if card.paper:
        lines += ["", f"Paper: [{card.paper.title}]({card.paper.url})"]
    return "\n".join(lines) + "\n"


def _yaml(values: Any) -> str:
    import yaml

    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
