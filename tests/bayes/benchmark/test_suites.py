"""Suites: what YAML may say, what it may not, and what a cell's name hangs on."""

from __future__ import annotations

import dataclasses
import json

import pytest

from keras_efficient.bayes.benchmark import bundled, load_suite
from keras_efficient.bayes.inference import MAP, TemperatureScaling
from keras_efficient.errors import FileProblem, UnknownName, WrongArgument

GOOD = """
name: mine
data: {name: digits, limit: 100}
model: {name: mlp, width: 4}
seeds: [0, 3]
methods:
  MAP: {name: MAP, epochs: 1}
  cooled: {name: TemperatureScaling, method: {name: MAP, epochs: 2}}
tasks:
  prediction:
  shift: {corruptions: [rotation], severities: [1, 5]}
  out_of_distribution: {outside: {noise: {name: noise, count: 10}}}
"""


def parsed(path, text):
    path = path / "suite.yaml"
    path.write_text(text, "utf-8")
    return load_suite(path)


def test_every_bundled_suite_is_a_suite():
    found = bundled()
    assert {"smoke", "mnist", "cifar10"} <= set(found)
    assert all(name == suite.name for name, suite in found.items())
    assert len(found["smoke"].methods) >= 8
    assert load_suite("smoke") == found["smoke"]
    for suite in found.values():
        for cell in suite.cells():
            assert json.loads(json.dumps(cell.spec)) == cell.spec


def test_a_suite_from_a_file(tmp_path):
    suite = parsed(tmp_path, GOOD)
    assert suite.seeds == (0, 3)
    assert suite.tasks["prediction"] == {}
    cells = suite.cells()
    assert [(cell.seed, cell.label) for cell in cells] == [(0, "MAP"), (0, "cooled"), (3, "MAP"), (3, "cooled")]
    assert len({cell.name for cell in cells}) == 4
    from keras_efficient.bayes.benchmark.suites import method_of

    assert method_of(cells[1].spec["method"]) == TemperatureScaling(MAP(epochs=2))


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("name: mine", "nmae: mine", r"Unknown key in .*: 'nmae'.\nDid you mean 'name'"),
        ("methods:", "method:", "'method'.\nDid you mean 'methods'"),
        ("{name: digits, limit: 100}", "{name: digit}", "data set: 'digit'.\nDid you mean 'digits'"),
        ("limit: 100", "limits: 100", "argument of data set 'digits': 'limits'.\nDid you mean 'limit'"),
        ("limit: 100", "path: here", "argument of data set 'digits': 'path'"),
        ("name: mlp,", "name: mlp20,", "network: 'mlp20'.\nDid you mean 'mlp200'"),
        ("width: 4", "widht: 4", "argument of network 'mlp': 'widht'.\nDid you mean 'width'"),
        ("{name: MAP, epochs: 1}", "{name: MPA}", "method: 'MPA'.\nDid you mean 'MAP'"),
        ("{name: MAP, epochs: 1}", "{name: MAP, epoch: 1}", "'epoch'.\nDid you mean 'epochs'"),
        ("{name: MAP, epochs: 1}", "{name: MAP, epochs: many}", "'epochs' is int, not 'many'"),
        ("{name: MAP, epochs: 1}", "{name: MAP, epochs: 1.5}", "'epochs' is int, not 1.5"),
        ("{name: MAP, epochs: 2}", "{name: MAP, epoch: 2}", "'epoch'.\nDid you mean 'epochs'"),
        ("{name: MAP, epochs: 1}", "MAP", "method 'MAP' should be `name: …` and its fields, not 'MAP'"),
        ("{name: MAP, epochs: 1}", "{epochs: 1}", "A method needs a `name`: one of MAP, "),
        (
            "cooled: {name: TemperatureScaling, method: {name: MAP, epochs: 2}}",
            "same: {name: MAP, epochs: 1}",
            "'MAP' and 'same' are the same",
        ),
        ("  shift:", "  shfit:", "task: 'shfit'.\nDid you mean 'shift'"),
        ("corruptions: [", "corruption: [", "option of task 'shift': 'corruption'.\nDid you mean 'corruptions'"),
        ("[rotation]", "[rotate]", "corruption: 'rotate'.\nDid you mean 'rotation'"),
        ("[1, 5]", "[1, 6]", "A severity is one of 1, 2, 3, 4, 5, not 6"),
        ("name: noise,", "name: niose,", "data set: 'niose'.\nDid you mean 'noise'"),
        ("{noise: {name: noise, count: 10}}", "noise", "`outside` is"),
        ("  prediction:", "  prediction: 3", "options of task 'prediction' should be"),
        ("  prediction:", "  fidelity:", "reference among the methods: 'HMC'"),
        ("[0, 3]", "[0, 0]", "needs seeds, each once"),
        ("[0, 3]", "[]", "needs seeds"),
        ("[0, 3]", "[-1]", "A seed is a whole number from 0 on, not -1"),
        ("[0, 3]", "3", "`seeds` should be a list, not 3"),
        ("model: {name: mlp, width: 4}", "model: mlp", "`model` should be `key: value`, not 'mlp'"),
        ("name: mine", "", "lacks `name`"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, old, new, match):
    assert old in GOOD
    with pytest.raises(WrongArgument, match=match.replace("{", "\\{").replace("(", "\\(")):
        parsed(tmp_path, GOOD.replace(old, new))


