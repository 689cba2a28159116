"""Measures by hand, by brute force, and against scikit-learn."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from keras_efficient.bayes import Data, tasks
from keras_efficient.errors import WrongArgument

RNG = np.random.default_rng(0)


def binary(confidences):
    return np.array([[one, 1 - one] for one in confidences])


def dirichlet(*size, classes=4, concentration=1.0):
    return RNG.dirichlet(np.full(classes, concentration), size=size)


def drawn_from(p):
    """Labels for which the probabilities are true."""
    return (p.cumsum(axis=1) < RNG.random((len(p), 1))).sum(axis=1)


def with_members(p, spread=0.3):
    """Three members around each row, as far apart as the spread says."""
    q = (1 - spread) * p + spread * dirichlet(3, len(p), classes=p.shape[1])
    return q / q.sum(axis=-1, keepdims=True)


# Prediction and calibration


def test_calibration_by_hand():
    p, y = binary([0.6, 0.6, 0.9, 0.9]), np.array([0, 1, 0, 0])
    assert tasks.calibration_error(p, y, bins=2) == pytest.approx(abs((0.6 + 0.6 + 0.9 + 0.9) / 4 - 0.75))
    assert tasks.calibration_error(p, y, bins=4) == pytest.approx(0.5 * 0.1 + 0.5 * 0.1)
    assert tasks.calibration_error(p, y, bins=2, adaptive=True) == pytest.approx(0.1)


def test_an_edge_belongs_to_the_lower_bin_and_one_to_the_last():
    p = binary([0.6, 0.8, 1.0])
    assert tasks.calibration_error(p, np.array([1, 0, 0]), bins=5) == pytest.approx((0.6 + 0.2 + 0.0) / 3)
    # With 5 bins 0.6 is the upper edge of the one that 0.55 is in, where a wrong and a right answer meet.
    assert tasks.calibration_error(binary([0.6, 0.55]), np.array([1, 0]), bins=5) == pytest.approx(0.575 - 0.5)


def test_equal_confidences_share_an_adaptive_bin():
    y = np.array([0, 0, 0, 1, 1, 0])
    assert tasks.calibration_error(binary([0.8] * 6), y, bins=3, adaptive=True) == pytest.approx(abs(0.8 - 4 / 6))


def test_adaptive_bins_hold_as_many():
    p = binary(RNG.uniform(0.5, 1, size=60))
    assert tasks.reliability(p, np.zeros(60, int), bins=6, adaptive=True)["share"] == pytest.approx(1 / 6)


def test_reliability_against_a_loop():
    p, y = dirichlet(500), RNG.integers(4, size=500)
    found = tasks.reliability(p, y, bins=10)
    confidence, right = p.max(axis=1), p.argmax(axis=1) == y
    rows = []
    for number in range(10):
        inside = (confidence > number / 10) & (confidence <= (number + 1) / 10)
        if inside.any():
            rows.append((confidence[inside].mean(), right[inside].mean(), inside.mean()))
    for name, column in zip(("confidence", "accuracy", "share"), np.transpose(rows), strict=True):
        np.testing.assert_allclose(found[name], column)


def test_classwise_calibration_by_hand():
    p, y = np.array([[0.6, 0.3, 0.1], [0.6, 0.1, 0.3]]), np.array([0, 1])
    # Class 0: one bin, |.6 − .5|; class 1: |.3 − 0| / 2 and |.1 − 1| / 2; class 2: .1 / 2 and .3 / 2.
    assert tasks.classwise_calibration_error(p, y, bins=10) == pytest.approx((0.1 + 0.6 + 0.2) / 3)
    assert tasks.prediction(p, y)["classwise_ece"] == pytest.approx(tasks.classwise_calibration_error(p, y))


def test_what_is_calibrated_has_no_error_but_chance():
    p = dirichlet(20_000)
    found = tasks.prediction(p, drawn_from(p))
    assert max(found["ece"], found["adaptive_ece"], found["classwise_ece"]) < 0.02
    sharpened = p**3 / (p**3).sum(axis=1, keepdims=True)
    worse = tasks.prediction(sharpened, drawn_from(p))
    assert min(worse["ece"], worse["adaptive_ece"], worse["classwise_ece"]) > 0.05


def test_brier_by_hand():
    assert tasks.prediction(np.array([[0.7, 0.2, 0.1]]), np.array([0]))["brier"] == pytest.approx(0.14)


def test_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="compared with scikit-learn")
    p = dirichlet(3, 200)
    y = RNG.integers(4, size=200)
    found, mean = tasks.prediction(p, y), p.mean(axis=0)
    assert found["nll"] == pytest.approx(metrics.log_loss(y, mean, labels=range(4)))
    assert found["error"] == pytest.approx(1 - metrics.accuracy_score(y, mean.argmax(axis=1)))
    assert found["nll_smoothed"] == pytest.approx(found["nll"], abs=1e-3)
    of_classes = [metrics.brier_score_loss(y == number, mean[:, number]) for number in range(4)]
    assert found["brier"] == pytest.approx(sum(of_classes))


def test_a_sure_mistake_has_a_bounded_cost():
    found = tasks.prediction(np.array([[1.0, 0.0]]), np.array([1]))
    assert found["nll_smoothed"] == pytest.approx(-np.log(0.5e-4))
    assert np.isfinite(found["nll"])


# Uncertainty


def test_entropies():
    equal = np.tile(dirichlet(5, classes=3), (4, 1, 1))
    assert tasks.uncertainty(equal)["epistemic"] == pytest.approx(0, abs=1e-12)
    apart = tasks.uncertainty(np.array([[[1.0, 0.0]], [[0.0, 1.0]]]))
    assert [float(apart[name][0]) for name in ("total", "aleatoric", "epistemic")] == pytest.approx(
        [np.log(2), 0, np.log(2)]
    )


def test_the_split_is_never_negative():
    found = tasks.uncertainty(with_members(dirichlet(300), 1e-9).astype("float32"))
    assert found["epistemic"].min() >= 0
    np.testing.assert_allclose(found["total"], found["aleatoric"] + found["epistemic"], atol=1e-6)


# Misclassification and out-of-distribution


def test_misclassification_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="compared with scikit-learn")
    p = with_members(dirichlet(400))
    p[:, 200:] = p[:, :200]  # each score twice
    y = RNG.integers(4, size=400)
    found, mean = tasks.misclassification(p, y), p.mean(axis=0)
    wrong, entropies = mean.argmax(axis=1) != y, tasks.uncertainty(p)
    unsure = {"confidence": -mean.max(axis=1), "total": entropies["total"], "model": entropies["epistemic"]}
    for by, score in unsure.items():
        assert found[f"auroc_{by}"] == pytest.approx(metrics.roc_auc_score(wrong, score))
        assert found[f"aupr_{by}"] == pytest.approx(metrics.average_precision_score(wrong, score))


def test_one_member_has_no_model_uncertainty():
    p, y = dirichlet(50), RNG.integers(4, size=50)
    for one in (p, p[None]):
        found = tasks.misclassification(one, y)
        assert [name for name, value in found.items() if value is None] == ["auroc_model", "aupr_model", "aurc_model"]


def test_without_mistakes_there_is_nothing_to_find():
    p = dirichlet(20)
    found = tasks.misclassification(p, p.argmax(axis=1))
    assert found["auroc_confidence"] is None
    assert found["aupr_total"] is None
    assert found["aurc_confidence"] == 0


def test_area_under_risk_coverage_by_hand():
    # Surest first: right, wrong, right, right, wrong, wrong.
    p, y = binary([0.95, 0.9, 0.85, 0.8, 0.7, 0.6]), np.array([0, 1, 0, 0, 1, 1])
    expected = np.mean([0, 1 / 2, 1 / 3, 1 / 4, 2 / 5, 3 / 6])
    assert tasks.misclassification(p, y)["aurc_confidence"] == pytest.approx(expected)
    assert tasks.selective_prediction(p, y)["aurc"] == pytest.approx(expected)


def test_equally_sure_examples_count_as_the_mean_over_their_orders():
    p, y = binary([0.9, 0.8, 0.8, 0.8, 0.6]), np.array([0, 1, 0, 0, 1])
    wrong = y[1:4] == 1
    areas = []
    for order in permutations(range(3)):
        mistakes = np.concatenate([[False], wrong[list(order)], [True]]).cumsum()
        areas.append((mistakes / np.arange(1, 6)).mean())
    assert tasks.misclassification(p, y)["aurc_confidence"] == pytest.approx(np.mean(areas))


def test_out_of_distribution_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="compared with scikit-learn")
    inside, outside = with_members(dirichlet(300, concentration=0.3)), with_members(dirichlet(200), 0.6)
    outside[:, :50] = inside[:, :50]  # ties between both
    shift = RNG.normal(size=(3, 500, 1))
    logits = np.log(np.concatenate([inside, outside], axis=1)) + shift
    found = tasks.out_of_distribution(inside, outside, logits=(logits[:, :300], logits[:, 300:]))
    is_outside = np.arange(500) >= 300
    both = np.concatenate([inside, outside], axis=1)
    entropies = tasks.uncertainty(both)
    unsure = {
        "confidence": 1 - both.mean(axis=0).max(axis=1),
        "total": entropies["total"],
        "model": entropies["epistemic"],
        "energy": -shift[..., 0].mean(axis=0),  # probabilities sum to one
    }
    for by, score in unsure.items():
        score = np.round(score, 12)
        assert found[f"auroc_{by}"] == pytest.approx(metrics.roc_auc_score(is_outside, score))
        assert found[f"aupr_{by}"] == pytest.approx(metrics.average_precision_score(is_outside, score))
        false, true, _ = metrics.roc_curve(is_outside, score, drop_intermediate=False)
        assert found[f"fpr95_{by}"] == pytest.approx(false[true >= 0.95].min())


def test_false_positives_with_ties():
    # Of 20 outside inputs 19 are at .6 or below; one inside input is as unsure as that, one is more.
    outside = binary([0.6] * 10 + [0.55] * 9 + [0.9])
    inside = binary([0.6, 0.5, 0.8, 0.99])
    found = tasks.out_of_distribution(inside, outside)
    assert found["fpr95_confidence"] == pytest.approx(2 / 4)
    assert found["auroc_confidence"] == pytest.approx(
        np.mean([(o < i) + (o == i) / 2 for o in outside[:, 0] for i in inside[:, 0]])
    )


def test_energy_needs_logits_and_the_model_members():
    found = tasks.out_of_distribution(dirichlet(20), dirichlet(30))
    assert {name.split("_")[1] for name, value in found.items() if value is None} == {"energy", "model"}


def test_defect_14_two_sets_of_foreign_inputs_do_not_mix():
    inside, near, far = (with_members(dirichlet(50, concentration=c)) for c in (0.2, 0.5, 5.0))
    alone = tasks.out_of_distribution(inside, near)
    other = tasks.out_of_distribution(inside, far)
    assert tasks.out_of_distribution(inside, near) == alone
    assert other["auroc_total"] > alone["auroc_total"]


def test_defect_15_nothing_grows_from_call_to_call():
    p, y = with_members(dirichlet(50)), RNG.integers(4, size=50)
    first = tasks.uncertainty(p), tasks.prediction(p, y), tasks.decisions(p, y, 1 - np.eye(4))
    tasks.prediction(with_members(dirichlet(50)), y)
    again = tasks.uncertainty(p), tasks.prediction(p, y), tasks.decisions(p, y, 1 - np.eye(4))
    assert first[1:] == again[1:]
    np.testing.assert_array_equal(first[0]["aleatoric"], again[0]["aleatoric"])


# Selective prediction


def test_risks_at_coverages():
    p, y = binary([0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5]), np.array([0] * 7 + [1] * 3)
    found = tasks.selective_prediction(p, y, coverages=(0.1, 0.7, 0.71, 1.0))
    assert found["risk_0.1"] == found["risk_0.7"] == 0
    assert found["risk_0.71"] == pytest.approx(1 / 8)
    assert found["risk_1"] == pytest.approx(1 - (p.argmax(axis=1) == y).mean())


def test_the_curve_ends_with_the_error():
    p, y = with_members(dirichlet(70)), RNG.integers(4, size=70)
    for by in ("confidence", "total", "model"):
        curve = tasks.risk_coverage(p, y, by=by)
        assert curve["coverage"][[0, -1]] == pytest.approx([1 / 70, 1])
        assert curve["risk"][-1] == pytest.approx(tasks.prediction(p, y)["error"])
        assert tasks.selective_prediction(p, y, by=by)["aurc"] == pytest.approx(curve["risk"].mean())
        assert tasks.misclassification(p, y)[f"aurc_{by}"] == pytest.approx(curve["risk"].mean())


def test_the_model_uncertainty_of_one_member_is_refused():
    with pytest.raises(WrongArgument, match="one member is not defined"):
        tasks.risk_coverage(dirichlet(5), np.zeros(5, int), by="model")
    with pytest.raises(WrongArgument, match="Did you mean 'total'"):
        tasks.risk_coverage(dirichlet(5), np.zeros(5, int), by="totl")
    with pytest.raises(WrongArgument, match="Coverages"):
        tasks.selective_prediction(dirichlet(5), np.zeros(5, int), coverages=[0.0])


# Decisions


def test_a_decision_by_hand():
    # To decide 0 costs 4 on average, to decide 1 costs .6, though 0 is likelier.
    found = tasks.decisions(np.array([[0.6, 0.4]]), np.array([0]), [[0, 1], [10, 0]])
    assert found == pytest.approx({"total_cost": 1, "mean_cost": 1, "expected_cost": 0.6})


def test_decisions_against_a_loop():
    p, y, costs = with_members(dirichlet(40)), RNG.integers(4, size=40), RNG.random((4, 6))
    paid, expected = 0.0, 0.0
    for row, label in zip(p.mean(axis=0), y, strict=True):
        of_each = [sum(row[k] * costs[k, d] for k in range(4)) for d in range(6)]
        paid, expected = paid + costs[label, int(np.argmin(of_each))], expected + min(of_each)
    found = tasks.decisions(p, y, costs)
    assert found["total_cost"] == pytest.approx(paid)
    assert found["expected_cost"] == pytest.approx(expected / 40)


def test_equal_costs_decide_for_the_likeliest():
    p, y = dirichlet(40), RNG.integers(4, size=40)
    assert tasks.decisions(p, y, 1 - np.eye(4))["mean_cost"] == pytest.approx(tasks.prediction(p, y)["error"])


def test_costs_of_the_paper():
    table = tasks.RARE_CLASSES["mnist"].costs(10)
    assert np.diagonal(table).tolist() == [0] * 10
    assert table[3, 0] == table[7, 9] == 100
    assert table[0, 3] == table[9, 7] == 0.1
    assert tasks.RARE_CLASSES["cifar100"].costs(100)[58, 0] == 1


def test_training_data_become_imbalanced():
    y = np.arange(2000) % 10
    data = Data(np.arange(2000)[:, None], y, 10)
    thin = tasks.RARE_CLASSES["mnist"].thinned(data, seed=1)
    assert np.bincount(thin.y).tolist() == [200, 200, 200, 2, 200, 200, 200, 2, 200, 200]
    assert (np.diff(thin.x[:, 0]) > 0).all()
    np.testing.assert_array_equal(y[thin.x[:, 0].astype(int)], thin.y)
    np.testing.assert_array_equal(tasks.RARE_CLASSES["mnist"].thinned(data, seed=1).x, thin.x)
    assert (tasks.RARE_CLASSES["mnist"].thinned(data, seed=2).x != thin.x).any()


def test_rare_classes_that_cannot_be():
    with pytest.raises(WrongArgument, match="Class 9 is not one of 0 to 4"):
        tasks.RareClasses((2, 9), 1.0, 0.5).costs(5)
    with pytest.raises(WrongArgument, match="kept"):
        tasks.RareClasses((1,), 1.0, 0.0)
    with pytest.raises(WrongArgument, match="Costs are finite"):
        tasks.decisions(dirichlet(2), np.array([0, 1]), np.ones((3, 3)))


# Conformal sets


@pytest.mark.parametrize("method", ["lac", "aps"])
@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_sets_hold_the_label_as_often_as_promised(method, alpha):
    p = dirichlet(20_000, classes=6, concentration=0.4)
    y = drawn_from(p)
    wrong = p**0.5 / (p**0.5).sum(axis=1, keepdims=True)  # badly calibrated: the promise holds all the same
    found = tasks.conformal((wrong[:10_000], y[:10_000]), (wrong[10_000:], y[10_000:]), alpha=alpha, method=method)
    error = np.sqrt(alpha * (1 - alpha) * (1 / 10_000 + 1 / 10_000))
    assert found["coverage"] == pytest.approx(1 - alpha, abs=3 * error)
    assert 1 - alpha < found["mean_size"] < 6


def test_the_quantile_is_that_of_few_examples():
    p, y = binary([0.9, 0.8, 0.7, 0.6]), np.zeros(4, int)
    test = binary([0.71, 0.69, 0.5])
    # ⌈5 · .6⌉ = 3: the third smallest of .1, .2, .3, .4; ⌈5 · .9⌉ = 5 is beyond the last.
    sets = tasks.conformal_sets(p, y, test, alpha=0.4)
    assert sets.tolist() == [[True, False], [False, False], [False, False]]
    assert tasks.conformal_sets(p, y, test, alpha=0.1).all()
    found = tasks.conformal((p, y), (test, np.array([0, 0, 1])), alpha=0.4)
    assert found == pytest.approx({"coverage": 1 / 3, "mean_size": 1 / 3, "empty": 2 / 3})


def test_adaptive_scores_against_a_loop():
    p, y, test = dirichlet(30), RNG.integers(4, size=30), dirichlet(20)
    sets = tasks.conformal_sets(p, y, test, alpha=0.3, method="aps", seed=5)
    random = np.random.default_rng(5)
    drawn = random.random(30), random.random(20)

    def score(row, label, u):
        return sum(one for one in row if one > row[label]) + u * row[label]

    limit = sorted(score(row, label, u) for row, label, u in zip(p, y, drawn[0], strict=True))[
        int(np.ceil(31 * 0.7)) - 1
    ]
    expected = [[score(row, label, u) <= limit for label in range(4)] for row, u in zip(test, drawn[1], strict=True)]
    np.testing.assert_array_equal(sets, expected)
    np.testing.assert_array_equal(sets, tasks.conformal_sets(p, y, test, alpha=0.3, method="aps", seed=5))


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"alpha": 1.0}, {"method": "raps"}])
def test_sets_that_cannot_be(wrong):
    with pytest.raises(WrongArgument, match=next(iter(wrong))):
        tasks.conformal_sets(dirichlet(3), [0, 1, 2], dirichlet(3), **wrong)
    with pytest.raises(WrongArgument, match="test labels"):
        tasks.conformal((dirichlet(3), np.array([0, 1, 2])), (dirichlet(3), np.array([0, 4, 2])))
    with pytest.raises(WrongArgument, match="4 classes, the test has 3"):
        tasks.conformal_sets(dirichlet(3), np.array([0, 1, 2]), dirichlet(3, classes=3))


# Fidelity, shift


def test_a_posterior_is_true_to_itself():
    p = with_members(dirichlet(30))
    assert tasks.fidelity(p, p.mean(axis=0)) == pytest.approx({"agreement": 1, "total_variation": 0}, abs=1e-12)


def test_fidelity_by_hand():
    p, q = np.array([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3]]), np.array([[0.5, 0.5, 0.0], [0.1, 0.0, 0.9]])
    assert tasks.fidelity(p, q) == pytest.approx({"agreement": 0.5, "total_variation": (0.3 + 0.6) / 2})
    with pytest.raises(WrongArgument, match="differ"):
        tasks.fidelity(p, q[:1])


def test_shift_means_over_corruptions_and_severities():
    y = RNG.integers(4, size=30)
    predictions = {(name, level): dirichlet(30) for name in ("blur", "noise") for level in (1, 3)}
    one = {key: tasks.prediction(p, y) for key, p in predictions.items()}
    found = tasks.shift(predictions, y)
    assert found["nll"] == pytest.approx(np.mean([scores["nll"] for scores in one.values()]))
    assert found["error_3"] == pytest.approx((one["blur", 3]["error"] + one["noise", 3]["error"]) / 2)
    assert set(found) == {name + level for name in one["blur", 1] for level in ("", "_1", "_3")}
    with pytest.raises(WrongArgument, match=r"No prediction for \('noise', 1\)"):
        tasks.shift({key: p for key, p in predictions.items() if key != ("noise", 1)}, y)
    with pytest.raises(WrongArgument, match="There is no prediction"):
        tasks.shift({}, y)


# What every task refuses


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 2], [0, -1, 1], [[0, 1, 1]], [0.0, 1.0, 1.0]])
def test_labels_that_do_not_belong_to_probabilities(labels):
    p, y = np.full((3, 2), 0.5), np.array(labels)
    for task in (tasks.prediction, tasks.misclassification, tasks.selective_prediction, tasks.reliability):
        with pytest.raises(WrongArgument, match="labels"):
            task(p, y)
    with pytest.raises(WrongArgument, match="labels"):
        tasks.decisions(p, y, np.eye(2))


def test_a_wrong_label_is_named():
    with pytest.raises(WrongArgument, match="7 of example 2 is not one of 0 to 3"):
        tasks.prediction(dirichlet(3), np.array([0, 1, 7]))


def corrupted(value):
    p = dirichlet(3, 5)
    p[1, 4] = value
    return p


@pytest.mark.parametrize(
    ("p", "message"),
    [
        (corrupted([np.nan, 0.5, 0.5, 0]), r"Example 4 of member 1 in [a-z ]+ has NaN"),
        (corrupted([0.5, 0.6, -0.1, 0]), r"Example 4 of member 1 in [a-z ]+ has a number below 0"),
        (corrupted([0.5, 0.6, 0.1, 0]), r"Example 4 of member 1 in [a-z ]+ does not sum to 1"),
        (np.full((5, 1), 1.0), r"\(5, 1\)"),
        (np.zeros((0, 4)), r"\(0, 4\)"),
        (np.full(4, 0.25), r"\(4,\)"),
    ],
)
def test_what_is_no_distribution_is_named(p, message):
    y = np.zeros(5, int)
    good = dirichlet(3, 5)
    for task in (
        lambda: tasks.prediction(p, y),
        lambda: tasks.misclassification(p, y),
        lambda: tasks.decisions(p, y, np.eye(4)),
        lambda: tasks.conformal_sets(p, y, good),
        lambda: tasks.conformal_sets(good, y, p),
        lambda: tasks.fidelity(good, p),
    ):
        with pytest.raises(WrongArgument, match=message):
            task()


def test_uncertainty_is_of_members():
    with pytest.raises(WrongArgument, match="members"):
        tasks.uncertainty(np.full((3, 2), 0.5))


@pytest.mark.parametrize("outside", [dirichlet(5), dirichlet(2, 5), dirichlet(3, 5, classes=3)])
def test_foreign_inputs_are_asked_of_the_same_network(outside):
    with pytest.raises(WrongArgument, match="differ in examples only"):
        tasks.out_of_distribution(dirichlet(3, 5), outside)


def test_logits_that_do_not_belong_to_probabilities():
    p, q = dirichlet(3, 5), dirichlet(3, 6)
    with pytest.raises(WrongArgument, match="Logits"):
        tasks.out_of_distribution(p, q, logits=(np.zeros((3, 5, 4)), np.zeros((3, 5, 4))))


def test_half_precision_is_near_enough():
    p = dirichlet(50, classes=1000).astype("float16")
    assert 0 <= tasks.prediction(p, np.zeros(50, int))["error"] <= 1
