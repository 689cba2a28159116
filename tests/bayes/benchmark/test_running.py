"""Cells and results: whatever ends a run, what was finished stays, whole and once."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import resource
import signal
import time

import numpy as np
import pytest

from keras_efficient.bayes import tasks
from keras_efficient.bayes.benchmark import Benchmark, Outcome, Results, run_cell, scores
from keras_efficient.errors import FileProblem

from .conftest import made_up, pretended

METHODS = {f"MAP {number}": {"name": "MAP", "epochs": number} for number in range(1, 6)}


def left_over(folder):
    return [path for path in folder.rglob("*") if ".partial" in path.name]


def test_rows_of_a_run(small, tmp_path):
    suite = small(seeds=(0, 1), tasks={"prediction": {}, "misclassification": {}, "selective": {}, "conformal": {}})
    seen = []
    rows = Benchmark(suite, tmp_path).run(progress=lambda *values: seen.append(values))
    assert {(row["method"], row["seed"]) for row in rows} == {(m, s) for m in ("MAP", "two") for s in (0, 1)}
    for row in rows:
        assert {"method", "seed", "split", "metric", "value"} == set(row)
        assert row["value"] is None or np.isfinite(row["value"])
    assert len({(row["method"], row["seed"], row["split"], row["metric"]) for row in rows}) == len(rows)
    assert {"error", "nll", "ece", "misclassification_auroc_confidence", "aurc", "risk_0.9", "conformal_coverage"} <= {
        row["metric"] for row in rows
    }
    assert [done for done, _, _ in seen] == [0, 1, 2, 3, 4]
    assert rows == Results(tmp_path).rows()
    json.dumps(rows, allow_nan=False)


def test_predictions_are_kept_and_give_the_rows(small, tmp_path):
    suite = small(tasks={"prediction": {}, "shift": {"corruptions": ["rotation"], "severities": [2]}})
    Benchmark(suite, tmp_path).run()
    results = Results(tmp_path)
    for name, _, cell in results.cells():
        kept = results.predictions(name)
        assert kept["logits/shift/rotation/2"].shape == (1, 64, 10)  # the members' mean
        assert scores.rows(suite.tasks, kept, 0) == [row for row in cell["rows"] if row["split"] != "train"]


def test_seeds_are_runs_of_their_own(small):
    """Defect 13 of the paper's release, its second half: one trained network served all seeds."""
    first, second, again = (run_cell(cell.spec) for cell in (*small(seeds=(0, 1)).cells()[::2], *small().cells()[:1]))
    assert not np.allclose(first.predictions["logits/test"], second.predictions["logits/test"])
    np.testing.assert_allclose(first.predictions["logits/test"], again.predictions["logits/test"], rtol=1e-5)


def test_defect_14_numbers_of_two_foreign_sets_are_not_mixed(small):
    outside = {"few": {"name": "noise", "count": 20}, "digits": {"name": "digits", "test_limit": 64}}
    found = run_cell(small(tasks={"out_of_distribution": {"outside": outside}}).cells()[0].spec)
    values = {(row["split"], row["metric"]): row["value"] for row in found.rows}
    assert ("outside/few", "auroc_total") in values
    assert values["outside/digits", "auroc_total"] == 0.5  # the test set against itself
    assert values["outside/few", "auroc_total"] != 0.5
    p = [scores.probabilities(found.predictions, name) for name in ("test", "outside/few")]
    assert values["outside/few", "auroc_total"] == tasks.out_of_distribution(*p)["auroc_total"]


def test_defect_15_nothing_is_carried_from_one_evaluation_to_the_next(small):
    wanted = {
        "prediction": {},
        "misclassification": {},
        "selective": {},
        "conformal": {},
        "decisions": {"classes": [1]},
    }
    cells = [made_up(cell.spec).predictions for cell in small(seeds=(0, 1)).cells()]
    alone = [scores.rows(wanted, one, 0) for one in cells]
    for _ in range(3):
        for one, rows in zip(cells, alone, strict=True):
            assert scores.rows(wanted, one, 0) == rows


def test_averaged_logits_have_the_mean_probabilities():
    logits = np.random.default_rng(0).normal(0, 40, (5, 1500, 4)).astype(np.float32)
    mean = scores.probabilities({"logits/a": logits}, "a").mean(axis=0)
    own = scores.probabilities({"logits/a": scores.averaged(logits)}, "a")
    assert own.shape == (1, 1500, 4)
    np.testing.assert_allclose(own[0], mean, rtol=1e-4, atol=1e-30)


