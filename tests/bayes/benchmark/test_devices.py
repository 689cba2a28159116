"""A posterior's files as a task."""

from __future__ import annotations

import numpy as np
import pytest

from keras_efficient.bayes.benchmark import Benchmark, Results
from keras_efficient.errors import UnknownName


def test_files_are_run_and_measured(small, tmp_path):
    wanted = {"modes": ["mean", "ensemble"], "targets": ["tflite", "ethos-u55-128"], "precision": "int8"}
    suite = small(tasks={"prediction": {}, "export": {**wanted, "examples": 40}})
    rows = Benchmark(suite, tmp_path).run()
    found = {(row["method"], row["split"], row["metric"]): row["value"] for row in rows if row["method"] == "two"}
    # Two maxima have no mean.
    assert {split for _, split, metric in found if metric == "refused"} == {
        "file/tflite/int8/mean",
        "file/ethos-u55-128/int8/mean",
    }
    assert {split for _, split, metric in found if split.startswith("file/") and metric != "refused"} == {
        "file/tflite/int8/ensemble",
        "file/ethos-u55-128/int8/ensemble",
    }
    on_processor = {metric for _, split, metric in found if split == "file/tflite/int8/ensemble"}
    assert on_processor == {"bytes", "latency_ms", "error", "nll", "nll_smoothed"}
    on_npu = {
        metric: value for (_, split, metric), value in found.items() if split == "file/ethos-u55-128/int8/ensemble"
    }
    assert set(on_npu) == {"bytes", "memory_bytes", "npu_ms"}
    assert min(on_npu.values()) > 0
    results = Results(tmp_path)
    for name, label, _ in results.cells():
        kept = results.predictions(name)
        if label == "two":
            answers = kept["file/tflite/int8/ensemble/probabilities"]
            logits = kept["logits/test"][:, :40].astype(np.float64)
            powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
            expected = (powers / powers.sum(axis=-1, keepdims=True)).mean(axis=0)
            np.testing.assert_allclose(answers, expected, atol=0.05)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"modes": ["ensembel"]}, "ensemble"),
        ({"targets": ["tflit"]}, "tflite"),
        ({"targets": ["tflite"], "precision": "int9"}, "int8"),
        ({"mode": ["mean"]}, "modes"),
    ],
)
def test_unknown_names(small, options, hint):
    with pytest.raises(UnknownName, match=hint):
        small(tasks={"export": options})
