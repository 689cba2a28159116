"""Shared by all tests: the backend is fixed before Keras is imported, and real data is found or the test is skipped."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(config, items):
    """Tests marked `jax` run under KERAS_BACKEND=jax only; under it, unmarked tests outside `contract` are left out."""
    on_jax = os.environ["KERAS_BACKEND"] == "jax"
    for item in items:
        is_jax, is_contract = (item.get_closest_marker(name) is not None for name in ("jax", "contract"))
        if on_jax and not (is_jax or is_contract):
            item.add_marker(pytest.mark.skip(reason="runs on the TensorFlow backend"))
        if not on_jax and is_jax:
            item.add_marker(pytest.mark.skip(reason="runs with KERAS_BACKEND=jax"))


@pytest.fixture(autouse=True)
def same_chance(request):
    """What a test draws from its module's RNG does not hang on which tests ran before it."""
    if (generator := getattr(request.module, "RNG", None)) is not None:
        generator.bit_generator.state = np.random.default_rng(0).bit_generator.state


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with the real data sets (KERAS_EFFICIENT_DATA, else ../shared/data); the test is skipped without it."""
    folder = Path(os.environ.get("KERAS_EFFICIENT_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs real data: set KERAS_EFFICIENT_DATA (looked in {folder})")
    return folder
