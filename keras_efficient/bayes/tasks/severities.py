"""Predictions on inputs that drift away from what was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_efficient.bayes.tasks.calibration import prediction
from keras_efficient.errors import WrongArgument

__all__ = ["shift"]


def shift(predictions: Mapping[tuple[str, int], Any], labels: Any) -> dict[str, float]:
    """Everything `prediction` measures, over corruptions and their severities.

    Args:
        predictions: probabilities by (corruption, severity), such as ("rotation", 3); all of the same examples. See
            `keras_efficient.bayes.corruptions`.
        labels: (n,) integers.

    Returns:
        `error` and so on: the mean over all; `error_3`: the mean over corruptions at severity 3.

    Raises:
        WrongArgument: no prediction, a corruption that lacks a severity that another has, or what `prediction` refuses.
    """
    severities = sorted({severity for _, severity in predictions})
    names = sorted({name for name, _ in predictions})
    missing = [(name, level) for name in names for level in severities if (name, level) not in predictions]
    if missing or not predictions:
        raise WrongArgument(f"No prediction for {missing[0]}." if missing else "There is no prediction.")
    found = {key: prediction(one, labels) for key, one in predictions.items()}
    measures = next(iter(found.values()))
    means = {name: float(np.mean([one[name] for one in found.values()])) for name in measures}
    for level in severities:
        for measure in measures:
            means[f"{measure}_{level}"] = float(np.mean([found[name, level][measure] for name in names]))
    return means