def test_fidelity_is_to_the_reference_of_the_same_seed(small, tmp_path):
    methods = {label: METHODS[label] for label in ("MAP 1", "MAP 2")}
    suite = small(methods=methods, seeds=(0, 1), tasks={"fidelity": {"reference": "MAP 2"}})
    rows = Benchmark(
        suite, tmp_path, lambda cells: ((one, made_up(one.spec, members=1 + one.seed)) for one in cells)
    ).run()
    found = {(row["method"], row["seed"]): row["value"] for row in rows if row["metric"] == "total_variation"}
    assert set(found) == {("MAP 1", 0), ("MAP 1", 1)}
    for cell in suite.cells():
        if cell.label == "MAP 1":
            (other,) = (one for one in suite.cells() if one.label == "MAP 2" and one.seed == cell.seed)
            pair = [
                scores.probabilities(made_up(one.spec, members=1 + one.seed).predictions, "test")
                for one in (cell, other)
            ]
            assert found["MAP 1", cell.seed] == tasks.fidelity(*pair)["total_variation"]


def test_a_cell_that_fails_is_recorded_and_the_others_go_on(small, tmp_path):
    wild = {"name": "MAP", "epochs": 1, "learning_rate": 1e30}
    methods = {"wild": {**wild, "batch_size": 32}, "in the last step": wild, "MAP": {"name": "MAP", "epochs": 1}}
    suite = small(methods=methods)
    said = []
    rows = Benchmark(suite, tmp_path).run(progress=lambda done, total, what: said.append(what))
    failed = [row for row in rows if row["metric"] == "failed"]
    assert [(row["method"], row["split"], row["value"]) for row in failed] == [
        ("wild", None, 1.0),
        ("in the last step", None, 1.0),
    ]
    assert "TrainingFailed: The loss of member 0 is nan at step" in failed[0]["reason"]
    assert failed[1]["reason"] == "TrainingFailed: There are predictions that are not finite."
    assert any("wild, seed 0: TrainingFailed" in what for what in said)
    assert any(row["method"] == "MAP" and row["metric"] == "error" for row in rows)

    asked = []

    def engine(cells):
        asked.extend(cell.label for cell in cells)
        yield from pretended(cells)

    Benchmark(suite, tmp_path, engine).run()
    assert asked == []  # it would fail again
    rows = Benchmark(suite, tmp_path, engine).run(retry_failed=True)
    assert asked == ["wild", "in the last step"]
    assert not [row for row in rows if row["metric"] == "failed"]


def test_a_method_that_the_network_does_not_take_is_named(small):
    suite = small(methods={"Laplace": {"name": "KroneckerLaplace", "epochs": 1, "held_out": 1.5}})
    assert run_cell(suite.cells()[0].spec).failed.startswith("WrongArgument: 1.5 of 128 examples")


def test_an_interruption_that_comes_up_as_another_error_is_not_recorded(small, tmp_path):
    def engine(cells):
        yield cells[0], Outcome(failed="InternalError: lost")

    def interrupted(done, total, what):
        if done == 0 and started:
            raise KeyboardInterrupt
        started.append(1)

    started = []
    with pytest.raises(KeyboardInterrupt):
        Benchmark(small(), tmp_path, engine).run(progress=interrupted)
    assert Results(tmp_path).rows() == []


def slow(cells):
    for cell in cells:
        time.sleep(0.06)  # 20 of them take longer than two of the longest waits before a kill
        yield cell, made_up(cell.spec)


