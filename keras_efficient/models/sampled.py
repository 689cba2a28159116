"""Training of classifiers over very many classes, of which each batch sees a few, on TensorFlow and JAX."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_efficient.distribution import local_rows
from keras_efficient.errors import UnsupportedLayer, WrongArgument
from keras_efficient.layers import HALOSOutput
from keras_efficient.layers.halos.layer import input_of

__all__ = ["Negatives", "SampledSoftmax"]


class Negatives:
    """The classes that are drawn for a batch, in proportion to ``(count + 1)^power``.

    On several hosts each gives the part of them that its devices hold under the distribution that is set.

    Args:
        counts: (classes,) how often each class is a label.
        number: how many are drawn.
        power: of the counts.

    Raises:
        WrongArgument: a number out of range.
    """

    def __init__(self, counts: np.ndarray, number: int, power: float = 0.5):
        _check_numbers(number, power)
        counts = np.asarray(counts)
        if counts.ndim != 1 or not counts.size or not (np.isfinite(counts).all() and counts.min() >= 0):
            raise WrongArgument("`counts` must be finite numbers from 0 on, one for each class.")
        weights = (counts + 1.0) ** power
        self.number = number
        self._cumulated = np.cumsum(weights / weights.sum())
        self._log_expected = np.log(number * weights / weights.sum()).astype("float32")
        self._local = local_rows(number)

    def draw(self, random: np.random.Generator, targets: np.ndarray) -> dict[str, np.ndarray]:
        """What `SampledSoftmax` is told of the drawn classes, for the targets (batch, most targets) of a batch."""
        drawn = np.searchsorted(self._cumulated, random.random(self.number)).clip(0, len(self._cumulated) - 1)
        classes, counts = np.unique(drawn, return_counts=True)
        places = np.searchsorted(classes, targets).clip(max=len(classes) - 1)
        found = np.where(classes[places] == targets, counts[places], 0)
        drawn = drawn[self._local].astype("int32")
        return {
            "negatives": drawn,
            "log_expected": self._log_expected[drawn],
            "hits": (found * np.exp(-self._log_expected[np.maximum(targets, 0)])).astype("float32"),
        }


def _check_numbers(number: Any, power: Any) -> None:
    if isinstance(number, bool) or not isinstance(number, Integral) or number < 1:
        raise WrongArgument(f"`negatives` must be a whole number from 1 on, not {number!r}.")
    if not isinstance(power, Real) or not 0 <= float(power) < math.inf:
        raise WrongArgument(f"`power` must be a finite number from 0 on, not {power!r}.")


_PARTS = {"inputs", "targets", "weights", "negatives", "log_expected", "hits"}


@keras.saving.register_keras_serializable(package="keras_efficient")
class SampledSoftmax(keras.Model):
    """Trains a classifier whose last layer has very many logits, without computing all of them.

    For each input, or user, with targets T, and classes N drawn with expected counts E:

    ```
    softmax:  Z_t  = e^logit_t + Σ_{j in N, j ≠ t} e^logit_j / E_j     an estimate of the softmax's normaliser
              loss = Σ_users Σ_{t in T} weight · (log Z_t − logit_t) / Σ_users weight · |T|
    sigmoid:  loss = Σ_users weight · (Σ_{j in N, not in T} softplus(logit_j) / E_j + Σ_{t in T} softplus(−logit_t))
                     / Σ_users weight · |T|
    ```

    The division by E is the log-Q correction: classes that are drawn often count for less. The sigmoid's is the binary
    cross-entropy of all classes, the sum over those that are not targets estimated from the drawn ones. Both are never
    negative, and those of all classes where each is drawn once.

    Args:
        classifier: a functional model whose last layer is a `HALOSOutput`, or an `EinsumDense("bh,ch->bc", …)` as in
            `models.SequenceClassifier`: its kernel has a row for each class.
        loss: `"softmax"` or `"sigmoid"`.

    Call arguments: a dict as `recsys.HistoryBatches` and `extreme.SampledBatches` give it: `inputs` of the classifier,
    `targets` (batch, most targets) with −1 where there are fewer, `weights` (batch,), `negatives` and `log_expected`
    (drawn,), and `hits`, how often each target was drawn over how often it was expected. Output: what goes into the
    last layer.

    Source: Bengio and Senécal, Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language
    Model, 2008; Jean et al., ACL 2015.
    """

    def __init__(self, classifier, loss="softmax", **kwargs):
        super().__init__(**kwargs)
        if loss not in ("softmax", "sigmoid"):
            raise WrongArgument(f'`loss` must be "softmax" or "sigmoid", not {loss!r}.')
        self.classifier, self.of_sigmoid = classifier, loss == "sigmoid"
        # One that embeds too is not the last of a model's layers.
        tied = [layer for layer in classifier.layers if isinstance(layer, HALOSOutput)]
        self.last = (tied or classifier.layers)[-1]
        if not tied and not _has_a_row_for_each_class(self.last):
            raise UnsupportedLayer(
                self.last.name,
                "the last layer must be a HALOSOutput, or an EinsumDense('bh,ch->bc') of logits with a bias.",
                hint="models.SequenceClassifier makes one.",
            )
        self._known_variables = None
        self._body = keras.Model(classifier.input, input_of(classifier, self.last))

    def fit(self, x=None, *args, **kwargs):
        """As Keras', of batches that hold their targets."""
        counted = getattr(x, "classes", None)
        if isinstance(counted, int) and counted != self.last.kernel.shape[0]:
            raise WrongArgument(f"The batches are of {counted} classes, the model has {self.last.kernel.shape[0]}.")
        variables = [id(variable) for variable in self.classifier.variables]
        if variables != self._known_variables:  # an index has come or gone since a step was compiled
            self.train_function = self.test_function = None
            self._known_variables = variables
        return super().fit(x, *args, **kwargs)

    def call(self, inputs, training=False):
        if not isinstance(inputs, dict) or not inputs.keys() >= _PARTS:
            hint = "extreme.SampledBatches(batches, counts) makes them."
            raise WrongArgument(f"SampledSoftmax takes batches that hold {', '.join(sorted(_PARTS))}.", hint=hint)
        return self._body(inputs["inputs"], training=training)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        hidden = ops.cast(y_pred, "float32")
        vectors = ops.cast(self.last.kernel, "float32")
        drawn = ops.matmul(hidden, ops.transpose(ops.take(vectors, x["negatives"], axis=0)))
        drawn = drawn + self._biases(x["negatives"])
        present = ops.greater_equal(x["targets"], 0)
        targets = ops.maximum(x["targets"], 0)
        logits = ops.einsum("bd,btd->bt", hidden, ops.take(vectors, targets, axis=0)) + self._biases(targets)
        weights = ops.cast(present, "float32") * x["weights"][:, None]
        if self.of_sigmoid:
            others = ops.sum(ops.softplus(drawn) * ops.exp(-x["log_expected"]), axis=-1, keepdims=True)
            hit = ops.sum(ops.where(present, ops.softplus(logits) * x["hits"], 0.0), axis=-1, keepdims=True)
            total = ops.sum(ops.maximum(others - hit, 0.0)[:, 0] * x["weights"]) + ops.sum(
                ops.softplus(-logits) * weights
            )
        else:
            everything = ops.logsumexp(drawn - x["log_expected"], axis=-1, keepdims=True)
            largest = ops.stop_gradient(ops.maximum(everything, logits))
            own = ops.exp(logits - largest)
            others = ops.maximum(ops.exp(everything - largest) - x["hits"] * own, 0.0)
            total = ops.sum((ops.log(own + others) + largest - logits) * weights)
        loss = total / ops.maximum(ops.sum(weights), 1.0)
        return loss + sum(self.losses) if self.losses else loss

    def _biases(self, classes):
        if self.last.bias is None:
            return 0.0
        return ops.cast(ops.take(self.last.bias, classes), "float32")

    def get_config(self):
        classifier = keras.saving.serialize_keras_object(self.classifier)
        return {"classifier": classifier, "loss": "sigmoid" if self.of_sigmoid else "softmax", "name": self.name}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config.pop("classifier")), **config)


def _has_a_row_for_each_class(layer: keras.Layer) -> bool:
    return getattr(layer, "equation", None) == "bh,ch->bc" and layer.bias_axes == "c"
