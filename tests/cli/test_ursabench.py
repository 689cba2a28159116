"""`keras-efficient ursabench`: suites are run, stopped and gone on with, and looked at, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from .conftest import program

SUITE = """
name: tiny
data: {name: digits, limit: 128, test_limit: 64}
model: {name: mlp, width: 4, depth: 1}
seeds: [0]
methods:
  MAP: {name: MAP, epochs: 1}
  wild: {name: MAP, epochs: 2, learning_rate: 1.0e+30}
  two: {name: DeepEnsemble, members: 2, epochs: 1}
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run: the suite's file, the folder of results, and the process."""
    folder = tmp_path_factory.mktemp("ursabench")
    (folder / "tiny.yaml").write_text(SUITE)
    return (
        folder / "tiny.yaml",
        folder / "results",
        program("ursabench", "run", folder / "tiny.yaml", "--output", folder / "results", "--json"),
    )


def test_run_gives_rows_and_says_what_failed(done):
    _, folder, process = done
    assert process.returncode == 1, process.stderr
    rows = json.loads(process.stdout)
    assert {"method", "seed", "split", "metric", "value"} <= set(rows[0])
    values = {(row["method"], row["metric"]): row["value"] for row in rows}
    assert 0 <= values["MAP", "error"] <= 1
    assert values["two", "nll"] >= 0
    assert ("wild", "error") not in values
    assert "3 of 3: " in process.stderr
    assert "wild, seed 0 failed: TrainingFailed" in process.stderr
    assert f"--output {folder} --retry-failed" in process.stderr
    assert "Traceback" not in process.stderr


def test_report_has_the_same_rows_a_table_and_a_page(done, tmp_path):
    _, folder, process = done
    page = tmp_path / "report.html"
    report = program("ursabench", "report", folder, "--json", "--html", page)
    assert report.returncode == 0, report.stderr
    assert json.loads(report.stdout) == json.loads(process.stdout)
    shown = program("ursabench", "report", folder)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert lines[0].split()[:4] == ["method", "seeds", "error", "NLL"]
    assert [line.split()[0] for line in lines[1:]] == ["MAP", "two"]
    text = page.read_text("utf-8")
    assert text.startswith("<!doctype html>")
    assert "What failed" in text
    again = program("ursabench", "report", folder, "--html", page)
    assert again.returncode == 1
    assert "exists already and is kept" in again.stderr
    assert page.read_text("utf-8") == text


def test_list():
    process = program("ursabench", "list", "--json")
    assert process.returncode == 0, process.stderr
    found = {row["suite"]: row for row in json.loads(process.stdout)}
    assert {"smoke", "mnist", "cifar10"} <= set(found)
    assert len(found["smoke"]["methods"].split(", ")) >= 8


def test_a_run_goes_on_after_ctrl_c(done, tmp_path):
    suite, _, _ = done
    tail = "".join(f"  more {number}: {{name: MAP, epochs: {number}}}\n" for number in range(3, 40))
    (tmp_path / "long.yaml").write_text(SUITE + tail)
    command = [sys.executable, "-P", "-m", "keras_efficient.cli", "ursabench", "run", str(tmp_path / "long.yaml")]
    cells = tmp_path / "results" / "cells"
    run = subprocess.Popen(
        [*command, "--output", str(tmp_path / "results")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "KERAS_BACKEND": "tensorflow"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        until = time.monotonic() + 200
        while time.monotonic() < until and not list(cells.glob("*.json")):
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130, errors
    assert "Traceback" not in errors
    assert not [path for path in cells.iterdir() if ".partial" in path.name]
    finished = {path.name: path.read_bytes() for path in cells.iterdir()}
    assert 1 <= len(finished) < 40
    # The suite without what was added has the same cells: what was finished is not run again.
    again = program("ursabench", "run", suite, "--output", tmp_path / "results", "--json")
    assert again.returncode == 1, again.stderr  # "wild" fails
    assert all((cells / name).read_bytes() == content for name, content in finished.items())
    assert {row["method"] for row in json.loads(again.stdout)} >= {"MAP", "wild", "two"}


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["smoek", "--output", "x"], 2, "Unknown suite: 'smoek'.\nDid you mean 'smoke'?"),
        (["none.yaml", "--output", "x"], 1, "none.yaml: cannot be read: No such file or directory."),
        (["smoke", "--output", "x", "--engine", "rya"], 2, "Unknown engine: 'rya'.\nDid you mean 'ray'?"),
        (["smoke", "--output", "x", "--address", "h:1"], 2, "`--address` is of a Ray cluster.\nAdd --engine ray."),
        (
            ["mnist", "--output", "x"],
            1,
            "mnist: no folder of this data set is known.\nSay `path` (on the command line --data)",
        ),
    ],
)
def test_calls_that_are_wrong(tmp_path, arguments, status, message):
    process = program("ursabench", "run", *arguments, cwd=tmp_path, KERAS_EFFICIENT_DATA="")
    assert process.returncode == status, process.stderr
    assert message in process.stderr
    assert "Traceback" not in process.stderr
    assert process.stdout == ""
    assert not (tmp_path / "x").exists()


def test_another_suite_s_folder_is_refused(done, tmp_path):
    _, folder, _ = done
    (tmp_path / "other.yaml").write_text(SUITE.replace("width: 4", "width: 5"))
    process = program("ursabench", "run", tmp_path / "other.yaml", "--output", folder)
    assert process.returncode == 1
    assert "holds results of another suite (tiny)" in process.stderr
    process = program("ursabench", "report", tmp_path)
    assert process.returncode == 1
    assert "holds no results" in process.stderr


def test_help_needs_no_tensorflow():
    process = program("ursabench", "run", "--help", spy=True)
    assert process.returncode == 0
    assert not {"tensorflow", "keras", "numpy"} & process.imported
