"""Losses of keras-rs, under the names that the literature uses."""

from __future__ import annotations

from typing import Any

from keras_efficient.errors import MissingDependency

__all__ = ["ranknet"]


def ranknet(**options: Any):
    """RankNet's loss, which is `keras_rs.losses.PairwiseLogisticLoss`.

    ``loss = Σ_ij [y_i > y_j] · log(1 + exp(−(s_i − s_j)))`` over the pairs of a list, for labels y and scores s of
    shape (batch, list); entries with a label below 0 are left out. The default reduction of keras-rs,
    ``"sum_over_batch_size"``, divides the sum over all lists by batch · list, not by the number of pairs: lists of two
    with labels (1, 0) give half of the mean over pairs. ``reduction="sum"`` divides by nothing.

    Args:
        **options: of the keras-rs class: `temperature`, `reduction`, `name`, `dtype`.

    Raises:
        MissingDependency: keras-rs is not installed.

    Source: Burges et al., Learning to Rank using Gradient Descent, ICML 2005.
    """
    try:
        from keras_rs.losses import PairwiseLogisticLoss
    except ModuleNotFoundError as error:
        raise MissingDependency("keras-rs", "RankNet's loss", "recsys") from error
    return PairwiseLogisticLoss(**options)
