"""What a posterior's predictions are good for, measured from probabilities and labels alone.

Probabilities are (members, n, classes), as `predict` gives them, or (n, classes), their mean. No task sees a network,
so predictions can be kept, and measured again. Tasks keep nothing from one call to the next.

| task | measures |
|---|---|
| `prediction` | error, likelihood, Brier score, calibration |
| `misclassification` | do mistakes have more uncertainty: AUROC, AUPR, AURC |
| `out_of_distribution` | do foreign inputs have more uncertainty: AUROC, AUPR, FPR at 95 % |
| `selective_prediction` | risk where only the surest are answered |
| `decisions` | cost of the decisions that a cost matrix asks for |
| `conformal` | coverage and size of sets with a guarantee |
| `shift` | all of `prediction` on corrupted inputs |
| `fidelity` | nearness to a reference posterior |

`uncertainty`, `reliability` and `risk_coverage` give arrays, for further work and for plots.
"""

from keras_efficient.bayes.tasks.calibration import (
    calibration_error,
    classwise_calibration_error,
    prediction,
    reliability,
)
from keras_efficient.bayes.tasks.costs import RARE_CLASSES, RareClasses, decisions
from keras_efficient.bayes.tasks.coverage import risk_coverage, selective_prediction
from keras_efficient.bayes.tasks.detection import misclassification, out_of_distribution
from keras_efficient.bayes.tasks.entropies import uncertainty
from keras_efficient.bayes.tasks.reference import fidelity
from keras_efficient.bayes.tasks.sets import conformal, conformal_sets
from keras_efficient.bayes.tasks.severities import shift

__all__ = [
    "RARE_CLASSES",
    "RareClasses",
    "calibration_error",
    "classwise_calibration_error",
    "conformal",
    "conformal_sets",
    "decisions",
    "fidelity",
    "misclassification",
    "out_of_distribution",
    "prediction",
    "reliability",
    "risk_coverage",
    "selective_prediction",
    "shift",
    "uncertainty",
]
