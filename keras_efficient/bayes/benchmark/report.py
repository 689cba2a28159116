"""Results as a table of means, and as one HTML page that needs nothing else."""

from __future__ import annotations

import html
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_efficient import plot
from keras_efficient.bayes import tasks
from keras_efficient.bayes.benchmark import scores
from keras_efficient.bayes.benchmark.results import Results

__all__ = ["Mean", "means", "page"]

HIGHER = ("auroc", "aupr", "agreement")  # parts of names of metrics of which more is better
NEUTRAL = ("coverage", "empty", "expected_cost")  # of which neither is
# Headings of the test set's tables, and how their metrics begin; what begins otherwise is in the first.
TABLES = {
    "Mistakes, found by uncertainty": ("misclassification_",),
    "Answers for the surest only": ("risk_", "aurc"),
    "Conformal sets": ("conformal_",),
    "Decisions": ("total_cost", "mean_cost", "expected_cost"),
    "Fidelity": ("agreement", "total_variation"),
}
ACRONYMS = ("nll", "ece", "auroc", "aupr", "aurc", "fpr95", "ess")


@dataclass(frozen=True)
class Mean:
    """A metric of a method, over seeds.

    Attributes:
        method, split, metric: of what.
        mean: over seeds.
        standard_error: of the mean; `None` for one seed.
        seeds: how many.
        is_best: whether no other method is better by more than two standard errors of the difference: several are best
            where they tie. `None` where there is no better and worse, or one method only.
    """

    method: str
    split: str
    metric: str
    mean: float
    standard_error: float | None
    seeds: int
    is_best: bool | None = None


def means(rows: Iterable[Mapping[str, Any]]) -> list[Mean]:
    """Means over seeds of tidy rows, ties marked."""
    values: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["value"] is not None and row["split"] is not None:
            values[row["split"], row["metric"]][row["method"]].append(float(row["value"]))
    found = []
    for (split, metric), methods in values.items():
        one = [
            Mean(method, split, metric, float(np.mean(some)), _standard_error(some), len(some))
            for method, some in methods.items()
        ]
        found += _with_ties(one)
    return found


