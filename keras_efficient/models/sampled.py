"""Training of classifiers over very many classes, of which each batch sees a few, on TensorFlow and JAX."""

from __future__ import annotations

import keras
from keras import ops

from keras_efficient.errors import UnsupportedLayer, WrongArgument
from keras_efficient.layers import HALOSOutput

__all__ = ["SampledSoftmax"]


@keras.saving.register_keras_serializable(package="keras_efficient")
class SampledSoftmax(keras.Model):
    """Trains a classifier whose last layer has very many logits, without computing all of them.

    For each user with targets T, and classes N drawn with expected counts E:

    ```
    softmax:  log Z = logsumexp_{j in N} (logit_j − log E_j)          an estimate of the softmax's normaliser
              loss  = Σ_users Σ_{t in T} weight · (log Z − logit_t) / Σ_users weight · |T|
    sigmoid:  loss  = Σ_users weight · (Σ_{j in N} softplus(logit_j) / E_j − Σ_{t in T} logit_t) / Σ_users weight · |T|
    ```

    The subtraction of `log E` is the log-Q correction: classes that are drawn often count for less. The sigmoid's is
    the binary cross-entropy of all classes, the sum over those that are not targets estimated from the drawn ones.

    Args:
        classifier: a functional model whose last layer is a `HALOSOutput`, or an `EinsumDense("bh,ch->bc", …)` as in
            `models.SequenceClassifier`: its kernel has a row for each class.
        loss: `"softmax"` or `"sigmoid"`.

    Call arguments: a dict as `HistoryBatches` gives it. Output: what goes into the last layer.

    Source: Bengio and Senécal, Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language
    Model, 2008; Jean et al., ACL 2015.
    """

    def __init__(self, classifier, loss="softmax", **kwargs):
        super().__init__(**kwargs)
        if loss not in ("softmax", "sigmoid"):
            raise WrongArgument(f'`loss` must be "softmax" or "sigmoid", not {loss!r}.')
        self.classifier, self.of_sigmoid = classifier, loss == "sigmoid"
        self.last = classifier.layers[-1]
        if not isinstance(self.last, HALOSOutput) and not _has_a_row_for_each_class(self.last):
            raise UnsupportedLayer(
                self.last.name,
                "the last layer must be a HALOSOutput, or an EinsumDense('bh,ch->bc') of logits with a bias.",
                hint="models.SequenceClassifier makes one.",
            )
        self._body = keras.Model(classifier.inputs, self.last.input)

    def call(self, inputs, training=False):
        return self._body(inputs["ids"], training=training)

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
            others = ops.sum(ops.softplus(drawn) * ops.exp(-x["log_expected"]), axis=-1)
            total = ops.sum(others * x["weights"]) - ops.sum(logits * weights)
        else:
            normaliser = ops.logsumexp(drawn - x["log_expected"], axis=-1, keepdims=True)
            total = ops.sum((normaliser - logits) * weights)
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
