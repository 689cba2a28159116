"""Cards: the schema, its errors, writing, and the two foreign formats."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys

import pytest
import yaml

from keras_efficient.errors import FileProblem, UnknownName
from keras_efficient.zoo import card as card_of
from keras_efficient.zoo import list_models
from keras_efficient.zoo.schema import from_dict, read_card, to_dict, write_card

from .conftest import CARD


def changed(path, value):
    """`CARD` with one value replaced, or removed for `...`."""
    values = copy.deepcopy(CARD)
    *parents, last = path
    place = values
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("system",), ..., "system: is missing"),
        (("weights", "sha256"), ..., "weights.sha256: is missing"),
        (("metrics", 0, "protocol"), ..., "metrics[0].protocol: is missing"),
        (("colour",), "red", "colour: is no key"),
        (("builder", "args"), {}, "builder.args: is no key"),
        (("parameters",), "many", "parameters: should be a whole number, is 'many'"),
        (("parameters",), True, "parameters: should be a whole number, is True"),
        (("parameters",), 1.5, "parameters: should be a whole number"),
        (("metrics", 0, "value"), "37", "metrics[0].value: should be a number"),
        (("summary",), 3, "summary: should be text"),
        (("limitations",), "none", "limitations: should be a list"),
        (("preprocessing", "inputs", 0, "range"), [0], "preprocessing.inputs[0].range: needs 2 values, has 1"),
        (("builder", "arguments"), [1], "builder.arguments: should be a mapping"),
        (("weights", "sha256"), "abc", "weights.sha256: 64 hexadecimal"),
        (("weights", "size"), 0, "weights.size"),
        (("weights", "file"), "../../etc/x.weights.h5", "weights.file: must be a bare name"),
        (("weights", "file"), "x.h5", "weights.file"),
        (("weights", "url"), "http://example.org/x", "weights.url"),
        (("golden",), "/tmp/x.npz", "golden: must be a bare name"),
        (("builder", "function"), "os.system", "builder.function"),
        (("name",), "Tiny X2", "name: small letters"),
    ],
)
def test_a_wrong_card_names_file_and_key(path, value, words):
    with pytest.raises(FileProblem) as error:
        from_dict(changed(path, value), "folder/tiny-x2.yaml")
    assert "folder/tiny-x2.yaml" in str(error.value)
    assert words in str(error.value)


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_a_card_that_is_no_mapping(data):
    with pytest.raises(FileProblem, match="should be a mapping"):
        from_dict(data, "x.yaml")


def test_write_then_read(tmp_path):
    card = from_dict(CARD, "tiny-x2.yaml")
    write_card(card, tmp_path / "tiny-x2.yaml")
    assert read_card(tmp_path / "tiny-x2.yaml") == card
    assert from_dict(to_dict(card), "tiny-x2.yaml") == card
    assert card.preprocessing.inputs[0].shape == (None, None, None, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-x2.yaml"]


def test_a_card_that_does_not_fit_is_not_written(tmp_path):
    card = from_dict(CARD, "tiny-x2.yaml")
    (tmp_path / "tiny-x2.yaml").write_text("before")
    with pytest.raises(FileProblem, match="parameters"):
        write_card(dataclasses.replace(card, parameters="many"), tmp_path / "tiny-x2.yaml")
    assert (tmp_path / "tiny-x2.yaml").read_text() == "before"
    with pytest.raises(FileProblem, match="no such folder"):
        write_card(card, tmp_path / "missing" / "tiny-x2.yaml")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"name: [unclosed", "no valid YAML \\(line"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"!!python/object/apply:os.getcwd []", "no valid YAML"),
        (b"", "should be a mapping"),
    ],
)
def test_files_that_are_no_cards(tmp_path, content, words):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(FileProblem, match=words):
        read_card(tmp_path / "x.yaml")


def test_the_name_is_the_files_name(tmp_path):
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(CARD))
    with pytest.raises(FileProblem, match="is not the name of the file"):
        read_card(tmp_path / "other.yaml")


def test_names_are_listed_in_natural_order(tmp_path):
    (tmp_path / "cards").mkdir()
    for name in ("sesr-m11-x2", "sesr-m5-x2.relu", "sesr-m5-x2", "sesr-m3-x2", "sesr-m5-x10", "fsrcnn-x2"):
        (tmp_path / "cards" / f"{name}.yaml").touch()
    assert list_models("sesr-*", folder=tmp_path) == [
        "sesr-m3-x2",
        "sesr-m5-x2",
        "sesr-m5-x2.relu",
        "sesr-m5-x10",
        "sesr-m11-x2",
    ]
    assert len(list_models(folder=tmp_path)) == 6
    assert list_models("nothing*", folder=tmp_path) == []
    with pytest.raises(UnknownName, match="Did you mean 'sesr-m5-x2'"):
        card_of("sesr-m5x2", folder=tmp_path)
    with pytest.raises(FileProblem, match="no such folder"):
        list_models(folder=tmp_path / "missing")


def test_hub_and_arm_formats():
    from keras_efficient.zoo.formats import to_arm, to_hub

    card = from_dict(CARD, "tiny-x2.yaml")
    front = yaml.safe_load(to_hub(card).split("---\n")[1])
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == "keras"
    assert front["pipeline_tag"] == "image-to-image"
    result = front["model-index"][0]["results"][0]
    assert (result["dataset"]["name"], result["metrics"][0]["value"]) == ("Set5", 33.7)
    assert "Untrained." in to_hub(card)
    arm = yaml.safe_load(to_arm(card))
    assert arm["network"]["hash"] == {"algorithm": "sha256", "value": "0" * 64}
    assert arm["network"]["file_size_bytes"] == 1
    assert arm["network_parameters"]["input_nodes"][0]["shape"] == [None, None, None, 1]


def test_cards_are_read_without_keras_and_numpy():
    code = """if True:
        import sys
        from keras_efficient import zoo
        for name in zoo.list_models(): zoo.card(name)
        heavy = {"keras", "tensorflow", "jax", "numpy", "h5py"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", code], check=True)
