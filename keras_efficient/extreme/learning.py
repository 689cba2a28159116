"""Learns on a frozen model where the right classes lie, and puts what it learned into the model's output layer."""

from __future__ import annotations

import dataclasses
import inspect
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any

import keras
import numpy as np

from keras_efficient.errors import UnknownName, WrongArgument
from keras_efficient.extreme.cells import cells, routed_again, router_plan
from keras_efficient.extreme.contexts import contexts, contexts_plan, moved_again
from keras_efficient.extreme.hashes import Guards, filled_again, hash_plan, learned_hashes, random_hashes
from keras_efficient.extreme.measures import DEPTH, Measures, full_answers, measure
from keras_efficient.extreme.queries import Queries, forget_steps, output_layer, queries
from keras_efficient.layers import HALOSOutput
from keras_efficient.layers.halos import HashPlan, Index, RouterPlan
from keras_efficient.layers.halos.layer import check_answers_last

__all__ = ["METHODS", "Learned", "learn_index", "reindex"]

MOST_OF_CONTEXTS = 2**18  # classes; of more, the full layer's answers take too long
_RANGES = {"head": (0, None), "probes": (1, None), "tables": (1, None), "bits": (1, 31), "rounds": (0, None)}
STEPS = (1, 1.5)  # between halvings of the budget, where a target chooses


@dataclass(frozen=True)
class Learned:
    """What `learn_index` did.

    Attributes:
        method: by which method.
        measures: on the validation part, at the setting that the layer has now.
        reached: whether budget and target were met.
        dial: measures at each setting that was tried, by its neurons.
        rounds: label recall after each round of a method that has some, on the validation part.
        seconds: how long it took.
    """

    method: str
    measures: Measures
    reached: bool
    dial: dict[int, Measures]
    rounds: tuple[float, ...]
    seconds: float


@dataclass(frozen=True, eq=False)
class _Task:
    """What every method is given."""

    layer: HALOSOutput
    rows: np.ndarray
    known: Queries
    held_out: Queries
    budget: float
    seed: int
    tell: Callable[[str], None]

    @property
    def sizes(self) -> tuple[int, int, float]:
        return len(self.rows), self.rows.shape[1] - 1, self.budget

    @cached_property
    def counts(self) -> np.ndarray:
        """How often each class is a label."""
        return np.bincount(self.known.labels, minlength=len(self.rows))

    @cached_property
    def full(self) -> np.ndarray:
        """What the full layer answers on the validation part."""
        return full_answers(self.rows, self.held_out, min(DEPTH, len(self.rows)))

    def measure(self, index: Index) -> Measures:
        """What the layer would answer with an index."""
        self.layer.set_index(index)

        def candidates(vectors: np.ndarray) -> np.ndarray:
            return keras.ops.convert_to_numpy(self.layer.candidates(vectors))

        return measure(candidates, index.plan.neurons, self.rows, self.held_out, counts=self.counts, full=self.full)


