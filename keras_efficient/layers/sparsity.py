"""N:M sparsity of convolution kernels: of each M neighbouring input channels, at most N weights are not zero."""

from __future__ import annotations

import re

from keras import ops

__all__ = ["keep_largest", "parse_sparsity"]


def parse_sparsity(pattern):
    """`"2:4"` → `(2, 4)`: how many are kept, of how many."""
    found = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    kept, of = (int(number) for number in found.groups()) if found else (0, 0)
    if not 1 <= kept < of:
        raise ValueError(f'`sparsity` must be None or "N:M" with 1 ≤ N < M, such as "2:4". Received: {pattern!r}.')
    return kept, of


def keep_largest(kernel, kept, of):
    """Zeroes all but the `kept` largest magnitudes of each `of` neighbours along the input channels (the third axis).

    The choice is a constant to the gradient: weights that are left out receive none. Ties go to the first.
    """
    rows, columns, channels, filters = kernel.shape
    groups = ops.reshape(kernel, (rows, columns, channels // of, of, filters))
    # The second argsort turns the order into each weight's rank.
    ranks = ops.argsort(ops.argsort(-ops.abs(groups), axis=3), axis=3)
    mask = ops.stop_gradient(ops.cast(ranks < kept, kernel.dtype))
    return ops.reshape(groups * mask, kernel.shape)
