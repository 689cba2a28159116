"""Every model that ships: its card, hash, size, builder, inputs and outputs, and golden tensors."""

from __future__ import annotations

from pathlib import Path

import pytest

from keras_efficient import zoo
from keras_efficient.zoo.golden import compare_with_golden

FOLDER = Path(zoo.__file__).parent
LARGEST_WHEEL_SHARE = 20 << 20  # bytes of all weights together; larger files are downloaded


@pytest.mark.parametrize("name", zoo.list_models())
def test_shipped_model(name):
    from keras_efficient.deploy import deploy

    card = zoo.card(name)
    model = zoo.load(name)
    described = [(t.name, t.shape) for t in card.preprocessing.inputs]
    assert described == [(tensor.name, tuple(tensor.shape)) for tensor in model.inputs]
    described = [(t.name, t.shape) for t in card.preprocessing.outputs]
    assert described == list(zip(model.output_names, (tuple(t.shape) for t in model.outputs), strict=True))
    assert card.golden, "a shipped model has golden tensors"
    # float32 sums in another order on another processor: some 1e-6 of values up to 1; where 230 roundings follow one
    # another, some of which fall the other way, up to a tenth
    allowed = 0.15 if name == "accmodel-yolox-nano.int8" else 1e-5
    assert compare_with_golden(model, FOLDER / "weights" / card.golden) <= allowed
    deployed = deploy(model)
    assert card.parameters == deployed.count_params()
    assert compare_with_golden(deployed, FOLDER / "weights" / card.golden) <= allowed


def test_every_file_belongs_to_a_card():
    cards = [zoo.card(name) for name in zoo.list_models()]
    named = {card.weights.file for card in cards} | {card.golden for card in cards}
    found = {path.name for path in (FOLDER / "weights").iterdir() if not path.name.startswith(".")}
    assert found <= named
    assert sum((FOLDER / "weights" / name).stat().st_size for name in found) <= LARGEST_WHEEL_SHARE


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.list_models("memcom-gowalla-*"))
def test_quality_of_the_recommender(name, data_dir):
    """Also says whether the ids are those that the card tells of."""
    from keras_efficient.zoo.recipes import memcom

    train, test = memcom.read(data_dir / "recsys" / "gowalla")
    found = memcom.measure(zoo.load(name), train, test)
    values = {metric.name: metric.value for metric in zoo.card(name).metrics}
    assert found.ndcg == pytest.approx(values["nDCG@20"], abs=2e-4)
    assert found.recall == pytest.approx(values["Recall@20"], abs=2e-4)