def in_fork(target, *arguments):
    """A child that writes files only."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def test_killed_at_any_moment_and_resumed(small, tmp_path):
    suite = small(methods=METHODS, seeds=(0, 1, 2, 3))
    whole = Benchmark(suite, tmp_path / "whole", pretended).run()
    random, folder, kills = np.random.default_rng(0), tmp_path / "killed", 0
    while True:
        process = in_fork(Benchmark(suite, folder, slow).run)
        process.join(random.uniform(0.05, 0.5))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        if process.exitcode == 0:
            break
    assert kills >= 2
    assert Results(folder).rows() == whole
    finished = [path for path in (folder / "cells").iterdir() if path not in left_over(folder)]
    assert len(finished) == 20


def test_finished_cells_are_not_run_again(small, tmp_path):
    suite, ran = small(methods=METHODS), []

    def engine(cells):
        for cell in cells:
            ran.append(cell.label)
            if len(ran) == 3:
                raise KeyboardInterrupt
            yield cell, made_up(cell.spec)

    with pytest.raises(KeyboardInterrupt):
        Benchmark(suite, tmp_path, engine).run()
    assert [row["method"] for row in Results(tmp_path).rows()] == ["MAP 1", "MAP 2"]
    assert left_over(tmp_path) == []
    Benchmark(suite, tmp_path, engine).run()
    assert ran == ["MAP 1", "MAP 2", "MAP 3", "MAP 3", "MAP 4", "MAP 5"]


def test_two_processes_in_one_folder(small, tmp_path):
    suite = small(methods=METHODS, seeds=(0, 1, 2))
    processes = [in_fork(Benchmark(suite, tmp_path / "both", slow).run) for _ in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert Results(tmp_path / "both").rows() == Benchmark(suite, tmp_path / "one", pretended).run()


def test_a_full_disk_leaves_no_half_file(small, tmp_path):
    suite = small(methods=METHODS)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def large(cells):
        for place, cell in enumerate(cells):
            outcome = made_up(cell.spec)
            noise = np.random.default_rng(0).random(100_000 if place == 2 else 10)
            yield cell, dataclasses.replace(outcome, predictions={**outcome.predictions, "noise": noise})

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(FileProblem, match="cannot be written: larger than files may become"):
            Benchmark(suite, tmp_path, large).run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert left_over(tmp_path) == []
    assert [row["method"] for row in Results(tmp_path).rows()] == ["MAP 1", "MAP 2"]
    assert len(Benchmark(suite, tmp_path, pretended).run()) == 5


def test_results_of_another_suite_are_refused(small, tmp_path):
    Benchmark(small(), tmp_path, pretended).run()
    with pytest.raises(FileProblem, match=r"holds results of another suite \(small\)"):
        Benchmark(small(limit=100), tmp_path, pretended).run()
    with pytest.raises(FileProblem, match="another suite"):
        Results(tmp_path, small(tasks={"selective": {}}))
    (one, *_) = (tmp_path / "cells").glob("*.json")
    cell = json.loads(one.read_text())
    one.write_text(json.dumps({**cell, "suite": "0" * 64}))
    with pytest.raises(FileProblem, match="is a result of another suite"):
        Results(tmp_path).rows()


def test_methods_and_seeds_may_be_added(small, tmp_path):
    first = Benchmark(small(), tmp_path, pretended).run()
    rows = Benchmark(small(seeds=(0, 5)), tmp_path, pretended).run()
    assert len(rows) == 2 * len(first)
    assert [row for row in rows if row["seed"] == 0] == first
    renamed = small(methods={"maximum": small().methods["MAP"]})
    names = {row["method"] for row in Benchmark(renamed, tmp_path, pretended).run()}
    assert names == {"maximum", "MAP", "two"}  # seed 5 was run as MAP


def test_damaged_results_are_named(small, tmp_path):
    with pytest.raises(FileProblem, match="holds no results"):
        Results(tmp_path)
    Benchmark(small(), tmp_path, pretended).run()
    (one, *_) = (tmp_path / "cells").glob("*.json")
    content = one.read_bytes()
    for bad in (content[: len(content) // 2], b"\xff\x00", b"[]", b'{"format": 99}', b'{"format": 1}'):
        one.write_bytes(bad)
        with pytest.raises(FileProblem, match=r"is damaged|is none of format 1"):
            Results(tmp_path).rows()
    one.write_bytes(content)
    path = Results(tmp_path).predictions_path(one.stem)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FileProblem, match="is damaged"):
        Results(tmp_path).predictions(one.stem)


def test_a_folder_that_cannot_be_made(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileProblem, match="cannot be made"):
        Benchmark(small(), tmp_path / "file" / "results", pretended).run()


def test_other_data_in_the_same_place_are_refused(small, tmp_path):
    def on(data):
        def engine(cells):
            for cell in cells:
                yield cell, dataclasses.replace(made_up(cell.spec), data=data)

        return engine

    Benchmark(small(), tmp_path, on("first")).run()
    with pytest.raises(FileProblem, match="results on other data"):
        Benchmark(small(seeds=(0, 1)), tmp_path, on("second")).run()
    assert len(Benchmark(small(seeds=(0, 1)), tmp_path, on("first")).run()) == 4
    found = [run_cell(small(limit=limit).cells()[0].spec).data for limit in (64, 64, 65)]
    assert found[0] == found[1] != found[2]
