"""From cached predictions to rows: which inputs the tasks of a suite need, and what they say of the answers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_efficient import export
from keras_efficient.bayes import tasks
from keras_efficient.bayes.benchmark import devices
from keras_efficient.bayes.corruptions import CORRUPTIONS, SEVERITIES
from keras_efficient.bayes.exporting import MODES
from keras_efficient.bayes.posterior import softmax
from keras_efficient.errors import UnknownName, WrongArgument

if TYPE_CHECKING:
    from keras_efficient.bayes.datasets import Splits

__all__ = [
    "TASKS",
    "averaged",
    "check",
    "fidelity_rows",
    "inputs",
    "plain",
    "probabilities",
    "reference_of",
    "rehearse",
    "rows",
]

REFERENCE = "HMC"  # the method, where `fidelity` names none

Row = dict[str, Any]
Predictions = Mapping[str, np.ndarray]
Options = Mapping[str, Mapping[str, Any]]


def check(wanted: Options) -> None:
    """Refuses unknown tasks, options and corruptions.

    Raises:
        UnknownName: the nearest known name is the hint.
        WrongArgument: another severity.
    """
    for task, options in wanted.items():
        if task not in TASKS:
            raise UnknownName("task", str(task), TASKS)
        known = [name for name in inspect.signature(TASKS[task]).parameters if name not in ("predictions", "seed")]
        for name in options:
            if name not in known:
                raise UnknownName(f"option of task {task!r}", str(name), known)
    shift = wanted.get("shift", {})
    for name in shift.get("corruptions", ()):
        if name not in CORRUPTIONS:
            raise UnknownName("corruption", str(name), CORRUPTIONS)
    for severity in shift.get("severities", ()):
        if severity not in SEVERITIES:
            raise WrongArgument(f"A severity is one of {', '.join(map(str, SEVERITIES))}, not {severity!r}.")
    files = wanted.get("export", {})
    for kind, names in (("mode", tuple(MODES)), ("target", tuple(export.targets))):
        for name in files.get(f"{kind}s", ()):
            if name not in names:
                raise UnknownName(kind, str(name), names)
    for name in files.get("targets", ()):
        precisions = export.targets[name].precisions
        if files.get("precision", "float32") not in precisions:
            raise UnknownName(f"precision of {name}", str(files.get("precision", "float32")), precisions)


def inputs(wanted: Options, splits: Splits, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Name and inputs of each split that the tasks need."""
    yield "test", splits.test.x
    for name, spec in wanted.get("out_of_distribution", {}).get("outside", {}).items():
        yield f"outside/{name}", splits.outside(spec)
    if "shift" in wanted:
        options = wanted["shift"]
        for corruption in options.get("corruptions", CORRUPTIONS):
            for severity in options.get("severities", SEVERITIES):
                yield f"shift/{corruption}/{severity}", splits.corrupted(corruption, severity, seed)


def rows(wanted: Options, predictions: Predictions, seed: int) -> list[Row]:
    """What the tasks measure of predictions: `split, metric, value` each, a value of `None` being not defined."""
    found: list[Row] = []
    for task, options in wanted.items():
        for split, metrics in TASKS[task](predictions, seed, **options):
            found += [{"split": split, "metric": name, "value": plain(value)} for name, value in metrics.items()]
    return found


def rehearse(wanted: Options, classes: int) -> None:
    """Measures made-up predictions, so that options that no task takes are refused before anything is trained.

    Raises:
        WrongArgument, TypeError, ValueError: what a task says.
    """
    made: dict[str, np.ndarray] = {"labels": np.arange(4 * classes) % classes}
    some = np.random.default_rng(0).normal(size=(2, 4 * classes, classes)).astype(np.float32)
    for name in ("test", *(f"outside/{one}" for one in wanted.get("out_of_distribution", {}).get("outside", {}))):
        made[f"logits/{name}"] = some
    if "shift" in wanted:
        made["logits/shift/made up/1"] = some
    rows(wanted, made, 0)


def probabilities(predictions: Predictions, split: str) -> np.ndarray:
    """(members, n, classes) of logits that are kept."""
    return softmax(predictions[f"logits/{split}"].astype(np.float64))


def averaged(logits: np.ndarray) -> np.ndarray:
    """Logits of one member, (1, n, classes), whose probabilities are the means of those of (members, n, classes)."""
    parts = [logits[:, start : start + 1024].astype(np.float64) for start in range(0, logits.shape[1], 1024)]
    logs = [part - np.logaddexp.reduce(part, axis=-1, keepdims=True) for part in parts]
    means = [np.logaddexp.reduce(one, axis=0, keepdims=True) - math.log(len(one)) for one in logs]
    return np.concatenate(means, axis=1).astype(np.float32)


def reference_of(wanted: Options) -> str | None:
    """The method that `fidelity` holds the others against; `None`: the task is not wanted."""
    return wanted["fidelity"].get("reference", REFERENCE) if "fidelity" in wanted else None


