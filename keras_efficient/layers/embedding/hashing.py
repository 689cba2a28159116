"""Hash functions of integer ids that give the same numbers in Keras on every backend, in NumPy, LiteRT and ONNX.

LiteRT has no integer shifts or exclusive or that all of its kernels know, and ids are int32 on a device, so that a hash
is made of products and remainders that stay below 2³¹.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

__all__ = ["MOST_BUCKETS", "mix"]

_SPLIT = 32_749  # the largest prime below 2¹⁵: parts of an id below 2³¹ are then below 2¹⁵ and 2¹⁶·1.001
MOST_BUCKETS = 67_108_859  # the largest prime below 2²⁶: the sums are some times larger, so that it mixes them
_LIMITS = (2**14, 2**14, 2**28)


def mix(ids: Any, buckets: int, seeds: int | np.ndarray = 0) -> Any:
    """A bucket in ``[0, buckets)`` for each id, without a pattern in neighbouring ids.

    Two rounds of ``x ← (a·(x mod p) + b·⌊x / p⌋ + c) mod P`` with constants that belong to the seed, then ``mod
    buckets``. An array of seeds must broadcast with `ids`; it gives as many functions at once.

    Raises:
        ValueError: more buckets than P, of which some would stay empty.
    """
    if buckets > MOST_BUCKETS:
        raise ValueError(f"A hash has at most {MOST_BUCKETS} buckets. Received: {buckets}.")
    for round_number in range(2):
        a, b, c = _constants(np.asarray(seeds), round_number)
        low, high = ops.mod(ids, _SPLIT), ops.floor_divide(ids, _SPLIT)
        ids = ops.mod(low * a + high * b + c, MOST_BUCKETS)
    return ops.mod(ids, buckets)


def _constants(seeds: np.ndarray, round_number: int) -> tuple[Any, Any, Any]:
    """Per seed: two odd factors below 2¹⁴ and a summand below 2²⁸: the sum of products stays below 2³¹."""
    flat = [np.random.default_rng([int(seed), round_number]).integers(2**10, _LIMITS) for seed in seeds.flat]
    found = np.array(flat, np.int32).reshape(*seeds.shape, 3)
    a, b, c = (found[..., i] | 1 for i in range(3))
    return (a, b, c) if seeds.ndim else (int(a), int(b), int(c))
