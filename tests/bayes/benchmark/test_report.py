"""The report: means and ties as they should be, and a page that is well-formed whatever methods are called."""

from __future__ import annotations

import math
from html.parser import HTMLParser

import numpy as np
import pytest

from keras_efficient.bayes.benchmark import Benchmark, Results
from keras_efficient.bayes.benchmark.report import means, page

from .conftest import made_up, pretended


def rows(metric, split="test", **methods):
    return [
        {"method": method, "seed": seed, "split": split, "metric": metric, "value": value}
        for method, values in methods.items()
        for seed, value in enumerate(values)
    ]


def by_method(found):
    return {one.method: one for one in found}


def test_means_and_standard_errors():
    found = by_method(means(rows("error", a=[0.1, 0.2, 0.6], b=[0.5])))
    assert found["a"].mean == pytest.approx(0.3)
    assert found["a"].standard_error == pytest.approx(np.std([0.1, 0.2, 0.6], ddof=1) / math.sqrt(3))
    assert found["a"].seeds == 3
    assert found["b"].standard_error is None


def test_ties_are_within_two_standard_errors_of_the_difference():
    # Standard errors: 0.01 each for three seeds at ± 0.0173; 2 · √(0.01² + 0.01²) = 0.028.
    near = 0.01 * math.sqrt(3)
    spread = lambda mean: [mean - near, mean, mean + near]  # noqa: E731
    found = by_method(means(rows("nll", a=spread(0.1), b=spread(0.127), c=spread(0.13))))
    assert [found[name].is_best for name in "abc"] == [True, True, False]
    found = by_method(means(rows("misclassification_auroc_total", a=spread(0.1), b=spread(0.127), c=spread(0.13))))
    assert [found[name].is_best for name in "abc"] == [False, True, True]


@pytest.mark.parametrize("metric", ["conformal_coverage", "expected_cost"])
def test_some_metrics_know_no_better(metric):
    assert {one.is_best for one in means(rows(metric, a=[1.0], b=[2.0]))} == {None}


def test_what_training_says_knows_no_better():
    for metric in ("seconds", "rhat_predictions", "temperature", "ess_predictions"):
        assert {one.is_best for one in means(rows(metric, split="train", a=[1.0], b=[2.0]))} == {None}


def test_one_method_is_not_the_best_of_all():
    assert means(rows("nll", a=[0.1, 0.2]))[0].is_best is None


def test_what_is_not_defined_and_what_failed_has_no_mean():
    some = rows("auroc_model", a=[None, 0.5], b=[0.3, 0.4])
    failed = {"method": "c", "seed": 0, "split": None, "metric": "failed", "value": 1.0, "reason": "no"}
    found = by_method(means([*some, failed]))
    assert set(found) == {"a", "b"}
    assert found["a"].seeds == 1


VOID = {"meta", "path", "circle", "polyline", "polygon", "rect", "br"}


class Checker(HTMLParser):
    """Every tag that opens is closed, in its order; nothing is loaded from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.counts, self.cells = [], [], {}, []

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        assert tag not in ("script", "link", "img", "iframe")
        assert not any(name in ("href", "src") or name.startswith("on") for name, _ in attributes)
        for _, value in attributes:
            assert "nan" not in (value or "").lower()
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def checked(text):
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    return checker


def test_the_page_is_well_formed(small, tmp_path):
    methods = {"<b>MAP & more</b>": {"name": "MAP"}, "two": {"name": "DeepEnsemble"}, "three": {"name": "SWA"}}
    suite = small(
        methods=methods,
        seeds=(0, 1),
        tasks={
            **{name: {} for name in ("prediction", "misclassification", "selective", "conformal")},
            "out_of_distribution": {"outside": {"noise": {"name": "noise"}}},
            "shift": {"corruptions": ["rotation", "contrast"], "severities": [1, 3]},
            "fidelity": {"reference": "two"},
        },
    )

    def engine(cells):
        from keras_efficient.bayes.benchmark import Outcome, scores

        for cell in cells:
            if cell.label == "three" and cell.seed == 1:
                yield cell, Outcome(failed="TrainingFailed: <nan>")
                continue
            made, random = made_up(cell.spec), np.random.default_rng(cell.seed)
            names = [
                "outside/noise",
                *(f"shift/{name}/{level}" for name in ("rotation", "contrast") for level in (1, 3)),
            ]
            predictions = {**made.predictions, **{f"logits/{name}": random.normal(size=(2, 12, 3)) for name in names}}
            found = scores.rows(suite.tasks, predictions, cell.seed)
            found.append({"split": "train", "metric": "seconds", "value": float(random.random() + 1)})
            yield cell, Outcome(found, predictions)

    Benchmark(suite, tmp_path, engine).run()
    checker = checked(page(Results(tmp_path)))
    words = " ".join(checker.text)
    assert "<b>MAP & more</b>" in words  # as text
    assert "3 methods, 2 seeds" in words
    for heading in (
        "Test set",
        "Mistakes, found by",
        "Against noise",
        "Shifted test set",
        "Fidelity to two",
        "What failed",
    ):
        assert heading in words, heading
    assert "TrainingFailed: <nan>" in words
    assert checker.counts["figure"] == 5


def test_a_page_of_little(small, tmp_path):
    suite = small()
    Results(tmp_path, suite)
    assert "0 methods" in " ".join(checked(page(Results(tmp_path))).text)
    Benchmark(suite, tmp_path, lambda cells: list(pretended(cells))[:1]).run()
    checked(page(Results(tmp_path)))
