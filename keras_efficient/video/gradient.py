"""How much the server's accuracy gains where a macroblock is coded well instead of badly."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_efficient.errors import WrongArgument
from keras_efficient.macroblocks import BLOCK, grid
from keras_efficient.video.servers import Server

__all__ = ["accuracy_gradient"]

Gradient = Callable[[np.ndarray, Any, np.ndarray], Any]

# Compiled for each server and size of frames, while the server lives; of the latest sizes, since each takes memory.
_COMPILED: weakref.WeakKeyDictionary[Server, dict[tuple[Any, ...], Gradient]] = weakref.WeakKeyDictionary()
MOST = 8


def accuracy_gradient(
    server: Server,
    high: np.ndarray,
    low: np.ndarray,
    *,
    at: str = "low",
    weight: str = "difference",
    norm: int = 1,
    each: bool = False,
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
        each: whether each part of the score, a detection, a person or a class, counts alike: the gains that a part
            gives to a frame are divided by their sum. It takes a gradient for each part. The server has `parts`.

    Returns:
        (b, ⌈h/16⌉, ⌈w/16⌉) float32. Macroblocks at an edge count what of them is in the frame.

    Raises:
        WrongArgument: frames of different shapes; a score without a gradient, with one that is not finite, or
            without parts.

    Source: AccMPEG: Optimizing Video Encoding for Accurate Video Analytics, MLSys 2022.
    """
    high, low = np.asarray(high, "float32"), np.asarray(low, "float32")
    if high.shape != low.shape or high.ndim != 4 or high.shape[-1] != 3:
        raise WrongArgument(f"Frames of both qualities must be of one shape (b, h, w, 3): {high.shape}, {low.shape}.")
    if at not in ("low", "high") or weight not in ("difference", "none") or norm not in (1, 2):
        raise WrongArgument(f"No gradient is taken at={at!r}, weight={weight!r}, norm={norm!r}.")
    frames, reference = low if at == "low" else high, server.reference(high)
    weighted = np.linalg.norm(high - low, norm, axis=-1) if weight == "difference" else 1.0
    if not each:
        slopes = _slopes(server, frames, reference)
        # Where nothing is seen, there is nothing to lose: both frames score alike.
        if not slopes.any() and np.any(_scores(server, high, reference) != _scores(server, low, reference)):
            raise WrongArgument(
                "The server's score has no gradient.", hint="Classes that were chosen have none: score logits."
            )
        return _block_sums(np.linalg.norm(slopes, norm, axis=-1) * weighted)
    if not hasattr(server, "parts"):
        raise WrongArgument("The server's score has no parts.", hint='A detector has them with score="hits".')
    values = ops.convert_to_numpy(server.parts(frames, reference))
    total = np.zeros((len(frames), *grid(*frames.shape[1:3])), np.float32)
    for number in np.flatnonzero(values.any(axis=0)):
        chosen = (np.arange(values.shape[1]) == number).astype(np.float32)
        gains = _block_sums(np.linalg.norm(_slopes(server, frames, reference, chosen), norm, axis=-1) * weighted)
        total += gains / np.maximum(gains.sum(axis=(1, 2), keepdims=True), np.finfo(np.float32).tiny)
    return total


def _slopes(server: Server, frames: np.ndarray, reference: Any, chosen: np.ndarray | None = None) -> np.ndarray:
    """∂ Σ score / ∂ frames, of the frames' shape; of some `chosen` parts of it, by their weights (parts,)."""
    compiled = _COMPILED.setdefault(server, {})
    key = (*frames.shape[1:], chosen is not None)
    if key not in compiled:
        for old in list(compiled)[: len(compiled) - MOST + 1]:
            del compiled[old]
        compiled[key] = _differentiated(weakref.ref(server), of_parts=chosen is not None)
    found = compiled[key](frames, reference, np.zeros(0, np.float32) if chosen is None else chosen)
    if found is None:
        raise WrongArgument("The server's score does not depend on the frames.")
    slopes = np.asarray(ops.convert_to_numpy(found))
    if not np.isfinite(slopes).all():
        raise WrongArgument("The server's score has a gradient that is not finite.")
    return slopes


def _scores(server: Server, frames: np.ndarray, reference: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(server.score(frames, reference)))


def _differentiated(server: Callable[[], Any], *, of_parts: bool) -> Gradient:
    """The gradient as a compiled function; it does not keep the server alive."""

    def score(x: Any, reference: Any, chosen: Any) -> Any:
        if of_parts:
            return ops.sum(server().parts(x, reference) * chosen)
        return ops.sum(server().score(x, reference))

    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(jax.grad(score))
    import tensorflow as tf

    @tf.function(autograph=False, reduce_retracing=True)
    def run(x: Any, reference: Any, chosen: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = score(x, reference, chosen)
        return tape.gradient(value, x)

    return lambda x, reference, chosen: run(tf.constant(x), reference, tf.constant(chosen))


def _block_sums(values: np.ndarray) -> np.ndarray:
    """(b, h, w) to sums over macroblocks (b, ⌈h/16⌉, ⌈w/16⌉)."""
    batch, height, width = values.shape
    rows, columns = grid(height, width)
    whole = np.pad(values, [(0, 0), (0, rows * BLOCK - height), (0, columns * BLOCK - width)])
    sums: np.ndarray = whole.reshape(batch, rows, BLOCK, columns, BLOCK).sum(axis=(2, 4))
    return sums
