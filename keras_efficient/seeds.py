"""Seeds that are made of others, such as of a run's and of a number in it."""

from __future__ import annotations

import numpy as np

__all__ = ["seed_of"]


def seed_of(*parts: int) -> int:
    """A seed of 31 bits, as every library takes it; another one for other parts, each from 0 on."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0] >> 1)