def test_bad_yaml(tmp_path):
    with pytest.raises(FileProblem, match=r"suite\.yaml, line 3: is no YAML"):
        parsed(tmp_path, "name: mine\ndata: {name: digits\nmodel: [")
    with pytest.raises(FileProblem, match="should be a list of `key: value`"):
        parsed(tmp_path, "- name")
    with pytest.raises(FileProblem, match="no YAML"):  # nothing is made of what a file says: data only
        parsed(tmp_path, "name: !!python/object/apply:os.system [true]")
    (tmp_path / "large.yaml").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(FileProblem, match="holds over 1048576 bytes"):
        load_suite(tmp_path / "large.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileProblem, match="cannot be read"):
        load_suite(tmp_path / "binary.yaml")
    with pytest.raises(FileProblem, match=r"none\.yaml: cannot be read: No such file"):
        load_suite(tmp_path / "none.yaml")
    with pytest.raises(UnknownName, match="Did you mean 'smoke'"):
        load_suite("smoek")


def test_names_of_cells_hang_on_what_is_run_and_nothing_else(tmp_path):
    suite = parsed(tmp_path, GOOD)
    first = suite.cells()[0]

    def other(**changes):
        return dataclasses.replace(suite, **changes)

    renamed = other(name="yours", methods={"maximum": suite.methods["MAP"]}, seeds=(3, 0))
    assert first.name in {cell.name for cell in renamed.cells()}
    assert renamed.fingerprint == suite.fingerprint
    for changed in (
        other(data={"name": "digits", "limit": 101}),
        other(model={"name": "mlp", "width": 5}),
        other(tasks={"prediction": {}}),
    ):
        assert changed.fingerprint != suite.fingerprint
        assert first.name not in {cell.name for cell in changed.cells()}


def test_where_data_are_does_not_count(tmp_path):
    suite = load_suite("mnist")
    moved = suite.with_path(tmp_path)
    assert moved.data["path"] == str(tmp_path)
    assert moved.tasks["out_of_distribution"]["outside"]["notmnist"]["path"] == str(tmp_path)
    assert moved.fingerprint == suite.fingerprint
    assert [cell.name for cell in moved.cells()] == [cell.name for cell in suite.cells()]
    with pytest.raises(FileProblem, match="is here"):
        moved.check_data()
    assert load_suite("smoke").with_path(tmp_path) == load_suite("smoke")  # its data have no files


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("methods:\n  MAP: {name: MAP}\n  MAP: {name: SWA}\n", "line 3.*'MAP' is there twice"),
        ("a: &a [1, 2]\nb: [*a, *a]\n", "aliases are not taken"),
    ],
)
def test_yaml_that_says_twice_or_refers(tmp_path, text, reason):
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    with pytest.raises(FileProblem, match=reason):
        load_suite(path)
