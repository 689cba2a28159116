"""What is left after inference: networks that differ in their weights or in their noise, asked all at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from keras_efficient.bayes.compiled import compiled
from keras_efficient.bayes.members import Members, check_inputs
from keras_efficient.errors import WrongArgument

__all__ = ["Posterior", "StackedPosterior", "StochasticPosterior", "draws", "softmax"]

UNROLLED = 16  # members in one program, at most: it takes as long to compile as all of them


class Posterior:
    """Members of one architecture; what the two kinds share.

    Attributes:
        model: the architecture.
        count: of members.
        diagnostics: what the method that made it says of its own work, such as R-hat.
    """

    kind: str

    def __init__(self, model: keras.Model, count: int, diagnostics: Mapping[str, float] | None = None):
        self.model, self.count, self.diagnostics = model, count, dict(diagnostics or {})
        self._program: Callable[..., Any] | None = None

    def predict(
        self,
        x: Any,
        *,
        batch_size: int = 256,
        members: int | None = None,
        reduce: Literal["mean"] | None = None,
        max_bytes: int = 2**28,
    ) -> np.ndarray:
        """Probabilities of classes, by up to 16 members in one compiled call for each batch.

        Args:
            x: (n, …) inputs.
            batch_size: inputs in a call, at most.
            members: the first so many; `None`: all.
            reduce: `"mean"`: over members, never held one by one for all inputs.
            max_bytes: of what the layers of all members give in a call, which makes batches smaller, then members
                fewer.

        Returns:
            (members, n, classes) float32, or (n, classes).

        Raises:
            WrongArgument: no input, more members than there are, or numbers below 1.
        """
        return self._softmax(self._outputs(x, batch_size, members, max_bytes), reduce)

    def logits(
        self, x: Any, *, batch_size: int = 256, members: int | None = None, max_bytes: int = 2**28
    ) -> np.ndarray:
        """What the networks give themselves, (members, n, classes) float32; as `predict`."""
        return np.concatenate(
            [np.concatenate(groups) for groups in self._outputs(x, batch_size, members, max_bytes)], 1
        )

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Writes one file that `load_posterior` reads: the architecture, and the weights of all members.

        Raises:
            FileProblem: the file exists, or cannot be written.
        """
        from keras_efficient.bayes.files import write

        write(self, path, overwrite=overwrite)

    def arrays(self) -> dict[str, list[np.ndarray]]:
        """What is saved."""
        raise NotImplementedError("A posterior says what is saved of it.")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.count} members of {self.model.name!r}>"

    def _member(self, index: int) -> tuple[list[Any], list[Any]]:
        """Trainable and other weights of a member."""
        raise NotImplementedError("A posterior knows the weights of its members.")

    def _softmax(self, batches: Iterator[list[np.ndarray]], reduce: str | None) -> np.ndarray:
        if reduce not in (None, "mean"):
            raise WrongArgument(f"`reduce` is 'mean' or None, not {reduce!r}.")
        found = []
        for groups in batches:
            parts = [softmax(one) for one in groups]
            if reduce:
                found.append(sum(part.sum(axis=0) for part in parts) / np.float32(sum(map(len, parts))))
            else:
                found.append(np.concatenate(parts))
        return np.concatenate(found, axis=0 if reduce else 1)

    def _outputs(self, x: Any, batch_size: int, members: int | None, max_bytes: int) -> Iterator[list[np.ndarray]]:
        """For each batch, logits (members, n, classes) of some members after the other."""
        count = self.count if members is None else members
        if not 1 <= count <= self.count:
            raise WrongArgument(f"There are 1 to {self.count} members, not {count!r}.")
        if batch_size < 1 or max_bytes < 1 or len(x) == 0:
            raise WrongArgument(f"Not possible: {len(x)} inputs, {batch_size=}, {max_bytes=}.")
        x = np.asarray(x, np.float32)
        if not np.isfinite(x).all():
            raise WrongArgument("Inputs have NaN or infinity.")
        check_inputs(self.model, x.shape[1:])
        group, rows = self._sizes(count, min(batch_size, len(x)), max_bytes)
        each = [self._member(index) for index in range(count)]
        program = self._compiled()
        for start in range(0, len(x), rows):
            some = x[start : start + rows]
            # Of one size, so that it is compiled once.
            padded = np.concatenate([some, np.repeat(some[-1:], rows - len(some), axis=0)]) if len(x) > rows else some
            tensor = ops.convert_to_tensor(padded)
            found = [program(tensor, each[first : first + group]) for first in range(0, count, group)]
            yield [ops.convert_to_numpy(one)[:, : len(some)] for one in found]

    def _sizes(self, count: int, rows: int, max_bytes: int) -> tuple[int, int]:
        """Members and inputs in a call."""
        bytes_of_one = max(_bytes_of(self.model), 1)
        group = math.ceil(count / math.ceil(count / UNROLLED))
        if group * bytes_of_one > max_bytes:
            return max(max_bytes // bytes_of_one, 1), 1
        return group, min(rows, max_bytes // (group * bytes_of_one))

    def _compiled(self) -> Callable[..., Any]:
        """Inputs and weights of members to (members, n, classes): one member after the other in one graph."""
        if self._program is None:
            model = self.model

            def run(x: Any, each: Any) -> Any:
                found = [model.stateless_call(*mine, x, training=False)[0] for mine in each]
                # What a student says besides its logits is its own affair.
                logits = [keras.tree.flatten(outputs)[0] for outputs in found]
                return ops.cast(ops.stack(logits), "float32")

            self._program = compiled(run)
        return self._program


class StackedPosterior(Posterior):
    """Draws of weights of one architecture.

    Args:
        members: the draws; they are taken as they are now.
        diagnostics: what the method says of its own work.
    """

    kind = "stacked"

    def __init__(self, members: Members, *, diagnostics: Mapping[str, float] | None = None):
        super().__init__(members.model, members.count, diagnostics)
        trainable, others = members.trainable, members.non_trainable
        self._each = [
            ([one.value[index] for one in trainable], [one.value[index] for one in others])
            for index in range(members.count)
        ]

    @property
    def members(self) -> Members:
        """The draws, as variables of their own."""
        return Members(self.model, **self.arrays())

    def arrays(self) -> dict[str, list[np.ndarray]]:
        """Trainable and other weights, (members, …) each."""
        found = [
            [np.stack([ops.convert_to_numpy(one) for one in values]) for values in zip(*some, strict=True)]
            for some in zip(*self._each, strict=True)
        ]
        return {"trainable": found[0], "non_trainable": found[1]}

    def _member(self, index: int) -> tuple[list[Any], list[Any]]:
        return self._each[index]


class StochasticPosterior(Posterior):
    """A network that draws at every call, by Bayesian layers or by dropout: `count` of its draws.

    A member is the network with seeds of its own, so that predictions are the same at each call. Layers that draw
    weights then are one network for all inputs; layers that draw for each example (dropout, flipout, local
    reparameterization) draw alike in every batch.

    Args:
        model: the network; its weights are taken as they are now.
        count: of draws.
        seed: of the draws.

    Raises:
        WrongArgument: a network that never draws, or no draw.
    """

    kind = "stochastic"

    def __init__(
        self, model: keras.Model, count: int = 16, *, seed: int = 0, diagnostics: Mapping[str, float] | None = None
    ):
        if count < 1:
            raise WrongArgument(f"One draw at least, not {count!r}.")
        super().__init__(model, count, diagnostics)
        self.seed = seed
        self._seeds = _seed_places(model)
        if not self._seeds:
            raise WrongArgument(f"Model {model.name!r} has no layer that draws.")
        both = (model.trainable_variables, model.non_trainable_variables)
        self._weights = [[ops.copy(one.value) for one in some] for some in both]

    def arrays(self) -> dict[str, list[np.ndarray]]:
        """Trainable weights, and the others with states of seeds among them."""
        names = ("trainable", "non_trainable")
        return {
            name: [ops.convert_to_numpy(one) for one in some] for name, some in zip(names, self._weights, strict=True)
        }

    def _member(self, index: int) -> tuple[list[Any], list[Any]]:
        trainable, others = self._weights[0], list(self._weights[1])
        for place in self._seeds:
            state = np.random.SeedSequence([self.seed, index, place]).generate_state(1)[0]
            others[place] = ops.cast(ops.convert_to_tensor([int(state), 0], dtype="uint32"), others[place].dtype)
        return trainable, others


def _seed_places(model: keras.Model) -> list[int]:
    """Where, among the non-trainable variables, the states of the layers' own random numbers are."""
    states = {id(one.state) for layer in model._flatten_layers() if draws(layer) for one in layer._seed_generators}
    return [place for place, one in enumerate(model.non_trainable_variables) if id(one) in states]


def draws(layer: Any) -> bool:
    """Whether a layer draws in inference too: a stock layer with a seed, such as `Dropout`, is still then."""
    return bool(getattr(layer, "_seed_generators", ())) and not type(layer).__module__.startswith("keras.")


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    found: np.ndarray = powers / powers.sum(axis=-1, keepdims=True)
    return found


def _bytes_of(model: keras.Model) -> int:
    """What the layers give for one input, in float32."""
    shapes = [
        tensor.shape
        for layer in model.layers
        for node in layer._inbound_nodes
        for tensor in keras.tree.flatten(node.output_tensors)
    ]
    return sum(4 * math.prod(size or 1 for size in shape[1:]) for shape in shapes)
