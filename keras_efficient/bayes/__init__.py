"""Bayesian networks: draws of weights instead of one best guess.

::

    from keras_efficient import bayes

    optimizer = bayes.SGHMC(0.01, num_data=60000, prior_sd=0.2)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
"""

from keras_efficient.bayes.optimizers import SGHMC, SGLD, CyclicCosine, CyclicTemperature

__all__ = ["SGHMC", "SGLD", "CyclicCosine", "CyclicTemperature"]
