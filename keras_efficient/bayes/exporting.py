"""A posterior in a file for a device: its mean, its members, or a network that draws."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from keras_efficient.bayes.posterior import Posterior, StackedPosterior
from keras_efficient.deploy import deploy
from keras_efficient.errors import UnknownName, WrongArgument

if TYPE_CHECKING:
    from keras_efficient.export import Report

__all__ = ["MODES", "ensemble_network", "export_posterior", "mean_network"]

MODES = ("mean", "ensemble")
LEAST_LIKENESS = 0.5  # of members' weights, as a cosine: below it they are networks of their own


def export_posterior(
    posterior: Posterior,
    path: str | Path,
    *,
    mode: str = "ensemble",
    members: int | None = None,
    target: str | None = None,
    precision: str = "float32",
    **options: Any,
) -> Report:
    """Writes a file that gives probabilities of classes, (n, classes), and checks it as `export.save` does.

    Args:
        posterior: of a model that gives logits.
        path: its suffix picks the target when none is named.
        mode: what is in the file.
            `mean`: one network, at the mean of the weights. Members must be draws around one maximum, as of SWA, SWAG
            and Laplace: the mean of several maxima is no network that was ever good.
            `ensemble`: all members, one after the other, and the mean of their probabilities, as `predict` gives it
            with `reduce="mean"`.
        members: of an ensemble, the first so many; `None`: all.
        target, precision: as of `export.save`. With int8, probabilities are in 16 bits: of 1/256, the step of an int8
            softmax, nothing is left that members could differ by.
        **options: others of `export.save`, such as `calibration` and `overwrite`.

    Returns:
        The report of `export.save`.

    Raises:
        UnknownName: no such mode.
        WrongArgument: a posterior of which there is no such file.
        KerasEfficientError: as `export.save`.
    """
    from keras_efficient import export

    if mode not in MODES:
        raise UnknownName("mode", mode, MODES)
    if members is not None and mode != "ensemble":
        raise WrongArgument(f"`members` is of an ensemble; mode {mode!r} has no such thing.")
    network = mean_network(posterior) if mode == "mean" else ensemble_network(posterior, members)
    about = {"mode": mode, "kind": posterior.kind, "members": members or posterior.count}
    options["metadata"] = {**options.get("metadata", {}), "posterior": about}
    if precision == "int8":
        options.setdefault("wide_probabilities", True)
    return export.save(network, path, target=target, precision=precision, **options)


def mean_network(posterior: Posterior) -> keras.Model:
    """One deployed network with the mean of all weights; gives probabilities.

    A stochastic posterior gives that of its layers' own means.

    Raises:
        WrongArgument: draws that are not around one maximum.
    """
    trainable, others = posterior.arrays()["trainable"], posterior.arrays()["non_trainable"]
    if isinstance(posterior, StackedPosterior):
        likeness = _likeness(trainable)
        if likeness < LEAST_LIKENESS:
            raise WrongArgument(
                f"Members are networks of their own (cosine of their weights {likeness:.2f}): they have no mean.",
                hint="Choose mode 'ensemble', or distil them.",
            )
        trainable, others = ([_mean(values) for values in some] for some in (trainable, others))
    return _with_probabilities(posterior.model, [_deployed(posterior.model, trainable, others)])


def ensemble_network(posterior: Posterior, members: int | None = None) -> keras.Model:
    """Deployed members side by side in one model, which gives the mean of their probabilities.

    Raises:
        WrongArgument: more members than there are, or draws that a network makes at every call.
    """
    if not isinstance(posterior, StackedPosterior):
        raise WrongArgument(
            f"Model {posterior.model.name!r} draws at every call, so that it has no members to write down.",
            hint="Choose mode 'mean'.",
        )
    count = posterior.count if members is None else members
    if not 1 <= count <= posterior.count:
        raise WrongArgument(f"There are 1 to {posterior.count} members, not {count!r}.")
    arrays = posterior.arrays()
    each = [
        _deployed(posterior.model, *([values[number] for values in arrays[kind]] for kind in _KINDS))
        for number in range(count)
    ]
    return _with_probabilities(posterior.model, each)


_KINDS = ("trainable", "non_trainable")


def _mean(values: np.ndarray) -> np.ndarray:
    """Over members; of integers, such as states of seeds, there is none."""
    return values.mean(axis=0, dtype=np.float64) if values.dtype.kind == "f" else values[0]


def _likeness(trainable: Sequence[np.ndarray]) -> float:
    """Mean cosine between the weights of two members.

    ```
    |Σ w|² = Σ |w|² + Σ_{i≠j} wᵢ·wⱼ
    ```
    """
    count = len(trainable[0])
    if count == 1:
        return 1.0
    own = sum(float(np.square(values, dtype=np.float64).sum()) for values in trainable)
    together = sum(float(np.square(values.sum(axis=0, dtype=np.float64)).sum()) for values in trainable)
    return (together - own) / max(own * (count - 1), 1e-30)


def _deployed(model: keras.Model, trainable: Sequence[Any], others: Sequence[Any]) -> keras.Model:
    """A copy of stock layers with these weights."""
    with _holding(model, [*trainable, *others]):
        return deploy(model)


@contextlib.contextmanager
def _holding(model: keras.Model, values: Sequence[Any]) -> Iterator[None]:
    """The model has these weights as long as it lasts."""
    variables = [*model.trainable_variables, *model.non_trainable_variables]
    kept = [ops.convert_to_numpy(variable) for variable in variables]
    try:
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        yield
    finally:
        for variable, value in zip(variables, kept, strict=True):
            variable.assign(value)


def _with_probabilities(model: keras.Model, each: Sequence[keras.Model]) -> keras.Model:
    """Networks of logits on one input, and the mean of their softmaxes."""
    (given,) = model.inputs
    name = given._keras_history.operation.name
    x = keras.Input(batch_shape=given.shape, dtype=given.dtype, name=name)
    found = []
    for number, network in enumerate(each):
        member = keras.Model(network.input, network.output, name=f"member_{number}")
        found.append(keras.layers.Softmax(name=f"softmax_{number}")(member(x)))
    if len(found) == 1:
        return keras.Model(x, keras.layers.Identity(name="probabilities")(found[0]), name=model.name)
    return keras.Model(x, keras.layers.Average(name="probabilities")(found), name=model.name)
