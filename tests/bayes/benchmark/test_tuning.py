"""Tuning: finds what is best, goes on where it was, and begins each trial anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import keras
import numpy as np
import pytest

from keras_efficient.bayes import Data, Members, TrainingFailed
from keras_efficient.bayes.benchmark import Tune
from keras_efficient.bayes.inference import MAP, Choice, Float, Int
from keras_efficient.errors import UnknownName, WrongArgument

pytest.importorskip("optuna", reason="tuning needs optuna")


class Answers:
    """A posterior of which nothing but the probability of right answers is left."""

    def __init__(self, loss):
        self.loss = loss

    def predict(self, x, reduce=None):
        right = np.exp(-self.loss)
        # Inputs are nothing: half of the examples are of each class, and held out are as many of each on average.
        return np.tile([[right, 1 - right]], (len(x), 1))


@dataclass(frozen=True)
class Quadratic:
    """Its loss is lowest at x = 0.3, count = 4."""

    x: float = 0.0
    count: int = 1
    kind: str = "b"
    tried: ClassVar[list] = []

    def fit(self, model_fn, data, seed):
        self.tried.append((self.x, self.count, self.kind))
        assert len(data) == 32, "a fifth of 40 examples is held out"
        if self.kind == "c":
            raise TrainingFailed("The loss of member 0 is nan at step 3.")
        return Answers(0.1 + (self.x - 0.3) ** 2 + 0.05 * (self.count - 4) ** 2 + (self.kind == "a"))

    @classmethod
    def space(cls):
        return {"x": Float(-1.0, 1.0), "count": Int(1, 8), "kind": Choice(("a", "b"))}


@pytest.fixture(autouse=True)
def nothing_tried():
    Quadratic.tried.clear()


@pytest.fixture
def ones():
    """Data of one class, so that the loss is what `Answers` says."""
    return Data(np.zeros((40, 2), np.float32), np.zeros(40, int), 2)


def test_the_optimum_of_a_quadratic_within_30_trials(ones):
    found = Tune(Quadratic(), trials=30).run(None, ones, seed=0)
    assert len(Quadratic.tried) == len(found.trials) == 30
    assert abs(found.method.x - 0.3) < 0.2
    assert abs(found.method.count - 4) <= 1
    assert found.method.kind == "b"
    assert found.value == min(value for _, value in found.trials)
    assert found.value < 0.2


def test_fields_that_are_not_searched_stay(ones):
    found = Tune(Quadratic(count=7), trials=5, space={"x": Float(0.2, 0.4)}).run(None, ones, seed=0)
    assert {count for _, count, _ in Quadratic.tried} == {7}
    assert found.method.count == 7
    assert all(set(fields) == {"x"} for fields, _ in found.trials)


def test_a_search_goes_on_where_it_was(ones, tmp_path):
    path = tmp_path / "trials.db"
    first = Tune(Quadratic(), trials=6, path=path).run(None, ones, seed=0)
    seen = []
    second = Tune(Quadratic(), trials=10, path=path).run(
        None, ones, seed=0, progress=lambda done, total: seen.append((done, total))
    )
    assert len(Quadratic.tried) == 10
    assert second.trials[:6] == first.trials
    assert len({fields["x"] for fields, _ in second.trials}) == 10  # none is asked for twice
    assert seen == [(6, 10), (7, 10), (8, 10), (9, 10)]
    Tune(Quadratic(), trials=10, path=path).run(None, ones, seed=0)
    assert len(Quadratic.tried) == 10


def test_trials_that_fail_are_told_and_the_others_go_on(ones):
    space = {**Quadratic.space(), "kind": Choice(("b", "c"))}
    found = Tune(Quadratic(), trials=12, space=space).run(None, ones, seed=0)
    assert any(value is None for _, value in found.trials)
    assert found.method.kind == "b"
    with pytest.raises(TrainingFailed, match="None of 3 trials of Quadratic ended with a number"):
        Tune(Quadratic(), trials=3, space={"kind": Choice(("c",))}).run(None, ones, seed=0)


def test_defect_13_each_trial_begins_with_fresh_weights(monkeypatch):
    """The release made anew the direct children of a network only: what stood in a `Sequential` went on."""
    begun, new = [], Members.new.__func__

    def spied(cls, *arguments):
        members = new(cls, *arguments)
        begun.append([keras.ops.convert_to_numpy(one.value) for one in members.trainable])
        return members

    monkeypatch.setattr(Members, "new", classmethod(spied))

    def nested():
        stage = keras.Sequential([keras.layers.Dense(5, activation="relu"), keras.layers.Dense(4)])
        inputs = keras.Input((2,))
        return keras.Model(inputs, keras.layers.Dense(2)(stage(inputs)))

    x = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
    data = Data(x, (x[:, 0] > 0).astype(int))
    Tune(MAP(epochs=2, batch_size=16), trials=3, space={"learning_rate": Float(0.01, 0.1)}).run(nested, data, seed=0)
    assert len(begun) == 3
    for other in begun[1:]:
        for one, same in zip(begun[0], other, strict=True):
            np.testing.assert_array_equal(one, same)


def test_bad_calls():
    with pytest.raises(UnknownName, match="Did you mean 'count'"):
        Tune(Quadratic(), space={"counts": Int(1, 3)})
    with pytest.raises(WrongArgument, match="a share is between 0 and 1"):
        Tune(Quadratic(), held_out=1.0)
    with pytest.raises(WrongArgument, match="Trials are 1 or more"):
        Tune(Quadratic(), trials=0)
