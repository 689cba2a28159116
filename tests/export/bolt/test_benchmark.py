"""The benchmark on a GPU, of which a stand-in tells times: every row comes, whatever fails."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from keras_efficient.errors import ConversionError
from keras_efficient.export.bolt import build, checking, reference, runtime
from keras_efficient.export.bolt.architectures import architecture
from keras_efficient.export.bolt.search import candidates

from .kernels import sesr

INFO = build.KernelInfo(100, 0, 0, 0, 0)


class Meter:
    """A GPU on which every kernel takes 0.1 ms."""

    arch, identity = "sm_90a", {"name": "stand-in", "processors": 132, "arch": "sm_90a"}
    device = SimpleNamespace(cache_bytes=50 << 20)

    def __init__(self, wrong=lambda region: False):
        self.wrong = wrong

    def error(self, region, source, cubin):
        return 1.0 if self.wrong(region) else 1e-4

    def seconds(self, region, source, cubin, shape, repetitions):
        return [1e-4] * repetitions


@pytest.fixture
def gpu(repo_root, monkeypatch):
    monkeypatch.syspath_prepend(str(repo_root))
    found = importlib.import_module("benchmarks.bolt_gpu")
    monkeypatch.setattr(
        build, "compiled", lambda text, names, arch: build.Compiled(b"code", b"", "", dict.fromkeys(names, INFO), 0.1)
    )
    return found


def ran(gpu, path, peers, meter=None, budget=None, compilers=ThreadPoolExecutor):
    """All rows, in this process."""
    with contextlib.ExitStack() as exits:
        bench = gpu.Bench(meter or Meter(), True, path / "measured.jsonl", 0.0, exits, peers, compilers)

        def run(name, end, errors):
            bench.end = end if budget is None else time.monotonic() + budget
            cases = list(gpu.GROUPS[name].cases(True))
            bench.left, bench.errors = len(cases), []
            for case in cases:
                rows = [row for row in bench.rows(name, case) if row.why != gpu.NOT_ENDED]
                assert [(one.what, one.unit, one.bar) for one in rows] == [
                    (one.what, one.unit, one.bar) for one in gpu.planned(name, case)
                ]
                yield from rows
            assert bench.left == 0  # every search had its share of the time
            errors += bench.errors

        rows = list(gpu.everything(True, run))
    assert len({one.what for one in rows}) == len(rows)
    return {one.what: one for one in rows}


def test_each_bar_has_one_row_and_verdict(gpu, tmp_path):
    peers = {"slow": lambda *case: 5e-4, "cuBLASLt": lambda region, *case: 2e-4 if region.rows else None}
    rows = ran(gpu, tmp_path, peers)
    bars = [bar for bar in gpu.BARS if bar not in list(gpu.SESR.values())[1:]]  # of which a quick run has one
    assert {bar.what for bar in bars} == {one.what for one in rows.values() if one.bar}
    assert all(rows[bar.what].bar == bar.text for bar in bars)
    assert all(rows[bar.what].reached for bar in bars)
    assert [rows[bar.what].ratio for bar in (gpu.SESR[1080, 1920], gpu.ONE, gpu.TWO, gpu.BERTS)] == pytest.approx(
        [5, 5, (5 * 2) ** 0.5, 2]
    )
    assert rows[gpu.ERROR.what].details == {"kernels": 7}
    (product,) = (one for one in rows.values() if one.what.endswith(", GELU"))
    assert product.details["peers, ms"] == pytest.approx({"slow": 0.5, "cuBLASLt": 0.2})
    assert product.details["TFLOP/s"] == pytest.approx(2e-12 * 1280 * 3072 * 768 / 1e-4, rel=1e-3)
    assert not gpu.TIME.is_reached(0.26)
    assert gpu.ONE.is_reached(1.3)


def test_peers_that_fail_cost_nothing_but_their_ratio(gpu, tmp_path, capsys):
    def bad(region, shape, count):
        if region.rows or region.shuffle > 1:
            raise RuntimeError("no such operation\nand a long trace")
        return 3e-4

    rows = ran(gpu, tmp_path, {"bad": bad})
    row = rows[gpu.SESR[1080, 1920].what]
    assert (row.ours, row.ratio, row.reached) == (pytest.approx(0.1), None, None)
    assert row.why == "no peer ran: bad: RuntimeError: no such operation"
    assert row.details["failures"] == {"bad": "RuntimeError: no such operation"}
    assert rows[gpu.ONE.what].reached
    two = rows[gpu.TWO.what]  # one of two has a ratio, which is no mean of all
    assert (two.ours, two.reached) == (pytest.approx(3), None)
    assert two.why.endswith("rows, 4 to 1 to 4: no peer ran: bad: RuntimeError: no such operation")
    assert (rows[gpu.BERTS.what].ours, rows[gpu.BERTS.what].reached) == (None, None)
    assert "bad: RuntimeError: no such operation" in capsys.readouterr().err


def test_a_case_of_ours_that_fails_costs_its_row(gpu, tmp_path):
    rows = ran(gpu, tmp_path, {"one": lambda *case: 3e-4}, Meter(wrong=lambda region: region.shuffle > 1))
    for bar in (gpu.TIME, gpu.COLD, gpu.AGAIN, gpu.SESR[1080, 1920]):
        assert (rows[bar.what].ours, rows[bar.what].reached) == (None, None)
        wanted = ["none was measured"] if bar == gpu.AGAIN else ["no kernel of 4 ran", "its relative error is 1"]
        assert all(one in rows[bar.what].why for one in wanted)
    assert rows[gpu.ONE.what].reached
    assert rows[gpu.ERROR.what].details == {"kernels": 5}


def test_peers_that_time_is_too_short_for_are_told(gpu, tmp_path):
    asked = []
    rows = ran(gpu, tmp_path, {"one": lambda *case: asked.append(case) or 3e-4}, budget=0)
    assert not asked
    assert rows[gpu.TIME.what].reached  # searches have their least time still
    for bar in (gpu.SESR[1080, 1920], gpu.ONE):
        assert rows[bar.what].reached is None
        assert "no time was left for one" in rows[bar.what].why


def test_the_network_that_is_replayed(gpu):
    """The bundle is a network for the runtime."""
    region = sesr(2)
    best = candidates(region, architecture("sm_90a"), 1, 16, 16, limit=1)[0]
    bundle, source = gpu._bundle(region, best, "sm_90a", b"code"), best.emit(region)
    assert bundle.cubins == {f"{source.kernel}/sm_90a": b"code"}
    (x,) = checking.random_inputs(region, 1, 9, 12)
    run = runtime.load(replace(bundle, sources={source.kernel: source.text}), runtime.HostDevice())
    graph = run.captured(x)
    graph.replay()
    wanted = reference.computed(region, [x], rounded=np.float16)
    assert np.linalg.norm(graph.outputs[0] - wanted) < 1e-3 * np.linalg.norm(wanted)


def test_without_a_gpu_each_bar_says_so(gpu, monkeypatch):
    def none():
        raise ConversionError("No NVIDIA GPU with its driver is here.")

    monkeypatch.setattr(runtime, "driver", none)
    rows = list(gpu.rows(False))
    assert [one.what for one in rows] == [bar.what for bar in gpu.BARS]
    assert {(one.ours, one.reached, one.why) for one in rows} == {(None, None, "no GPU was at hand")}


class Late(Meter):
    """A GPU that is right at first, and then wrong."""

    def __init__(self, error):
        super().__init__()
        self.found, self.asked = error, 0

    def error(self, region, source, cubin):
        self.asked += 1
        return self.found if region.shuffle > 1 and self.asked > 4 else 1e-4


@pytest.mark.parametrize("error", [math.nan, 0.5])
def test_a_winner_that_is_wrong_when_it_is_asked_again_is_no_result(gpu, tmp_path, error):
    rows = ran(gpu, tmp_path, {"one": lambda *case: 3e-4}, Late(error))
    row = rows[gpu.SESR[1080, 1920].what]
    assert (row.ours, row.reached) == (None, None)
    assert row.why.endswith(f"its relative error is {error:.2g}")
    assert not rows[gpu.ERROR.what].reached


def test_the_second_search_compiles_the_winner_only(gpu, tmp_path, monkeypatch):
    asked, real = [], build.compiled_source
    monkeypatch.setattr(build, "compiled_source", lambda *given: asked.append(given) or real(*given))
    meter, wrong = Meter(), iter([0, 1, 0, 1, 0, 0])
    meter.error = lambda *given: 1.0 if next(wrong) else 1e-4
    monkeypatch.setattr(gpu, "GROUPS", {name: gpu.GROUPS[name] for name in ("networks", "again")})
    rows = ran(gpu, tmp_path, {}, meter)
    assert rows[gpu.AGAIN.what].reached
    assert len(asked) == 4 + 1


def test_compilers_that_were_killed_are_replaced(gpu, tmp_path):
    made = []

    def compilers():
        made.append(ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) if not made else None)
        if made[0] is not None and len(made) == 1:
            with pytest.raises(BrokenExecutor):
                made[0].submit(os.abort).result(60)
            return made[0]
        return ThreadPoolExecutor()

    rows = ran(gpu, tmp_path, {"one": lambda *case: 3e-4}, compilers=compilers)
    assert len(made) == 2
    assert all(rows[bar.what].reached for bar in (gpu.TIME, gpu.ONE, gpu.TWO))


# -------------------------------------------------------------------------------------------------- groups' processes


def stand_in(name, quick, labels, path, end):
    """In a process of its own; what is written behind the path says what becomes of it."""
    gpu = importlib.import_module("benchmarks.bolt_gpu")
    with open(path, "a") as file:
        file.write("".join(f"{one}\n" for one in (os.getpid(), *labels)))
    kind = os.path.basename(path)
    for number, label in enumerate(labels):
        if kind == "stuck" and number == 1:
            time.sleep(100)
        if kind == "waits" and label.startswith("32×56") and ", relu" in label:
            yield gpu.Row(label, 7.0, "ms", why=gpu.NOT_ENDED), [1e-4]
            time.sleep(100)
        if kind == "dies" and label.startswith("32×56"):
            os.abort()
        yield gpu.Row(label, 1.0, "ms", ratio=2.0), [1e-4] * (number + 1)
        if kind == "sticky":
            raise ConversionError("The CUDA driver refused cuStreamSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS.")


def sent(gpu, path, seconds=60.0):
    errors = []
    how = {"quick": False, "path": path, "target": stand_in}
    rows = list(gpu.isolated("convolutions", time.monotonic() + seconds, errors, **how))
    assert [one.what for one in rows] == [one.label for one in gpu._convolutions(False)]
    return rows, errors, [line for line in path.read_text().splitlines() if line.isdecimal()]


def test_a_group_runs_in_a_process_of_its_own(gpu, tmp_path):
    rows, errors, processes = sent(gpu, tmp_path / "well")
    assert {(one.ours, one.why) for one in rows} == {(1, "")}
    assert errors == [1e-4] * 8
    assert len(processes) == 1
    assert processes[0] != str(os.getpid())


def test_what_runs_in_a_process(gpu, tmp_path, monkeypatch):
    """Some cases of a group, until the context is of no more use."""
    calls = []

    def finish(stream):
        calls.append(stream)
        if len(calls) == 2:
            raise ConversionError("CUDA_ERROR_ILLEGAL_ADDRESS")

    meter = Meter()
    meter.device = SimpleNamespace(cache_bytes=50 << 20, finish=finish, stream=7)
    monkeypatch.setattr(gpu, "CudaMeter", lambda: meter)
    monkeypatch.setattr(gpu.Bench, "peers", lambda self, case: ({"one": 3e-4}, {}))
    monkeypatch.setattr(gpu.Bench.__init__, "__defaults__", (None, ThreadPoolExecutor))
    labels = [one.label for one in gpu._products(False)]
    found = gpu.measured("products", False, labels[1:], str(tmp_path / "measured.jsonl"), time.monotonic() + 60)
    rows = [next(found) for _ in range(4)]
    assert [(row.what, len(errors), row.why) for row, errors in rows] == [
        (labels[1], 1, gpu.NOT_ENDED), (labels[1], 1, "no peer ran: "),
        (labels[2], 2, gpu.NOT_ENDED), (labels[2], 2, "no peer ran: "),
    ]  # fmt: skip
    assert [row.ours for row, _ in rows] == [pytest.approx(0.1)] * 4
    with pytest.raises(ConversionError):
        next(found)
    assert calls == [7, 7]


def test_where_a_process_dies_the_next_one_goes_on_behind(gpu, tmp_path, capsys):
    rows, errors, _ = sent(gpu, tmp_path / "dies")
    at_fault = [one for one in rows if one.ours is None]
    assert [one.what.startswith("32×56") for one in rows] == [one in at_fault for one in rows]
    assert {one.why for one in at_fault} == {"its process ended with -6"}
    assert len(errors) == len(rows) - len(at_fault) == 5
    assert "convolutions: its process ended with -6" in capsys.readouterr().err


def test_an_error_that_stays_costs_a_process_and_no_row(gpu, tmp_path, capsys):
    rows, errors, processes = sent(gpu, tmp_path / "sticky")
    assert all(one.ours == 1 for one in rows)
    assert len(processes) == len(errors) == 8
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in capsys.readouterr().err


def test_a_process_that_hangs_is_killed(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    start = time.monotonic()
    rows, _, processes = sent(gpu, tmp_path / "stuck", 16.0)
    assert time.monotonic() - start < 30
    # The second one hangs, and so does the second one behind it, until the group's time is up.
    assert [one.ours for one in rows] == [1, None, 1] + [None] * 5
    assert {one.why for one in rows if one.ours is None} == {"its process was killed when its time was up"}
    assert len(processes) == 2
    assert not any(os.path.exists(f"/proc/{one}") for one in processes)
    summary = gpu.GROUPS["convolutions"].summary(gpu.ONE, rows)
    assert (summary.ours, summary.reached) == (pytest.approx(2), None)
    assert "killed when its time was up" in summary.why


def test_a_case_that_hangs_leaves_time_for_others(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    rows, errors, processes = sent(gpu, tmp_path / "waits", 20.0)
    # Ours was measured before its peers hung.
    assert [one.ours for one in rows] == [7] + [1] * 7
    assert [one.why for one in rows] == ["its process was killed when its time was up"] + [""] * 7
    assert (len(processes), len(errors)) == (2, 8)


# ------------------------------------------------------------------------------------------------ the file of results


@pytest.fixture
def harness(gpu, monkeypatch):
    """Without git."""
    found = importlib.import_module("benchmarks.harness")

    def none(*arguments, **how):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", none)
    found.commit.cache_clear()
    yield found
    found.commit.cache_clear()


def test_a_run_that_is_killed_loses_no_row(harness, tmp_path, monkeypatch):
    path, row = tmp_path / "found.json", harness.Row
    harness.write(path, "some", "one", [row("a", 1.0, "s"), row("b", 2.0, "s")])
    harness.write(path, "some", "other", [row("a", 7.0, "s")])

    def killed(quick):
        yield row("a", 3.0, "s", details={"all": [1.0, float("nan")]})
        yield row("c", float("nan"), "s", peer=1.0, ratio=float("inf"), reached=False, why="so")
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["some", "--json", str(path)])
    with pytest.raises(KeyboardInterrupt):
        harness.main("some", {"one": killed})
    known = json.loads(path.read_text())
    assert known["sections"]["one"]["unfinished"]
    assert known["sections"]["one"]["commit"] == "unknown"
    rows = {(one["section"], one["what"]): one for one in known["rows"]}
    assert {name: one["ours"] for name, one in rows.items()} == {
        ("one", "a"): 3, ("one", "b"): 2, ("one", "c"): None, ("other", "a"): 7
    }  # fmt: skip
    assert rows["one", "a"]["details"] == {"all": [1, None]}
    strange = rows["one", "c"]
    assert (strange["ratio"], strange["reached"], strange["why"]) == (None, None, "so; ours is nan, ratio is inf")
    harness.main("some", {"one": lambda quick: [row("a", 4.0, "s")]})
    known = json.loads(path.read_text())
    assert "unfinished" not in known["sections"]["one"]
    assert [(one["section"], one["ours"]) for one in known["rows"]] == [("other", 7), ("one", 4)]


def test_what_was_measured_before_stays(gpu, harness, tmp_path, monkeypatch):
    bolt, row = importlib.import_module("benchmarks.bolt"), harness.Row
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    harness.write(tmp_path / "bolt.json", "bolt", "gpu", [row("a", 1.0, "s", details={"x": 1}), row("b", None, "s")])
    monkeypatch.setattr(gpu, "rows", lambda quick: [row("a", None, "s", why="it hung"), row("b", 2.0, "s")])
    first, second = bolt.gpu(True)
    assert (first.ours, second.ours, first.details["x"]) == (1, 2, 1)
    assert first.details["kept of an earlier run"]["because"] == "it hung"
    monkeypatch.setattr(gpu, "rows", lambda quick: [row("b", None, "s", why=gpu.NOT_MEASURED)])
    with pytest.raises(SystemExit, match=r"no GPU was at hand\. What bolt\.json has was measured"):
        list(bolt.gpu(True))
