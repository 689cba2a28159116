"""A small zoo of one model in a temporary folder, so that the tests need no trained weights."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

CARD = {
    "name": "tiny-x2",
    "system": "sesr",
    "task": "image-to-image",
    "summary": "A SESR too small to be of use.",
    "builder": {"function": "SESR", "arguments": {"scale": 2, "variant": "m3", "expansion": 4}},
    "weights": {"file": "tiny-x2.weights.h5", "sha256": "0" * 64, "size": 1},
    "preprocessing": {
        "inputs": [
            {"name": "y", "shape": [None, None, None, 1], "dtype": "float32", "meaning": "luma", "range": [0, 1]}
        ],
        "outputs": [
            {"name": "upscaled", "shape": [None, None, None, 1], "dtype": "float32", "meaning": "luma", "range": [0, 1]}
        ],
        "facts": {"scale": 2},
    },
    "parameters": 8_912,
    "metrics": [
        {"name": "PSNR", "value": 33.7, "unit": "dB", "dataset": "Set5", "protocol": "Y, border 2", "command": "none"}
    ],
    "trained_on": [{"data": "nothing", "terms": "none"}],
    "recipe": {"command": "none", "seed": 0},
    "licence": "Apache-2.0",
    "limitations": ["Untrained."],
    "paper": {"title": "Collapsible Linear Blocks", "url": "https://arxiv.org/abs/2103.09404", "year": 2022},
}


@pytest.fixture(scope="session")
def _zoo(tmp_path_factory) -> Path:
    import keras

    from keras_efficient import models, zoo
    from keras_efficient.zoo.golden import golden, write_golden
    from keras_efficient.zoo.schema import from_dict
    from keras_efficient.zoo.weights import describe

    folder = tmp_path_factory.mktemp("zoo")
    (folder / "cards").mkdir()
    (folder / "weights").mkdir()
    keras.utils.set_random_seed(3)
    model = models.SESR(**CARD["builder"]["arguments"])
    model.save_weights(folder / "weights" / CARD["weights"]["file"])
    photo = Path(__file__).parents[2] / "examples" / "data" / "chelsea.png"
    write_golden(golden(model, photo=photo), folder / "weights" / "tiny-x2.npz")
    card = from_dict(CARD, "tiny-x2.yaml")
    weights = describe(folder / "weights" / CARD["weights"]["file"])
    zoo.write_card(dataclasses.replace(card, weights=weights, golden="tiny-x2.npz"), folder / "cards" / "tiny-x2.yaml")
    return folder


@pytest.fixture
def zoo_folder(_zoo, tmp_path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(_zoo, tmp_path / "zoo"))
