"""Bayesian networks: draws of weights instead of one best guess.

::

    from keras_efficient import bayes

    members = bayes.Members.new(model_fn, 4, seed=0)
    data = bayes.Data(images, labels)
    for losses in bayes.trained(members, data, bayes.SGHMC(0.1, len(data), prior_sd=0.2), epochs=20):
        print(losses)
    probabilities = bayes.StackedPosterior(members).predict(others, reduce="mean")
"""

from keras_efficient.bayes import benchmark, corruptions, datasets, inference, tasks
from keras_efficient.bayes.data import Data
from keras_efficient.bayes.exporting import draw_noise, export_posterior
from keras_efficient.bayes.files import load_posterior
from keras_efficient.bayes.members import Members
from keras_efficient.bayes.optimizers import SGHMC, SGLD, CyclicCosine, CyclicTemperature
from keras_efficient.bayes.posterior import Posterior, StackedPosterior, StochasticPosterior
from keras_efficient.bayes.training import TrainingFailed, trained

__all__ = [
    "SGHMC",
    "SGLD",
    "CyclicCosine",
    "CyclicTemperature",
    "Data",
    "Members",
    "Posterior",
    "StackedPosterior",
    "StochasticPosterior",
    "TrainingFailed",
    "benchmark",
    "corruptions",
    "datasets",
    "draw_noise",
    "export_posterior",
    "inference",
    "load_posterior",
    "tasks",
    "trained",
]