def learn_index(
    model: keras.Model,
    data: Any,
    *,
    method: str | None = None,
    budget: float = 0.02,
    target: float | None = None,
    validation: Any = 0.1,
    seed: int = 0,
    on_progress: Callable[[str], None] | None = None,
    **options: Any,
) -> Learned:
    """Learns an index for the model's `HALOSOutput` and sets it; the model's weights stay as they are.

    | method | candidates of a query | options |
    |---|---|---|
    | `"contexts"` | what answers the queries that are like it; a tree finds the list | |
    | `"cells"` | blocks of classes that are alike; a tree, learned from labels, finds them | `head`, `probes` |
    | `"hash"` | buckets of learned hash tables: the paper's way | `tables`, `bits`, `ranges`, `rounds`, `guards` |
    | `"inner_product"` | as cells, from the classes' weights alone | `head`, `probes` |
    | `"random_hash"` | buckets of random hash tables | `tables`, `bits`, `ranges`, `guards` |

    The last two are there for comparison. Where every class must be found if all blocks are looked at, take cells:
    contexts leave out what answers nothing, and want some forty queries for each of their lists, of which there are
    4,096 at most. Their lists of class numbers come on top of the classes' rows: 4 bytes a place, in all
    lists · budget · units · 4 bytes.

    Args:
        model: a functional or Sequential model, trained, whose last layer is a `HALOSOutput`.
        data: ``(x, y)``, or a `tf.data.Dataset` or `keras.utils.PyDataset` of such batches; see `queries`.
        method: by default contexts up to some hundred thousand classes, and cells for more.
        budget: largest share of neurons to look at, those that find candidates included.
        target: such as 0.99, the least share of the full layer's P@1: the fewest neurons are chosen that keep it on
            validation data. Without one, as many as the budget allows.
        validation: data as `data`, or the share of it that is not learned from. The model should not have been trained
            on it either: of what it knows by heart it keeps more than of what comes.
        seed: of what is drawn.
        on_progress: called with a line at each step.
        **options: of the method: `head`, how many classes are always looked at; `probes`, blocks that a query takes;
            `tables` and `bits` of hashes; `ranges`, values of a digit, which above 2 is the place of the largest of so
            many numbers (winner takes all); `rounds`, how often tables are filled again; `guards`, an `extreme.Guards`.

    Raises:
        WrongArgument: a budget that is too small, labels out of range, class weights that are not finite, an option
            that the method does not have.
        UnsupportedLayer: the model has no `HALOSOutput`, or several, or its logits are not the model's output.
    """
    layer = output_layer(model)
    check_answers_last(model, layer)
    method = method or ("contexts" if layer.units <= MOST_OF_CONTEXTS else "cells")
    if method not in METHODS:
        raise UnknownName("method", method, METHODS)
    known_options = list(inspect.signature(METHODS[method]).parameters)[1:]
    if wrong := sorted(set(options) - set(known_options)):
        raise UnknownName(f"option of method {method!r}", wrong[0], known_options)
    for name, (least, most) in _RANGES.items():
        if (value := options.get(name)) is not None:
            _check_number(name, value, least, most)
    _check_guards(options.get("guards"))
    _check_number("seed", seed, 0)
    _check_share("budget", budget)
    if target is not None:
        _check_share("target", target)
    tell, begin = on_progress or (lambda line: None), time.monotonic()
    rows = _rows(layer)
    tell("running the model on the data")
    task = _Task(layer, rows, *_split(model, data, validation, seed), budget, seed, tell)
    before = layer.taken()
    try:
        tell(f"learning where {layer.units} classes lie: {method}")
        index, rounds = METHODS[method](task, **options)
        index, found = _chosen(task, dataclasses.replace(index, fingerprint=layer.fingerprint()), target)
    except BaseException:
        layer.put_back(before)
        raise
    layer.set_index(index)
    forget_steps(model)
    if index.plan.candidates < layer.k:
        warnings.warn(
            f"{layer.k} answers are asked for and {index.plan.candidates} classes are looked at: the rest will be −1.",
            stacklevel=2,
        )
    measures = found[index.plan.neurons]
    reached = measures.share <= budget and (target is None or measures.kept() >= target)
    return Learned(method, measures, reached, found, tuple(rounds), round(time.monotonic() - begin, 1))


def reindex(
    model: keras.Model, data: Any, *, validation: Any = 0.1, seed: int = 0, guards: Guards | None = None
) -> Measures:
    """Fits the index that a model has to weights that were trained on since: seconds, where learning takes minutes.

    Blocks and lists stay what they are and the scores that lead to them are learned anew; hash tables keep their
    hyperplanes and are filled again. Of that and the index as it is the one with the higher P@1 on the validation part
    is taken, which makes that P@1 a little too good. Where the model has changed so much that this keeps too little,
    learn the index again.

    Args:
        model, data, validation, seed: as for `learn_index`.
        guards: that hash tables were learned with.

    Returns:
        what was measured on the validation part.

    Raises:
        WrongArgument: as `learn_index`; the layer has no index.
    """
    layer = output_layer(model)
    layer.check_contents()
    _check_guards(guards)
    _check_number("seed", seed, 0)
    index = layer.index
    if index is None:
        raise WrongArgument(f"Layer {layer.name!r} has no index.", hint="extreme.learn_index(model, data) makes one.")
    rows = _rows(layer)
    task = _Task(layer, rows, *_split(model, data, validation, seed), 1.0, seed, lambda line: None)
    match index.plan:
        case HashPlan() as plan:
            found = filled_again(plan, index, task.known, rows, guards)
        case RouterPlan(shared=True) as plan:
            found = moved_again(plan, index, task.known)
        case RouterPlan() as plan:
            found = routed_again(plan, index, task.known, rows)
        case plan:
            raise WrongArgument(f"Nothing is known of indexes of kind {plan.kind!r}.")
    before = layer.taken()
    try:
        settings = [dataclasses.replace(setting, fingerprint=layer.fingerprint()) for setting in (index, found)]
        measures = [task.measure(setting) for setting in settings]
    except BaseException:
        layer.put_back(before)
        raise
    best = max((0, 1), key=lambda which: (measures[which].precision[1], measures[which].label_recall))
    layer.set_index(settings[best])
    forget_steps(model)
    return measures[best]


def _contexts(task: _Task) -> tuple[Index, list[float]]:
    plan = contexts_plan(*task.sizes, len(task.known))
    return contexts(plan, task.known, task.rows, seed=task.seed), []


def _cells(task: _Task, head: int | None = None, probes: int | None = None) -> tuple[Index, list[float]]:
    plan = router_plan(*task.sizes, head=head, probes=probes)
    return cells(plan, task.known, task.rows, seed=task.seed), []


