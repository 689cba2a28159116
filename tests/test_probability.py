"""tensorflow-probability is found in the form of the backend."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from keras_efficient import probability


@pytest.mark.contract
def test_divergences_are_known_ones():
    tfp = probability.library()
    normal = tfp.distributions.Normal
    found = [normal(0.0, 2.0).kl_divergence(normal(0.0, 1.0)), normal(1.0, 0.5).kl_divergence(normal(0.0, 1.0))]
    np.testing.assert_allclose([float(one) for one in found], [0.8068528, 0.8181472], rtol=1e-6)
    assert ("jax" in tfp.__name__) == (keras.backend.backend() == "jax")
