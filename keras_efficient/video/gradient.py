"""How much the server's accuracy gains where a macroblock is coded well instead of badly."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_efficient.errors import WrongArgument
from keras_efficient.video.encoder import BLOCK
from keras_efficient.video.servers import Server

__all__ = ["accuracy_gradient"]

Gradient = Callable[[np.ndarray, Any], Any]

# Compiled for each server and size of frames, while the server lives.
_COMPILED: weakref.WeakKeyDictionary[Server, dict[tuple[int, ...], Gradient]] = weakref.WeakKeyDictionary()


def accuracy_gradient(
    server: Server, high: np.ndarray, low: np.ndarray, *, at: str = "low", weight: str = "difference", norm: int = 1
) -> np.ndarray:
    """What each macroblock is worth: how far the server's score would rise if it were coded well.

    ```
    gain_B = Σ_{pixels of B} ‖∂ score(X; reference(H)) / ∂X‖ · ‖H − L‖      at X = L
    ```

    with norms over the channels: the first-order estimate of the score that the better quality buys.

    Args:
        server: what looks at the frames.
        high, low: (b, h, w, 3), RGB, 0 to 255: frames coded well, H, and badly, L.
        at: `"low"`, or `"high"`: where the gradient is taken.
        weight: `"difference"`, or `"none"`: without the second factor.
        norm: 1 or 2.

    Returns:
        (b, ⌈h/16⌉, ⌈w/16⌉) float32. Macroblocks at an edge count what of them is in the frame.

    Raises:
        WrongArgument: frames of different shapes; a score without a gradient, or with one that is not finite.

    Source: AccMPEG: Optimizing Video Encoding for Accurate Video Analytics, MLSys 2022.
    """
    high, low = np.asarray(high, "float32"), np.asarray(low, "float32")
    if high.shape != low.shape or high.ndim != 4 or high.shape[-1] != 3:
        raise WrongArgument(f"Frames of both qualities must be of one shape (b, h, w, 3): {high.shape}, {low.shape}.")
    if at not in ("low", "high") or weight not in ("difference", "none") or norm not in (1, 2):
        raise WrongArgument(f"No gradient is taken at={at!r}, weight={weight!r}, norm={norm!r}.")
    slopes = _slopes(server, low if at == "low" else high, server.reference(high))
    if not np.isfinite(slopes).all():
        raise WrongArgument("The server's score has a gradient that is not finite.")
    if not slopes.any() and (high != low).any():
        raise WrongArgument(
            "The server's score has no gradient.", hint="Classes that were chosen have none: score logits."
        )
    gains = np.linalg.norm(slopes, norm, axis=-1)
    if weight == "difference":
        gains = gains * np.linalg.norm(high - low, norm, axis=-1)
    return _block_sums(gains)


def _slopes(server: Server, frames: np.ndarray, reference: Any) -> np.ndarray:
    """∂ Σ score / ∂ frames, of the frames' shape."""
    compiled = _COMPILED.setdefault(server, {})
    if (size := frames.shape[1:]) not in compiled:
        compiled[size] = _differentiated(weakref.ref(server))
    found = compiled[size](frames, reference)
    if found is None:
        raise WrongArgument("The server's score does not depend on the frames.")
    return np.asarray(ops.convert_to_numpy(found))


def _differentiated(server: Callable[[], Any]) -> Gradient:
    """The gradient as a compiled function; it does not keep the server alive."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(jax.grad(lambda x, reference: ops.sum(server().score(x, reference))))
    import tensorflow as tf

    @tf.function(autograph=False, reduce_retracing=True)
    def run(x: Any, reference: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            score = tf.reduce_sum(server().score(x, reference))
        return tape.gradient(score, x)

    return lambda x, reference: run(tf.constant(x), reference)


def _block_sums(values: np.ndarray) -> np.ndarray:
    """(b, h, w) to sums over macroblocks (b, ⌈h/16⌉, ⌈w/16⌉)."""
    batch, height, width = values.shape
    rows, columns = -(-height // BLOCK), -(-width // BLOCK)
    whole = np.pad(values, [(0, 0), (0, rows * BLOCK - height), (0, columns * BLOCK - width)])
    sums: np.ndarray = whole.reshape(batch, rows, BLOCK, columns, BLOCK).sum(axis=(2, 4))
    return sums
