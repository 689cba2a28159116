"""Kernels of every template on a GPU, held to what they are held to on the CPU; where there is none, all is skipped."""

from __future__ import annotations

import numpy as np
import pytest

from keras_efficient.errors import KerasEfficientError, MissingDependency
from keras_efficient.export.bolt import build, checking, reference
from keras_efficient.export.bolt.grids import arguments, launch
from keras_efficient.export.bolt.runtime import CudaDevice
from keras_efficient.export.bolt.templates import TEMPLATES

from .test_templates import CASES


@pytest.fixture(scope="module")
def device():
    try:
        return CudaDevice()
    except KerasEfficientError as err:
        pytest.skip(err.message)


@pytest.mark.parametrize(("name", "region", "parameters", "shape"), CASES)
def test_kernels_compute_what_regions_mean(device, name, region, parameters, shape):
    if name == "warpgroup" and device.arch != "sm_90a":
        pytest.skip(f"products of warpgroups are Hopper's, and this GPU is {device.arch}")
    source = TEMPLATES[name].emit(region, parameters)
    try:
        code = build.compiled_source(source, device.arch).cubin
    except MissingDependency as err:
        pytest.skip(err.message)
    inputs = checking.random_inputs(region, *shape)
    wanted = reference.computed(region, inputs)
    out = device.copied(np.full(wanted.shape, np.nan, np.float16))
    n, height, width = region.image(inputs[0].shape)
    grid, integers = launch(source.rule, n, height, width, device.processors)
    given = [device.copied(one) for one in inputs]
    taken = arguments(given, device.weights(source.packed), height, width, integers, out)
    kernel = device.function(code, source.kernel, source.shared_bytes)
    device.launch(kernel, grid, source.threads, source.shared_bytes, taken, device.stream)
    found = device.fetched(out).astype(np.float64)
    assert np.linalg.norm(found - wanted) < 1e-3 * np.linalg.norm(wanted)
