"""One network that says what a whole posterior says: the mean of its probabilities, and how unsure its members are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_efficient.bayes.compiled import compiled
from keras_efficient.bayes.data import Data
from keras_efficient.bayes.inference._runs import ModelFunction, check_run, steps_of
from keras_efficient.bayes.inference.laplace import last_dense
from keras_efficient.bayes.inference.maximum import DeepEnsemble
from keras_efficient.bayes.inference.space import Float, Int, Space
from keras_efficient.bayes.members import Members
from keras_efficient.bayes.posterior import Posterior, StackedPosterior
from keras_efficient.bayes.training import TrainingFailed
from keras_efficient.errors import WrongArgument
from keras_efficient.seeds import seed_of

__all__ = ["Distillation", "distilled_uncertainty"]

ROWS = 4096  # that the teacher's members are asked for at once


@dataclass(frozen=True)
class Distillation:
    """A student of another method's posterior, with a second output for the expected entropy of its members.

    Each epoch it sees the training inputs with other noise on them, since on the inputs themselves members agree:

    ```
    x = input + noise_sd · ξ          p = mean over members of p_s(x)          h = mean over members of H(p_s(x))
    loss = −Σ p log softmax(logits(x)) + entropy_weight · BCE(h / log C, share(x))          entropy = log C · share
    ```

    whose minimum is at the teacher's p and h. Weights are trained by Adam, the learning rate along half a cosine.

    Attributes:
        teacher: a method, whose `fit` gives the posterior.
        epochs, batch_size, learning_rate: of the student's training.
        noise_sd: standard deviation of the noise, in the inputs' own units.
        entropy_weight: of the second loss.

    Source: Korattikara, Rathod, Murphy, Welling, NeurIPS 2015, https://arxiv.org/abs/1506.04416; the entropy as a
        second student: Vadera, Jalaian, Marlin, UAI 2020, https://arxiv.org/abs/2005.08110.
    """

    teacher: Any = field(default_factory=DeepEnsemble)
    epochs: int = 30
    batch_size: int = 128
    learning_rate: float = 1e-3
    noise_sd: float = 0.1
    entropy_weight: float = 1.0

    def fit(self, model_fn: ModelFunction, data: Data, seed: int) -> StackedPosterior:
        """The teacher's posterior, and of it a student of the same architecture: one draw.

        Raises:
            WrongArgument: as `distil`.
            UnsupportedLayer: a model that does not end in a Dense layer of logits.
        """
        self._check()
        return self.distil(self.teacher.fit(model_fn, data, seed), model_fn, data, seed)

    def distil(self, teacher: Posterior, model_fn: ModelFunction, data: Data, seed: int) -> StackedPosterior:
        """A student of any posterior, of any architecture that takes its inputs.

        Its model has two outputs, logits (n, classes) and the expected entropy (n, 1) in nats; `predict` is of the
        first, `distilled_uncertainty` of both.

        Args:
            teacher: whose probabilities are learned.
            model_fn: of the student.
            data: whose inputs are seen; labels are not.
            seed: of initial weights, orders and noise.

        Raises:
            WrongArgument: numbers that are not above 0.
            UnsupportedLayer: a model that does not end in a Dense layer of logits.
            TrainingFailed: a loss is not finite.
        """
        self._check()
        check_run(model_fn, data, seed)
        student, model = _with_entropy(Members.new(model_fn, 1, seed).model, seed)
        rate = keras.optimizers.schedules.CosineDecay(
            self.learning_rate, max(self.epochs * steps_of(data, self.batch_size), 1)
        )
        losses = [keras.losses.CategoricalCrossentropy(from_logits=True), keras.losses.BinaryCrossentropy()]
        student.compile(keras.optimizers.Adam(rate), losses, loss_weights=[1.0, self.entropy_weight])
        for epoch, (x, targets) in enumerate(self._epochs(teacher, data, seed)):
            history = student.fit(x, targets, batch_size=self.batch_size, shuffle=False, verbose=0)
            (loss,) = history.history["loss"]
            if not np.isfinite(loss):
                raise TrainingFailed(f"The student's loss is {loss} in epoch {epoch}.")
        weights = [
            [ops.convert_to_numpy(one)[None] for one in some]
            for some in (model.trainable_variables, model.non_trainable_variables)
        ]
        return StackedPosterior(Members(model, *weights), diagnostics=teacher.diagnostics)

    @classmethod
    def space(cls) -> Space:
        """What a tuner may vary, besides what the teacher has."""
        return {
            "epochs": Int(10, 100),
            "learning_rate": Float(1e-4, 1e-2, log=True),
            "noise_sd": Float(0.01, 1.0, log=True),
        }

    def _check(self) -> None:
        if min(self.epochs, self.batch_size) < 1 or not (self.learning_rate > 0 and self.entropy_weight > 0):
            raise WrongArgument(f"Epochs, batches, rates and weights are above 0: {self}.")
        if not self.noise_sd >= 0:
            raise WrongArgument(f"`noise_sd` is 0 or more, not {self.noise_sd!r}.")

    def _epochs(self, teacher: Posterior, data: Data, seed: int) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
        """Inputs in an order of their own, with noise, and what the teacher says of them."""
        random = np.random.default_rng([seed, 5])
        size = steps_of(data, self.batch_size) * min(self.batch_size, len(data))
        for _ in range(self.epochs):
            x = data.x[random.permutation(len(data))[:size]]
            x = x + np.float32(self.noise_sd) * random.standard_normal(x.shape, dtype=np.float32)
            parts = [_said(teacher, x[start : start + ROWS]) for start in range(0, len(x), ROWS)]
            yield x, [np.concatenate(part) for part in zip(*parts, strict=True)]


def distilled_uncertainty(posterior: Posterior, x: Any, *, batch_size: int = 256) -> dict[str, np.ndarray]:
    """Entropies in nats, (n,) each, as `tasks.uncertainty` has them, by one call of a distilled network.

    ```
    total = H(p)        aleatoric = the second output, at most the total        epistemic = total − aleatoric ≥ 0
    ```

    Raises:
        WrongArgument: a posterior without a second output.
    """
    model = posterior.model
    if len(model.outputs) != 2:
        raise WrongArgument(f"Model {model.name!r} has no output for the expected entropy.", hint="Distil it.")
    run = compiled(lambda inputs, weights: model.stateless_call(*weights, inputs, training=False)[0])
    logits: list[np.ndarray] = []
    entropy: list[np.ndarray] = []
    for start in range(0, len(x), batch_size):
        batch = ops.convert_to_tensor(np.asarray(x[start : start + batch_size], np.float32))
        for found, output in zip((logits, entropy), run(batch, posterior._member(0)), strict=True):
            found.append(ops.convert_to_numpy(output).astype(np.float64))
    likely = np.concatenate(logits)
    likely = likely - np.logaddexp.reduce(likely, axis=1, keepdims=True)
    total = -(np.exp(likely) * likely).sum(axis=1)
    aleatoric = np.minimum(np.concatenate(entropy)[:, 0], total)
    return {"total": total, "aleatoric": aleatoric, "epistemic": total - aleatoric}


def _with_entropy(model: keras.Model, seed: int) -> tuple[keras.Model, keras.Model]:
    """The model with a share of the largest entropy beside its logits, for training, and with the entropy itself."""
    last = last_dense(model, "Distillation")
    starting = keras.initializers.GlorotUniform(seed=seed_of(seed, 6))
    head = keras.layers.Dense(1, activation="sigmoid", kernel_initializer=starting, dtype="float32", name="share")
    share = head(last.input)
    largest = float(np.log(model.output_shape[-1]))
    entropy = keras.layers.Rescaling(largest, dtype="float32", name="entropy")(share)
    return tuple(keras.Model(model.input, [model.output, other], name=model.name) for other in (share, entropy))  # type: ignore[return-value]


def _said(teacher: Posterior, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, classes) mean probabilities, and (n, 1) mean entropies of members as shares of the largest."""
    p = teacher.predict(x)
    entropies = -(p * np.log(np.maximum(p, np.finfo(np.float32).tiny))).sum(axis=-1)
    return p.mean(axis=0), (entropies.mean(axis=0) / np.log(p.shape[-1]))[:, None].clip(0, 1).astype(np.float32)
