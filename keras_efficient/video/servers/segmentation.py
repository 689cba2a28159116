"""Networks that give each pixel a class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from keras_efficient.errors import WrongArgument
from keras_efficient.video.servers.base import Preprocessing

__all__ = ["SegmentationServer"]


class SegmentationServer:
    """A network from pictures to classes of pixels, (b, rows, columns, classes).

    ```
    score = Σ_{pixels, classes} p_ref log p
    ```

    Args:
        network: (b, …) inputs to logits, or to probabilities, with a gradient.
        preprocessing: of frames.
        answer: as the network, without a gradient, where that is faster.
        of_logits: whether it gives logits.

    A network that gives something else is refused, with `WrongArgument`, at its first frame.
    """

    def __init__(
        self,
        network: Callable[[Any], Any],
        preprocessing: Preprocessing,
        *,
        answer: Callable[[Any], Any] | None = None,
        of_logits: bool = True,
    ):
        self.network, self.preprocessing, self.answer = network, preprocessing, answer or network
        self.of_logits = of_logits

    def predict(self, frames: Any) -> list[np.ndarray]:
        """The class of each pixel of the network's output: (rows, columns) int32."""
        found = ops.convert_to_numpy(_of_pixels(self.answer(self.preprocessing(frames))))
        return list(found.argmax(axis=-1).astype(np.int32))

    def reference(self, frames: Any) -> Any:
        return ops.convert_to_numpy(ops.exp(self._log_probabilities(self.answer, frames)))

    def score(self, frames: Any, reference: Any) -> Any:
        return ops.sum(self.parts(frames, reference), axis=-1)

    def parts(self, frames: Any, reference: Any) -> Any:
        """Of each class: (b, classes)."""
        return ops.sum(reference * self._log_probabilities(self.network, frames), axis=(1, 2))

    def _log_probabilities(self, network: Callable[[Any], Any], frames: Any) -> Any:
        found = _of_pixels(network(self.preprocessing(frames)))
        return ops.log_softmax(found, axis=-1) if self.of_logits else ops.log(ops.clip(found, 1e-6, 1.0))


def _of_pixels(found: Any) -> Any:
    if len(found.shape) != 4:
        raise WrongArgument(f"A segmenter gives (batch, rows, columns, classes), not {tuple(found.shape)}.")
    return found