def _inner_product(task: _Task, head: int | None = None, probes: int | None = None) -> tuple[Index, list[float]]:
    plan = router_plan(*task.sizes, head=head, probes=probes)
    return cells(plan, task.known, task.rows, seed=task.seed, learned=False), []


def _hash(
    task: _Task,
    tables: int | None = None,
    bits: int | None = None,
    ranges: int = 2,
    rounds: int = 10,
    guards: Guards | None = None,
) -> tuple[Index, list[float]]:
    def judge(index: Index) -> float:
        recall = task.measure(index).label_recall
        task.tell(f"label recall {recall:.3f}")
        return recall

    plan = hash_plan(*task.sizes, tables=tables, bits=bits, ranges=ranges)
    guards = Guards() if guards is None else guards
    return learned_hashes(plan, task.known, task.rows, seed=task.seed, guards=guards, rounds=rounds, judge=judge)


def _random_hash(
    task: _Task, tables: int | None = None, bits: int | None = None, ranges: int = 2, guards: Guards | None = None
) -> tuple[Index, list[float]]:
    plan = hash_plan(*task.sizes, tables=tables, bits=bits, ranges=ranges)
    guards = Guards(by_labels=False) if guards is None else guards
    return random_hashes(plan, task.known, task.rows, seed=task.seed, guards=guards), []


METHODS: dict[str, Callable[..., tuple[Index, list[float]]]] = {
    "contexts": _contexts,
    "cells": _cells,
    "hash": _hash,
    "inner_product": _inner_product,
    "random_hash": _random_hash,
}


def _chosen(task: _Task, index: Index, target: float | None) -> tuple[Index, dict[int, Measures]]:
    """The index at the setting that the target chooses, and what was measured at each that was tried."""
    found: dict[int, Measures] = {}
    for setting in _settings(index) if target is not None else [index]:
        measures = task.measure(setting)
        found[setting.plan.neurons] = measures
        task.tell(_line(measures))
        if target is not None and measures.kept() >= target:
            return setting, found
    return setting, found


def _settings(index: Index) -> list[Index]:
    """The index at 1/16, 1/11, 1/8, … of its neurons, and as it is; those that it can look at, few neurons first."""
    whole, plans = index.plan.neurons, {}
    for power in range(4, 0, -1):
        for step in STEPS:
            try:
                plan = index.plan.dial(int(whole * step / 2**power))
            except WrongArgument:
                continue
            plans[plan.neurons] = plan
    plans = {neurons: plan for neurons, plan in plans.items() if neurons < whole} | {whole: index.plan}
    return [dataclasses.replace(index, plan=plan) for _, plan in sorted(plans.items())]


def _split(model: keras.Model, data: Any, validation: Any, seed: int) -> tuple[Queries, Queries]:
    found = queries(model, data)
    if not isinstance(validation, (int, float)):
        return found, queries(model, validation)
    _check_share("validation", validation)
    order = np.random.default_rng(seed).permutation(len(found))
    held_out = max(1, round(validation * len(order)))
    if len(order) <= held_out:
        raise WrongArgument(f"{len(order)} labelled inputs are too few to learn from and to validate on.")
    return found.select(np.sort(order[held_out:])), found.select(np.sort(order[:held_out]))


def _check_guards(guards: Any) -> None:
    if guards is not None and not isinstance(guards, Guards):
        raise WrongArgument(f"`guards` must be an extreme.Guards, not {guards!r}.")


def _check_number(name: str, value: Any, least: int, most: int | None = None) -> None:
    fits = isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value)
    if not fits or (most is not None and value > most):
        until = "on" if most is None else f"to {most}"
        raise WrongArgument(f"`{name}` must be a whole number from {least} {until}, not {value!r}.")


def _check_share(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise WrongArgument(f"`{name}` must be above 0 and at most 1, not {value!r}.")


def _rows(layer: HALOSOutput) -> np.ndarray:
    """Weights and bias of each class, ``(units, d + 1)``."""
    kernel = np.asarray(keras.ops.convert_to_numpy(layer.kernel), np.float32)
    bias = np.zeros(layer.units) if layer.bias is None else keras.ops.convert_to_numpy(layer.bias)
    rows = np.concatenate([kernel, np.asarray(bias, np.float32)[:, None]], axis=1)
    if not np.isfinite(rows).all():
        wrong = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        raise WrongArgument(f"The weights of class {wrong[0]} are not finite ({len(wrong)} such classes).")
    return rows


def _line(found: Measures) -> str:
    thirds = f"{found.head:.3f} {found.middle:.3f} {found.tail:.3f}"
    return (
        f"{found.neurons} neurons ({found.share:.2%}): P@1 {found.precision[1]:.4f} of {found.full_precision[1]:.4f}, "
        f"label recall {found.label_recall:.3f} (frequent, middle, rare labels: {thirds})"
    )