def fidelity_rows(predictions: Predictions, reference: Predictions) -> list[Row]:
    """Nearness of a cell's predictions to those of another one."""
    metrics = tasks.fidelity(probabilities(predictions, "test"), probabilities(reference, "test"))
    return [{"split": "test", "metric": name, "value": plain(value)} for name, value in metrics.items()]


Found = Iterator[tuple[str, Mapping[str, float | None]]]


def _prediction(predictions: Predictions, seed: int) -> Found:
    yield "test", tasks.prediction(probabilities(predictions, "test"), predictions["labels"])


def _misclassification(predictions: Predictions, seed: int) -> Found:
    found = tasks.misclassification(probabilities(predictions, "test"), predictions["labels"])
    yield "test", {f"misclassification_{name}": value for name, value in found.items()}


def _selective(predictions: Predictions, seed: int, coverages: Any = (0.5, 0.8, 0.9, 0.95)) -> Found:
    found = tasks.selective_prediction(
        probabilities(predictions, "test"), predictions["labels"], coverages=tuple(coverages)
    )
    yield "test", found


def _outside(predictions: Predictions, seed: int, outside: Mapping[str, Any] | None = None) -> Found:
    for name in outside or {}:
        split = f"outside/{name}"
        logits = predictions["logits/test"], predictions[f"logits/{split}"]
        pair = [probabilities(predictions, one) for one in ("test", split)]
        yield split, tasks.out_of_distribution(*pair, logits=logits)


def _decisions(
    predictions: Predictions, seed: int, classes: Any = (), cost: float = 1.0, other_cost: float = 0.1
) -> Found:
    p = probabilities(predictions, "test")
    rare = tasks.RareClasses(tuple(classes), cost, 1.0, other_cost)
    yield "test", tasks.decisions(p, predictions["labels"], rare.costs(p.shape[-1]))


def _shift(predictions: Predictions, seed: int, corruptions: Any = None, severities: Any = None) -> Found:
    answers = {}
    for name in predictions:
        if name.startswith("logits/shift/"):
            _, _, corruption, severity = name.split("/")
            answers[corruption, int(severity)] = probabilities(predictions, name.removeprefix("logits/"))
    yield "shift", tasks.shift(answers, predictions["labels"])


def _conformal(predictions: Predictions, seed: int, alpha: float = 0.1, method: Any = "lac") -> Found:
    """The halves of the test set are drawn: one calibrates, the other is measured."""
    p, y = probabilities(predictions, "test"), predictions["labels"]
    order = np.random.default_rng(seed).permutation(len(y))
    halves = [(p[:, part], y[part]) for part in np.array_split(order, 2)]
    found = tasks.conformal(*halves, alpha=alpha, method=method, seed=seed + 1)
    yield "test", {f"conformal_{name}": value for name, value in found.items()}


def _fidelity(predictions: Predictions, seed: int, reference: str = REFERENCE) -> Found:
    """It needs another cell's predictions: `Results.rows` adds it."""
    yield from ()


def _export(
    predictions: Predictions,
    seed: int,
    modes: Any = ("ensemble",),
    targets: Any = ("tflite",),
    precision: str = "float32",
    members: int | None = None,
    examples: int = 1000,
) -> Found:
    """Files were written and run by `devices.files`; those that did not run here have figures only."""
    for name, figures in predictions.items():
        kind, _, rest = name.partition("/")
        if kind == "file" and name.endswith("/refused"):
            yield f"file/{rest.removesuffix('/refused')}", {"refused": 1.0}
        if kind != "file" or not name.endswith("/figures"):
            continue
        known = {key: value for key, value in zip(devices.FIGURES, figures, strict=True) if math.isfinite(value)}
        answers = predictions.get(name.replace("/figures", "/probabilities"))
        if answers is not None:
            found = tasks.prediction(_normalised(answers), predictions["labels"][: len(answers)])
            known |= {key: found[key] for key in ("error", "nll_smoothed", "nll")}
        yield f"file/{rest.removesuffix('/figures')}", known


def _normalised(values: np.ndarray) -> np.ndarray:
    """Rounded probabilities need not add up to 1."""
    values = np.maximum(values.astype(np.float64), 0.0)
    found: np.ndarray = values / np.maximum(values.sum(axis=-1, keepdims=True), 1e-12)
    return found


TASKS: dict[str, Callable[..., Found]] = {
    "prediction": _prediction,
    "misclassification": _misclassification,
    "selective": _selective,
    "out_of_distribution": _outside,
    "decisions": _decisions,
    "shift": _shift,
    "conformal": _conformal,
    "fidelity": _fidelity,
    "export": _export,
}


def plain(value: float | None) -> float | None:
    """JSON has no NaN."""
    return None if value is None or not math.isfinite(value) else float(value)
