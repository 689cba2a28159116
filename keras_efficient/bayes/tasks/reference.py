"""Nearness to the predictions of a posterior that is trusted, such as long chains of Hamiltonian Monte Carlo."""

from __future__ import annotations

from typing import Any

from keras_efficient.bayes.tasks._inputs import mean_of
from keras_efficient.errors import WrongArgument

__all__ = ["fidelity"]


def fidelity(probabilities: Any, reference: Any) -> dict[str, float]:
    """How near means over members are.

    ```
    agreement = mean 1[argmax p = argmax q]        total variation = mean ½ Σ_classes |p − q|
    ```

    Args:
        probabilities: p, (members, n, classes), or (n, classes).
        reference: q, of the same examples; it may have other members.

    Returns:
        `agreement` (1: the same classes) and `total_variation` (0: the same probabilities; at most 1).

    Raises:
        WrongArgument: rows that are no distributions, other examples or classes.

    Source: Izmailov et al., ICML 2021, https://arxiv.org/abs/2104.14421, section 5.
    """
    p, q = mean_of(probabilities), mean_of(reference, "reference probabilities")
    if p.shape != q.shape:
        raise WrongArgument(f"Probabilities (n, classes) {p.shape} and the reference's {q.shape} differ.")
    return {
        "agreement": float((p.argmax(axis=1) == q.argmax(axis=1)).mean()),
        "total_variation": float(abs(p - q).sum(axis=1).mean() / 2),
    }
