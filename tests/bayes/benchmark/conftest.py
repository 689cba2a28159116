"""A small suite, and outcomes that cost no training."""

from __future__ import annotations

import numpy as np
import pytest

from keras_efficient.bayes.benchmark import Outcome, Suite

LABELS = np.arange(12) % 3


def made_up(spec, *, members=2):
    """An outcome as `run_cell` has it, of numbers that hang on the cell alone."""
    random = np.random.default_rng([spec["seed"], len(str(spec["method"]))])
    logits = random.normal(size=(members, 12, 3)).astype(np.float32)
    rows = [{"split": "test", "metric": "error", "value": float(random.random())}]
    return Outcome(rows, {"labels": LABELS, "logits/test": logits}, {"fit": 1.0, "predict": 1.0})


def pretended(cells):
    """An engine."""
    for cell in cells:
        yield cell, made_up(cell.spec)


@pytest.fixture
def small():
    """Cells that take a second each."""

    def suite(*, methods=None, seeds=(0,), tasks=None, **data):
        methods = methods or {
            "MAP": {"name": "MAP", "epochs": 1},
            "two": {"name": "DeepEnsemble", "members": 2, "epochs": 1},
        }
        found = {"name": "digits", "limit": 128, "test_limit": 64, **data}
        model = {"name": "mlp", "width": 4, "depth": 1}
        return Suite("small", found, model, methods, seeds, tasks or {"prediction": {}})

    return suite