def _standard_error(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def _with_ties(some: list[Mean]) -> list[Mean]:
    metric = some[0].metric
    if len(some) < 2 or some[0].split == "train" or any(part in metric for part in NEUTRAL):
        return some
    sign = -1 if any(part in metric for part in HIGHER) else 1
    best = min(some, key=lambda one: sign * one.mean)
    found = []
    for one in some:
        width = 2 * math.hypot(one.standard_error or 0.0, best.standard_error or 0.0)
        found.append(Mean(**{**vars(one), "is_best": sign * (one.mean - best.mean) <= width}))
    return found


def page(results: Results) -> str:
    """One HTML page: the table, reliability, risk over coverage, NLL over members, NLL over cost, and what failed."""
    rows = results.rows()
    title = f"Bayesian networks: {results.name}"
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    head += f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
    found = means(rows)
    seeds = max((one.seeds for one in found), default=0)
    about = f"{len({row['method'] for row in rows})} methods, {seeds} seed{'s' if seeds != 1 else ''}. "
    about += (
        "Each seed is a run of its own: means over seeds ± standard errors, in bold what no other method beats by more "
        "than two standard errors of the difference."
        if seeds > 1
        else "In bold the best; whether it is more than chance takes several seeds."
    )
    body = [f"<h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>"]
    reference = next((scores.reference_of(cell["spec"]["tasks"]) for _, _, cell in results.cells()), None)
    for heading, some in _sections(found).items():
        heading = f"Fidelity to {reference}" if heading == "Fidelity" else heading
        body.append(f"<h2>{html.escape(heading)}</h2>{_table(some)}")
    body.append(_figures(results, found))
    body.append(_training(found))
    body.append(_failures(rows))
    return f"{head}<body>{''.join(body)}</body></html>\n"


def _sections(found: Iterable[Mean]) -> dict[str, list[Mean]]:
    """Means by the heading of their table."""
    sections: dict[str, list[Mean]] = {"Test set": []}
    for one in found:
        if one.split == "train" or (one.split == "shift" and one.metric[-1].isdigit()):
            continue  # severities are in a plot
        heading = "Test set" if one.split == "test" else one.split.replace("outside/", "Against ")
        if one.split.startswith("file/"):
            heading = "File: " + ", ".join(one.split.split("/")[1:])
        heading = "Shifted test set, mean over corruptions" if one.split == "shift" else heading
        for name, begins in TABLES.items():
            if one.split == "test" and one.metric.startswith(begins):
                heading = name
        sections.setdefault(heading, []).append(one)
    return {heading: some for heading, some in sections.items() if some}


def _table(found: Sequence[Mean]) -> str:
    metrics = list(dict.fromkeys(one.metric for one in found))
    cells = {(one.method, one.metric): one for one in found}
    # As many decimals in all of a column, four digits of its largest value.
    largest = {metric: max(abs(one.mean) for one in found if one.metric == metric) for metric in metrics}
    decimals = {
        metric: min(max(3 - math.floor(math.log10(value)), 0), 5) if value else 0 for metric, value in largest.items()
    }
    lines = []
    for method in dict.fromkeys(one.method for one in found):
        values = "".join(f"<td>{_value(cells.get((method, metric)), decimals[metric])}</td>" for metric in metrics)
        lines.append(f"<tr><th>{html.escape(method)}</th>{values}</tr>")
    heads = "".join(f"<th>{html.escape(_words(metric))}</th>" for metric in ["method", *metrics])
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _words(metric: str) -> str:
    for start in ("misclassification_", "conformal_"):
        metric = metric.removeprefix(start)
    return " ".join(word.upper() if word in ACRONYMS else word for word in metric.split("_"))


def _value(one: Mean | None, decimals: int) -> str:
    if one is None:
        return "–"
    error = "" if one.standard_error is None else f" <small>± {one.standard_error:.{decimals}f}</small>"
    text = f"{one.mean:.{decimals}f}{error}"
    return f"<b>{text}</b>" if one.is_best else text


def _figures(results: Results, found: Sequence[Mean]) -> str:
    """Plots of each method's first seed; the legend is one for all."""
    kept: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, label, cell in results.cells():
        if label not in kept and cell["failed"] is None:
            predictions = results.predictions(name)
            if "logits/test" in predictions:
                kept[label] = scores.probabilities(predictions, "test"), predictions["labels"]
    if not kept:
        return ""
    colours = {label: _COLOURS[place % len(_COLOURS)] for place, label in enumerate(kept)}
    drawings = [
        ("Reliability", _reliability(kept, colours)),
        ("Risk and coverage", _risk(kept, colours)),
        ("NLL and members", _members(kept, colours)),
        ("NLL and severity of a shift", _severities(found, colours)),
        ("NLL and cost of training", _cost(found, colours)),
        ("NLL and latency", _latency(found, colours)),
    ]
    figures = "".join(f"<figure><figcaption>{name}</figcaption>{svg}</figure>" for name, svg in drawings if svg)
    keys = plot.legend([plot.Line(label, [], [], colour=colour) for label, colour in colours.items()])
    note = (
        "Reliability, risk and members: the first seed's test set. Reliability: accuracy of 15 bins of as many "
        "examples; on the grey line confidence is right. Risk: mistakes among the surest part. Members: the mean over "
        "the first so many. Severity: the mean over seeds and corruptions; 0 is the test set as it is."
    )
    return f'<h2>Curves</h2>{keys}<div class="plots">{figures}</div><p class="note">{note}</p>'


Kept = Mapping[str, tuple[np.ndarray, np.ndarray]]


def _reliability(kept: Kept, colours: Mapping[str, str]) -> str:
    drawn = []
    for label, (p, y) in kept.items():
        curve = tasks.reliability(p, y, adaptive=True)
        drawn.append(plot.Line(label, list(curve["confidence"]), list(curve["accuracy"]), colour=colours[label]))
    low = math.floor(10 * min(min(min(one.x), min(one.y)) for one in drawn)) / 10
    drawn.insert(0, plot.Line("confidence is right", [low, 1.0], [low, 1.0], colour="#94a3b8"))
    return plot.lines(drawn, x="confidence", y="accuracy", least=low, is_log=False)


def _risk(kept: Kept, colours: Mapping[str, str]) -> str:
    drawn = []
    for label, (p, y) in kept.items():
        curve = tasks.risk_coverage(p, y)
        some = np.unique(np.linspace(0, len(curve["risk"]) - 1, 60).astype(int))
        some = some[curve["coverage"][some] >= 0.2]  # the risk of a few examples is noise
        xs, ys = list(curve["coverage"][some]), list(curve["risk"][some])
        drawn.append(plot.Line(label, xs, ys, colour=colours[label]))
    most = max(max(max(one.y) for one in drawn) * 1.05, 1e-3)
    return plot.lines(drawn, x="coverage", y="risk", most=most, is_log=False)


def _members(kept: Kept, colours: Mapping[str, str]) -> str:
    drawn = []
    for label, (p, y) in kept.items():
        counts = sorted({*(2**power for power in range(10) if 2**power <= len(p)), len(p)})
        values = [tasks.prediction(p[:count], y)["nll"] for count in counts]
        drawn.append(plot.Line(label, counts, values, colour=colours[label]))
    low, high = _range([value for one in drawn for value in one.y])
    return plot.lines(drawn, x="members", y="NLL", least=low, most=high)


def _severities(found: Sequence[Mean], colours: Mapping[str, str]) -> str:
    values: dict[str, dict[int, float]] = defaultdict(dict)
    for one in found:
        if (one.split, one.metric) == ("test", "nll"):
            values[one.method][0] = one.mean
        elif one.split == "shift" and one.metric.startswith("nll_") and one.metric[4:].isdigit():
            values[one.method][int(one.metric[4:])] = one.mean
    drawn = [
        plot.Line(label, sorted(some), [some[level] for level in sorted(some)], colour=colours[label])
        for label, some in values.items()
        if label in colours and len(some) > 1
    ]
    if not drawn:
        return ""
    most = max(max(one.y) for one in drawn) * 1.05
    return plot.lines(drawn, x="severity", y="NLL", most=most, is_log=False)


def _cost(found: Sequence[Mean], colours: Mapping[str, str]) -> str:
    values = {(one.method, one.metric): one.mean for one in found if one.split in ("test", "train")}
    points = [
        (label, values[label, "seconds"], values[label, "nll"])
        for label in colours
        if (label, "seconds") in values and (label, "nll") in values
    ]
    return _front(points, colours, "seconds of training")


def _latency(found: Sequence[Mean], colours: Mapping[str, str]) -> str:
    """Of the files that ran here."""
    values = {(one.method, one.split, one.metric): one.mean for one in found if one.split.startswith("file/")}
    points = [
        (method, value, values[method, split, "nll"])
        for (method, split, metric), value in values.items()
        if metric == "latency_ms" and (method, split, "nll") in values
    ]
    return _front(points, colours, "milliseconds of a file")


def _front(points: Sequence[tuple[str, float, float]], colours: Mapping[str, str], x: str) -> str:
    """Methods' costs and NLLs as points, and the line of those that no other beats in both."""
    if len(points) < 2:
        return ""
    front: list[tuple[float, float]] = []
    for _, cost, nll in sorted(points, key=lambda one: one[1:]):
        if not front or nll < front[-1][1]:
            front.append((cost, nll))
    xs, ys = zip(*front, strict=True)
    drawn = [plot.Line("best for its cost", xs, ys, colour="#94a3b8")]
    drawn += [plot.Line(label, [cost], [nll], colour=colours[label], is_thick=True) for label, cost, nll in points]
    low, high = _range([nll for _, _, nll in points])
    return plot.lines(drawn, x=x, y="NLL", least=low, most=high)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Of an axis, with some room; values far above most are cut off."""
    low, high = min(values), min(max(values), 3 * float(np.median(values)))
    room = 0.08 * (high - low) or 0.01
    return low - room, high + room


def _training(found: Sequence[Mean]) -> str:
    some = [one for one in found if one.split == "train"]
    return f"<h2>Training</h2>{_table(some)}" if some else ""


def _failures(rows: Sequence[Mapping[str, Any]]) -> str:
    failed = [row for row in rows if row["metric"] == "failed"]
    if not failed:
        return ""
    items = "".join(
        f"<li>{html.escape(row['method'])}, seed {row['seed']}: {html.escape(row['reason'])}</li>" for row in failed
    )
    return f"<h2>What failed</h2><ul>{items}</ul>"


_COLOURS = (plot.OURS, *plot.COLOURS, "#f97316", "#2dd4bf", "#c084fc", "#f472b6", "#a16207", "#3b82f6", "#059669")
_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:84rem;margin:2rem auto;padding:0 1rem;color:#0f172a;
background:#fff}h2{margin-top:2.5rem}table{border-collapse:collapse;font-size:14px}th,td{padding:.3rem .7rem;
text-align:right;border-bottom:1px solid #e2e8f0;white-space:nowrap}tr>:first-child{text-align:left;position:sticky;
left:0;background:#fff}thead th{vertical-align:bottom;white-space:normal}.scroll{overflow-x:auto}small{color:#64748b}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(32rem,100%),1fr));gap:1rem}figure{margin:0}
figcaption{font-weight:600}svg{width:100%;height:auto}text{font:12px system-ui,sans-serif;fill:#475569}
.grid{stroke:#cbd5e1;fill:none}.note{color:#64748b;font-size:14px}.legend{display:flex;flex-wrap:wrap;gap:.2rem 1rem;
font-size:14px}.legend i{display:inline-block;width:1.2rem;height:.25rem;margin-right:.4rem;vertical-align:middle}
@media(prefers-color-scheme:dark){body,tr>:first-child{background:#0f172a;color:#e2e8f0}th,td{border-color:#334155}
text{fill:#cbd5e1}.grid{stroke:#334155}.note,small{color:#94a3b8}}"""
