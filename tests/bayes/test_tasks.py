"""Measures by hand, and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest

from keras_efficient.bayes import tasks
from keras_efficient.errors import WrongArgument

RNG = np.random.default_rng(0)


def binary(confidences):
    return np.array([[one, 1 - one] for one in confidences])


def test_calibration_by_hand():
    p, y = binary([0.6, 0.6, 0.9, 0.9]), np.array([0, 1, 0, 0])
    assert tasks.calibration_error(p, y, bins=2) == pytest.approx(abs((0.6 + 0.6 + 0.9 + 0.9) / 4 - 0.75))
    assert tasks.calibration_error(p, y, bins=4) == pytest.approx(0.5 * 0.1 + 0.5 * 0.1)
    assert tasks.calibration_error(p, y, bins=2, adaptive=True) == pytest.approx(0.1)


def test_an_edge_belongs_to_the_lower_bin_and_one_to_the_last():
    p = binary([0.6, 0.8, 1.0])
    assert tasks.calibration_error(p, np.array([1, 0, 0]), bins=5) == pytest.approx((0.6 + 0.2 + 0.0) / 3)


def test_brier_by_hand():
    assert tasks.prediction(np.array([[0.7, 0.2, 0.1]]), np.array([0]))["brier"] == pytest.approx(0.14)


def test_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    p = RNG.dirichlet(np.ones(4), size=(3, 200))
    y = RNG.integers(4, size=200)
    found = tasks.prediction(p, y)
    assert found["nll"] == pytest.approx(metrics.log_loss(y, p.mean(axis=0), labels=range(4)))
    assert found["error"] == pytest.approx(1 - metrics.accuracy_score(y, p.mean(axis=0).argmax(axis=1)))
    assert found["nll_smoothed"] == pytest.approx(found["nll"], abs=1e-3)


def test_a_sure_mistake_has_a_bounded_cost():
    found = tasks.prediction(np.array([[1.0, 0.0]]), np.array([1]))
    assert found["nll_smoothed"] == pytest.approx(-np.log(0.5e-4))
    assert np.isfinite(found["nll"])


def test_entropies():
    equal = np.tile(RNG.dirichlet(np.ones(3), size=5), (4, 1, 1))
    assert tasks.uncertainty(equal)["epistemic"] == pytest.approx(0, abs=1e-12)
    apart = tasks.uncertainty(np.array([[[1.0, 0.0]], [[0.0, 1.0]]]))
    assert [float(apart[name][0]) for name in ("total", "aleatoric", "epistemic")] == pytest.approx(
        [np.log(2), 0, np.log(2)]
    )


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 2], [0, -1, 1], [[0, 1, 1]]])
def test_what_does_not_belong_together(labels):
    with pytest.raises(WrongArgument):
        tasks.prediction(np.full((3, 2), 0.5), np.array(labels))
    with pytest.raises(WrongArgument):
        tasks.uncertainty(np.full((3, 2), 0.5))
