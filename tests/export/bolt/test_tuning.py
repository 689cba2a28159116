"""What a search does with measurements, of a GPU that is a stand-in; and the file that keeps them."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
import time
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor

import pytest

from keras_efficient.errors import ConversionError, FileProblem
from keras_efficient.export.bolt import assembling, build, tuning
from keras_efficient.export.bolt.architectures import architecture
from keras_efficient.export.bolt.search import candidates
from keras_efficient.export.bolt.tuning import Cache, key, tuned

from .kernels import sesr

REGION = sesr(3)
SHAPE = (1, 64, 64)
RANKING = candidates(REGION, architecture("sm_90a"), *SHAPE, limit=6)
INFO = build.KernelInfo(100, 0, 0, 0, 0)


class Meter:
    """A GPU on which later candidates are faster, and the last but one is wrong."""

    arch = "sm_90a"
    identity = {"name": "stand-in", "processors": 132, "arch": "sm_90a"}  # noqa: RUF012

    def __init__(self):
        self.asked = []

    def place(self, source):
        return [one.emit(REGION).kernel for one in RANKING].index(source.kernel)

    def error(self, region, source, cubin):
        return 1.0 if self.place(source) == len(RANKING) - 2 else 1e-4

    def seconds(self, region, source, cubin, shape, repetitions):
        assert (cubin, shape) == (b"code", SHAPE)
        self.asked.append((self.place(source), repetitions))
        return [1e-4 - 1e-5 * self.place(source)] * repetitions


@pytest.fixture
def compiler(monkeypatch):
    """The first candidate does not compile, the second spills."""
    kernels = [one.emit(REGION).kernel for one in RANKING]

    def compiled(text, names, arch):
        place = kernels.index(names[0])
        if place == 0:
            raise ConversionError("NVRTC refused the source: kernel.cu:1: no.")
        info = build.KernelInfo(255, 0, 8, 8, 0) if place == 1 else INFO
        return build.Compiled(b"code", b"", "", {names[0]: info}, 0.1)

    monkeypatch.setattr(build, "compiled", compiled)


def search(meter, cache=None, seconds=60.0):
    with ThreadPoolExecutor() as pool:
        how = {"arch": "sm_90a", "deadline": time.monotonic() + seconds, "cache": cache, "executor": pool}
        return tuned(REGION, RANKING, SHAPE, meter, **how)


def test_the_fastest_comes_first_and_refusals_say_why(compiler):
    meter = Meter()
    found, refused = search(meter)
    assert [one.measured for one in found] == [True] * 3 + [False] * 3
    assert found[0].to_dict() == RANKING[-1].to_dict()
    assert found[0].seconds == pytest.approx(5e-5)
    assert [line.split(": ", 1)[1] for line in refused] == [
        "NVRTC refused the source: kernel.cu:1: no.",
        "8 bytes of registers spill",
        "its relative error is 1",
    ]
    # Halves: all three as they come, then the two fastest, then the fastest.
    assert [count for _, count in meter.asked] == [3, 3, 3, 7, 7, 15]
    assert [place for place, _ in meter.asked[3:]] == [5, 3, 5]


def test_what_a_file_knows_is_not_measured_again(compiler, tmp_path):
    path = tmp_path / "measured.jsonl"
    first, _ = search(Meter(), Cache(path))
    meter = Meter()
    again, refused = search(meter, Cache(path))
    # Those that were refused are tried again, as if the compiler could be another one.
    assert meter.asked == []
    assert len(refused) == 3
    assert [one.to_dict() for one in again] == [one.to_dict() for one in first]
    other = Meter()
    other.identity = {"name": "another", "processors": 132, "arch": "sm_90a"}
    search(other, Cache(path))
    assert other.asked


def test_a_machine_without_a_gpu_takes_what_another_measured(compiler, tmp_path):
    path = tmp_path / "measured.jsonl"
    first, _ = search(Meter(), Cache(path))
    again, _ = search(None, Cache(path))
    assert [one.to_dict() for one in again] == [one.to_dict() for one in first]
    assert again[0].measured
    how = {"arch": "sm_80", "deadline": time.monotonic() + 60, "cache": Cache(path)}
    assert tuned(REGION, RANKING, SHAPE, None, **how)[0] == RANKING


def test_no_time_left_leaves_the_estimates(compiler, tmp_path):
    path = tmp_path / "measured.jsonl"
    found, _ = search(Meter(), Cache(path), seconds=-1.0)
    assert found == RANKING
    assert not path.exists()


def test_a_compiler_that_takes_too_long_does_not_hold_up_the_others(compiler, monkeypatch):
    """What was compiled in time is measured, and the deadline is kept."""
    release, quick = threading.Event(), build.compiled

    def compiled(text, names, arch):
        if names[0] == RANKING[2].emit(REGION).kernel:
            release.wait(30)
        return quick(text, names, arch)

    monkeypatch.setattr(build, "compiled", compiled)
    meter, start = Meter(), time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        how = {"arch": "sm_90a", "deadline": start + 1, "executor": pool}
        found, refused = tuned(REGION, RANKING, SHAPE, meter, **how)
        assert 1 <= time.monotonic() - start < 10
        release.set()
    assert {place for place, _ in meter.asked} == {3, 5}
    assert [one.measured for one in found] == [True] * 2 + [False] * 4
    assert len(refused) == 3


def test_what_is_compiled_is_kept(compiler, monkeypatch):
    compiled, asked, real = {}, [], build.compiled
    monkeypatch.setattr(build, "compiled", lambda text, names, arch: asked.append(names) or real(text, names, arch))
    with ThreadPoolExecutor() as pool:
        how = {"arch": "sm_90a", "executor": pool, "compiled": compiled}
        first, second = (tuned(REGION, RANKING, SHAPE, Meter(), deadline=time.monotonic() + 60, **how) for _ in "12")
    assert first == second
    assert set(compiled) == {one.emit(REGION).kernel for one in RANKING[1:]}
    assert len(asked) == len(RANKING) + 1  # what does not compile is tried again


class Failing(Meter):
    """A GPU that refuses to time a candidate in its first or second round, or in the second one ends all."""

    def __init__(self, place, repetitions, error=None):
        super().__init__()
        self.at, self.failure = (place, repetitions), error or ConversionError("The CUDA driver refused cuGraphLaunch.")

    def seconds(self, region, source, cubin, shape, repetitions):
        if (self.place(source), repetitions) == self.at:
            raise self.failure
        return super().seconds(region, source, cubin, shape, repetitions)


@pytest.mark.parametrize("repetitions", [3, 7])
def test_a_candidate_that_cannot_be_timed_is_refused(compiler, tmp_path, repetitions):
    cache = Cache(tmp_path / "measured.jsonl")
    found, refused = search(Failing(5, repetitions), cache)
    assert [one.measured for one in found] == [True] * 2 + [False] * 4
    assert found[0].to_dict() == RANKING[3].to_dict()
    assert refused[-1].endswith("refused cuGraphLaunch.")
    assert len(refused) == 4
    assert len(cache.get(key(REGION, SHAPE), Meter.identity)) == 2


def test_what_was_measured_is_kept_whatever_ends_a_search(compiler, tmp_path):
    path = tmp_path / "measured.jsonl"
    with pytest.raises(KeyboardInterrupt):
        search(Failing(5, 7, KeyboardInterrupt()), Cache(path))
    assert len(Cache(path).get(key(REGION, SHAPE), Meter.identity)) == 3


def test_compilers_that_end_are_told_in_one_line():
    with tuning.compilers() as pool:
        with pytest.raises(BrokenExecutor):
            pool.submit(os.abort).result(60)
        how = {"arch": "sm_90a", "deadline": time.monotonic() + 60, "executor": pool}
        with pytest.raises(ConversionError, match=r"put the call under `if __name__ == '__main__':`"):
            tuned(REGION, RANKING, SHAPE, Meter(), **how)


def test_compilers_are_processes_that_nobody_waits_for():
    with tuning.compilers() as pool:
        assert pool.submit(sorted, [2, 1]).result(60) == [1, 2]
        pool.submit(time.sleep, 5)
        time.sleep(0.5)
        start = time.monotonic()
    assert time.monotonic() - start < 2


def test_a_file_brings_no_parameters_of_its_own(compiler, tmp_path):
    path = tmp_path / "measured.jsonl"
    name = key(REGION, SHAPE)
    strange = {**RANKING[0].to_dict(), "warps": 3000, "seconds": 1e-9}
    Cache(path).put(name, Meter.identity, [strange])
    meter = Meter()
    found, _ = search(meter, Cache(path))
    assert meter.asked
    assert all(one.parameters.warps < 3000 for one in found)


def test_damaged_lines_are_passed_over(tmp_path):
    path = tmp_path / "measured.jsonl"
    entry = {**RANKING[0].to_dict(), "seconds": 1e-4}
    device = Meter.identity
    Cache(path).put("one", device, [entry])
    good = path.read_bytes()
    body = json.dumps({"key": "two", "device": device, "candidates": [entry]})
    forged = json.dumps({"body": body, "sha256": "0" * 64}).encode()
    path.write_bytes(b"no json\n" + forged + b"\n" + good[:40] + b"\n" + good + good[:30])
    cache = Cache(path)
    assert cache.damaged == 4
    assert cache.get("one", device) == [entry]
    assert cache.get("two", device) == []
    cache.put("three", device, [entry])  # behind a line that was not ended
    assert Cache(path).get("three", device) == [entry]
    with pytest.raises(FileProblem, match="cannot be read"):
        Cache(tmp_path)


def test_files_of_something_else_are_refused_and_stay(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("milk\nbread\n")
    with pytest.raises(FileProblem, match="has no measurement of kernels in it"):
        Cache(path)
    assert path.read_text() == "milk\nbread\n"
    path.write_text("")
    assert Cache(path).architectures == set()


def test_what_a_file_lacks_is_noted(tmp_path):
    path = tmp_path / "measured.jsonl"
    of = assembling._Measuring.of
    assert of(0, path, None, "sm_80").notes() == ["measured.jsonl has no measurement for sm_80."]
    Cache(path).put("one", {**Meter.identity, "arch": "sm_90a"}, [{**RANKING[0].to_dict(), "seconds": 1e-4}])
    assert of(0, path, None, "sm_90a").identity == {}
    with open(path, "a") as file:
        file.write("no json\n")
    assert of(0, path, None, "sm_80").notes() == [
        "measured.jsonl: lines that are no measurements, and were passed over: 1.",
        "measured.jsonl has no measurement for sm_80; it has some for sm_90a.",
    ]


def put(path, number):
    Cache(path).put(f"{number}", Meter.identity, [{**RANKING[0].to_dict(), "seconds": 1e-4}] * 40)


def test_writers_at_a_time(tmp_path):
    path = tmp_path / "measured.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=put, args=(path, number)) for number in range(8)]
    for one in writers:
        one.start()
    for one in writers:
        one.join()
    cache = Cache(path)
    assert cache.damaged == 0
    assert all(cache.get(f"{number}", Meter.identity) for number in range(8))


def test_a_key_hangs_on_all_that_a_time_does():
    keys = {
        key(REGION, SHAPE),
        key(REGION, (1, 64, 65)),
        key(sesr(4), SHAPE),
    }
    assert len(keys) == 3
    assert key(sesr(3), SHAPE) in keys  # whatever its weights
    assert tuning._templates() == tuning._templates()


@pytest.mark.parametrize("name", ["grids.py", "meter.py", "templates/tile.py", "templates/tile.cuh"])
def test_a_key_hangs_on_the_files_that_launch_and_measure(tmp_path, monkeypatch, name):
    folder = tmp_path / "bolt"
    shutil.copytree(tuning.FOLDER, folder)
    monkeypatch.setattr(tuning, "FOLDER", folder)
    before = tuning._templates.__wrapped__()
    with open(folder / name, "a") as file:
        file.write("\n")
    assert tuning._templates.__wrapped__() != before
