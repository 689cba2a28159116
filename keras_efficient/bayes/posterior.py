"""What is left after inference: draws of weights, asked all at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from keras_efficient.bayes.members import Members
from keras_efficient.errors import WrongArgument

__all__ = ["StackedPosterior"]


class StackedPosterior:
    """Draws of weights of one architecture.

    Args:
        members: the draws; they are taken as they are now.
        diagnostics: what the method that drew them says about them.
    """

    def __init__(self, members: Members, *, diagnostics: Mapping[str, float] | None = None):
        self.model, self.count = members.model, members.count
        self.diagnostics = dict(diagnostics or {})
        self._weights = [[ops.copy(one.value) for one in some] for some in (members.trainable, members.non_trainable)]
        self._programs: dict[int, Callable[[Any], Any]] = {}

    @property
    def members(self) -> Members:
        """The draws, as networks of their own."""
        return Members(self.model, *self._weights)

    def predict(
        self,
        x: Any,
        *,
        batch_size: int = 256,
        members: int | None = None,
        reduce: Literal["mean"] | None = None,
        max_bytes: int = 2**28,
    ) -> np.ndarray:
        """Probabilities of classes, by all members in one compiled call for each batch.

        Args:
            x: (n, …) inputs.
            batch_size: inputs in a call, at most.
            members: the first so many; `None`: all.
            reduce: `"mean"`: over members, never held one by one for all inputs.
            max_bytes: of what the layers of all members give in a call, which makes batches smaller.

        Returns:
            (members, n, classes) float32, or (n, classes).

        Raises:
            WrongArgument: no input, more members than there are, or numbers below 1.
        """
        count = self.count if members is None else members
        if not 1 <= count <= self.count:
            raise WrongArgument(f"There are 1 to {self.count} members, not {count!r}.")
        if batch_size < 1 or max_bytes < 1 or len(x) == 0 or reduce not in (None, "mean"):
            raise WrongArgument(f"Not possible: {len(x)} inputs, {batch_size=}, {max_bytes=}, {reduce=}.")
        rows = max(min(batch_size, max_bytes // max(count * _bytes_of(self.model), 1)), 1)
        parts = list(self._parts(np.asarray(x), rows, count, reduce))
        return np.concatenate(parts, axis=0 if reduce else 1)

    def _parts(self, x: np.ndarray, rows: int, count: int, reduce: str | None) -> Iterator[np.ndarray]:
        if count not in self._programs:
            self._programs[count] = self._program(count)
        program = self._programs[count]
        for start in range(0, len(x), rows):
            some = x[start : start + rows]
            # Of one size, so that it is compiled once.
            padded = np.concatenate([some, np.repeat(some[-1:], rows - len(some), axis=0)]) if len(x) > rows else some
            found = ops.convert_to_numpy(program(padded.astype(np.float32)))[:, : len(some)]
            yield found.mean(axis=0) if reduce else found

    def _program(self, count: int) -> Callable[[Any], Any]:
        """Inputs to (members, n, classes): one member after the other in one graph, each with weights of its own."""
        each = [[[value[index] for value in some] for some in self._weights] for index in range(count)]

        def run(x: Any, each: Any = each) -> Any:
            logits = [self.model.stateless_call(*mine, x, training=False)[0] for mine in each]
            return ops.softmax(ops.cast(ops.stack(logits), "float32"))

        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            return tf.function(run, reduce_retracing=True)
        import jax

        program = jax.jit(run)
        return lambda x: program(x, each)


def _bytes_of(model: keras.Model) -> int:
    """What the layers give for one input, in float32."""
    shapes = [tensor.shape for layer in model.layers for tensor in keras.tree.flatten(layer.output)]
    return sum(4 * math.prod(size or 1 for size in shape[1:]) for shape in shapes)
