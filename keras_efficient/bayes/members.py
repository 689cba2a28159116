"""Weights of several networks of one architecture, stacked."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_efficient.errors import UnsupportedLayer, WrongArgument
from keras_efficient.seeds import seed_of

__all__ = ["Members", "check_inputs"]


class Members:
    """Networks of one architecture, whose weights are variables with the member as their first axis.

    Args:
        model: any of them; its own weights are not used.
        trainable, non_trainable: for each weight of the model, in its order, (members, …).

    Attributes:
        count: of members.
        trainable, non_trainable: lists of `keras.Variable`.

    Raises:
        WrongArgument: weights that are not the model's, or of no member.
    """

    def __init__(self, model: keras.Model, trainable: Sequence[Any], non_trainable: Sequence[Any] = ()):
        self.model = model
        both = [(model.trainable_variables, trainable), (model.non_trainable_variables, non_trainable)]
        counts = {len(value) for value in (*trainable, *non_trainable)}
        for variables, values in both:
            shapes = [tuple(variable.shape) for variable in variables]
            given = [tuple(np.shape(value)[1:]) for value in values]
            if shapes != given or len(counts) != 1 or 0 in counts:
                raise WrongArgument(f"Members of {model.name!r} have weights (members, …) {shapes}, not {given}.")
        self.count = counts.pop()
        self.trainable, self.non_trainable = (
            [
                keras.Variable(ops.convert_to_tensor(value, variable.dtype), dtype=variable.dtype, name=variable.name)
                for variable, value in zip(variables, values, strict=True)
            ]
            for variables, values in both
        )

    @classmethod
    def new(cls, model_fn: Callable[[], keras.Model], count: int, seed: int) -> Members:
        """Networks with initial weights of their own, which hang on the seed only.

        Raises:
            WrongArgument: the function gives other models than new, built ones of one architecture, or no member is
                wanted.
            UnsupportedLayer: a softmax at the end.
        """
        if count < 1:
            raise WrongArgument(f"One member at least, not {count!r}.")
        given, model, trainable, others = None, None, [], []
        for number in range(count):
            with _seeded(seed, number):
                one = model_fn()
            if not isinstance(one, keras.Model) or not one.built:
                raise WrongArgument("A model function gives a built Keras model, with no argument.")
            if one is given:
                raise WrongArgument(
                    "The model function gives the same model each time: all members would begin alike.",
                    hint="Build a new one in it.",
                )
            given = one
            if isinstance(one, keras.Sequential):  # in which no layer leads from an input to an output
                one = keras.Model(one.inputs[0], one.outputs[0], name=one.name)
            if one.inputs and not all(isinstance(some, keras.KerasTensor) for some in (one.input, one.output)):
                message = f"{one.name!r} takes or gives more than one tensor, or one in a dictionary or list."
                raise WrongArgument(message, hint="A network here takes one tensor, and gives the logits of classes.")
            _check_logits(one)
            trainable.append([keras.ops.convert_to_numpy(variable) for variable in one.trainable_variables])
            others.append([keras.ops.convert_to_numpy(variable) for variable in one.non_trainable_variables])
            model = model or one
        assert model is not None
        shapes = [[array.shape for array in (*mine, *fixed)] for mine, fixed in zip(trainable, others, strict=True)]
        if any(one != shapes[0] for one in shapes):
            raise WrongArgument("The model function gives models of different shapes.")
        stacked = [[np.stack(values) for values in zip(*some, strict=True)] for some in (trainable, others)]
        return cls(model, *stacked)

    def logits(self, index: int, trainable: Sequence[Any], others: Sequence[Any], x: Any, *, training: bool) -> Any:
        """Of one member, from stacked weights: outputs, its non-trainable weights afterwards, and a list of the losses
        that its layers add."""
        mine = ([value[index] for value in some] for some in (trainable, others))
        return self.model.stateless_call(*mine, x, training=training, return_losses=True)

    def network(self, index: int) -> keras.Model:
        """The model itself, with the weights of a member put into it."""
        model_weights = (*self.model.trainable_variables, *self.model.non_trainable_variables)
        for variable, stacked in zip(model_weights, (*self.trainable, *self.non_trainable), strict=True):
            variable.assign(stacked.value[index])
        return self.model


def check_inputs(model: keras.Model, shape: Sequence[int]) -> None:
    """Raises WrongArgument where a model takes no examples of this shape; of subclassed ones nobody knows."""
    if not model.inputs:
        return
    wanted = tuple(model.inputs[0].shape[1:])
    sizes = zip(wanted, shape, strict=False)
    if len(wanted) != len(shape) or any(one not in (None, given) for one, given in sizes):
        raise WrongArgument(f"{model.name!r} takes examples of {wanted}, not of {tuple(shape)}.")


def _check_logits(model: keras.Model) -> None:
    if not model.outputs:
        return  # a subclassed model, which nobody can look into
    last = model.outputs[0]._keras_history.operation
    is_softmax = isinstance(last, keras.layers.Softmax) or type(last).__name__ == "Softmax"
    if is_softmax or getattr(last, "activation", None) is keras.activations.softmax:
        reason = "it gives probabilities, where losses and predictions take logits."
        raise UnsupportedLayer(getattr(last, "path", last.name), reason, hint="Leave the softmax out.")


@contextlib.contextmanager
def _seeded(seed: int, number: int) -> Iterator[None]:
    """Keras draws seeds of initializers from Python's own random numbers, which go on afterwards as they were."""
    kept = random.getstate(), np.random.get_state()
    keras.utils.set_random_seed(seed_of(seed, number))
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
