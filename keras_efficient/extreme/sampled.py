"""Batches for training by a few drawn classes instead of all of them."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_efficient.errors import WrongArgument
from keras_efficient.models.sampled import Negatives

__all__ = ["SampledBatches"]


class SampledBatches(keras.utils.PyDataset):
    """Batches of another dataset as `models.SampledSoftmax` takes them, with the classes that are drawn for each.

    ```python
    batches = extreme.SparseBatches(file, shuffle=True)
    training = models.SampledSoftmax(model)
    training.compile("adam")
    training.fit(extreme.SampledBatches(batches, file.label_counts()), epochs=5)
    ```

    Args:
        batches: ``(x, y)`` or ``(x, y, weights)``; labels (batch,) or (batch, most labels), −1 where there are fewer.
        counts: (classes,) how often each class is a label: frequent ones are drawn more often.
        negatives: classes drawn for each batch, in proportion to ``(count + 1)^power``.
        power: of the counts.
        seed: of what is drawn.

    Raises:
        WrongArgument: a number or a label out of range.
    """

    def __init__(
        self,
        batches: keras.utils.PyDataset,
        counts: np.ndarray,
        *,
        negatives: int = 4096,
        power: float = 0.5,
        seed: int = 0,
        **options: Any,
    ):
        super().__init__(**options)
        if not isinstance(batches, keras.utils.PyDataset):
            hint = "Make one of arrays: its __getitem__ gives the (x, y) of a batch."
            raise WrongArgument(f"Batches are a keras.utils.PyDataset, not {type(batches).__name__}.", hint=hint)
        self.batches, self.classes, self.seed, self.epoch = batches, len(counts), seed, 0
        self._negatives = Negatives(counts, negatives, power)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[dict[str, Any]]:
        inputs, labels, *weights = self.batches[index]
        targets = np.asarray(labels)
        if targets.dtype.kind not in "iu" or targets.ndim not in (1, 2):
            raise WrongArgument(f"Batch {index}: labels are class numbers, got {targets.dtype} {targets.shape}.")
        is_matrix = targets.ndim == 2 and targets.shape[1] == self.classes > 2 and targets.size
        if is_matrix and 0 <= targets.min() <= targets.max() <= 1:
            raise WrongArgument(
                f"Batch {index}: labels {targets.shape} of ones and zeros.",
                hint="Give the numbers of the classes, −1 where a row has fewer.",
            )
        targets = (targets[:, None] if targets.ndim == 1 else targets).astype(np.int32)
        if targets.size and (targets.min() < -1 or targets.max() >= self.classes):
            wrong = targets.min() if targets.min() < -1 else targets.max()
            raise WrongArgument(f"Batch {index} has label {wrong}; there are classes 0 to {self.classes - 1}.")
        drawn = self._negatives.draw(np.random.default_rng([self.seed, self.epoch, index]), targets)
        sample_weights = np.asarray(weights[0] if weights else np.ones(len(targets)), np.float32)
        return ({"inputs": inputs, "targets": targets, "weights": sample_weights, **drawn},)

    def on_epoch_end(self) -> None:
        """Keras calls it: the next epoch draws anew."""
        self.epoch += 1
        self.batches.on_epoch_end()
