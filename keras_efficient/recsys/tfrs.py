"""TensorFlow Recommenders around Keras 3 towers: its tasks and its FactorizedTopK, with a training step that works.

`tensorflow_recommenders` needs a process in which `tf.keras` is tf_keras (Keras 2), which is chosen before `tf.keras`
is first used::

    TF_USE_LEGACY_KERAS=1 python train.py

There `import keras` is Keras 3 as ever, and the towers are Keras 3 models. `tfrs.Model.fit` hands their variables to an
optimizer that does not know them; `trainer` steps in there. Nothing is switched here behind the user's back.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import keras

from keras_efficient.errors import KerasEfficientError, MissingDependency, WrongArgument

__all__ = ["factorized_top_k", "trainer"]


def trainer(
    towers: dict[str, keras.Model],
    task: Any,
    compute_loss: Callable[[Any, dict[str, Callable[[Any], Any]], Any], Any],
    optimizer: Any = None,
) -> Any:
    """A `tfrs.Model` that trains Keras 3 towers with a Keras 3 optimizer: `compile()`, `fit`, `evaluate` as usual.

    ```python
    task = tfrs.tasks.Retrieval(metrics=recsys.tfrs.factorized_top_k(items, item_tower))
    model = recsys.tfrs.trainer(
        {"query": query_tower, "item": item_tower},
        task,
        lambda task, towers, x: task(towers["query"](x["history"]), towers["item"](x["item"])),
    )
    model.compile()
    model.fit(dataset, epochs=3)
    ```

    Args:
        towers: built Keras 3 models by name.
        task: a task of `tfrs.tasks`, or a list or dict of several; their metrics are the model's.
        compute_loss: what `tfrs.Model.compute_loss` is: of the task, the towers and a batch, a scalar. The towers that
            it is given are called in training mode while they are trained.
        optimizer: a Keras 3 optimizer; by default `keras.optimizers.Adagrad(0.1)`, as in the tutorials of TFRS.

    Raises:
        KerasEfficientError: `tf.keras` of this process is Keras 3; the message gives the line to run.
        MissingDependency: `tensorflow_recommenders` is not installed.
        WrongArgument: a tower that is not built or not of Keras 3; another backend than TensorFlow.
    """
    tfrs = _import()
    import tensorflow as tf

    for name, tower in towers.items():
        if not isinstance(tower, keras.Model) or not tower.built:
            raise WrongArgument(f"Tower {name!r} is no built Keras 3 model.", hint="Call it once on real ids.")
    weights = [v for tower in towers.values() for v in tower.trainable_variables]
    chosen = optimizer or keras.optimizers.Adagrad(0.1)
    chosen.build(weights)

    base: Any = tfrs.Model

    class Trainer(base):
        """Keras 3 towers in a `tfrs.Model`."""

        def __init__(self) -> None:
            super().__init__()
            self.task = task  # held, so that its metrics are found

        def compute_loss(self, inputs: Any, training: bool = False) -> Any:
            called: dict[str, Callable[[Any], Any]]
            called = {name: functools.partial(tower, training=training) for name, tower in towers.items()}
            return compute_loss(task, called, inputs)

        def train_step(self, inputs: Any) -> dict[str, Any]:
            with tf.GradientTape() as tape:
                loss = self.compute_loss(inputs, training=True)
                penalty = sum((sum(tower.losses) for tower in towers.values() if tower.losses), start=0.0)
                total = loss + penalty
            chosen.apply(tape.gradient(total, [v.value for v in weights]), weights)
            return {**{m.name: m.result() for m in self.metrics}, "loss": loss, "total_loss": total}

    return Trainer()


def factorized_top_k(items: Any, item_tower: keras.Model, *, k: tuple[int, ...] = (1, 5, 10, 50, 100)) -> Any:
    """`tfrs.metrics.FactorizedTopK` over the vectors of all items.

    Args:
        items: a batched `tf.data.Dataset` of the ids of all candidates.
        item_tower: gives their vectors.
        k: sizes of the lists.
    """
    tfrs = _import()
    return tfrs.metrics.FactorizedTopK(candidates=items.map(lambda ids: item_tower(ids)), ks=list(k))


def _import() -> Any:
    if keras.backend.backend() != "tensorflow":
        raise WrongArgument(
            f"TensorFlow Recommenders needs the TensorFlow backend, this process runs {keras.backend.backend()!r}.",
            hint="KERAS_BACKEND=tensorflow TF_USE_LEGACY_KERAS=1 python …",
        )
    import tensorflow as tf

    if not tf.keras.Model.__module__.startswith("tf_keras"):
        line = "TF_USE_LEGACY_KERAS=1 python …"
        late = " (it is set, but tf.keras was used before)" if os.environ.get("TF_USE_LEGACY_KERAS") else ""
        raise KerasEfficientError(
            f"TensorFlow Recommenders needs a process whose tf.keras is tf_keras; in this one it is Keras 3{late}.",
            hint=f"Start the program so: {line}",
        )
    try:
        import tensorflow_recommenders as tfrs
    except ImportError as err:
        raise MissingDependency("tensorflow-recommenders", "Training with TFRS", "tfrs") from err
    return tfrs
