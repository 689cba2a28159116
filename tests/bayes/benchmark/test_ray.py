"""A sweep on a cluster: the rows of one machine, whatever becomes of the others."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from keras_efficient.bayes.benchmark import Benchmark, Results
from keras_efficient.bayes.benchmark import running as running_module
from keras_efficient.errors import ConnectionProblem, MissingDependency, WrongArgument

ray = pytest.importorskip("ray", reason="needs the package ray")

from keras_efficient.bayes.benchmark import ray_engine  # noqa: E402
from keras_efficient.bayes.benchmark.ray_engine import on_ray  # noqa: E402

METHODS = {f"MAP {number}": {"name": "MAP", "epochs": number} for number in (1, 2)}


@pytest.fixture
def cluster(monkeypatch):
    """Three nodes of one processor each, as processes of this machine; cells go to the two that may be lost."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_worker_niceness", "0")  # else they wait for every other test
    small = {"object_store_memory": 80 * 2**20}
    made = Cluster()
    try:
        try:
            made.add_node(num_cpus=0, include_dashboard=False, **small)
            nodes = [made.add_node(num_cpus=1, **small) for _ in range(2)]
            made.wait_for_nodes()
        except Exception as err:  # what it gives up with where a machine is too busy has no class of its own
            pytest.skip(f"Ray starts no cluster here: {err}")
        yield made, nodes, small
    finally:
        ray.shutdown()
        made.shutdown()


def without_seconds(rows):
    return [row for row in rows if row["metric"] != "seconds"]


def near(rows, others):
    """Equal but for the last digits of sums, whose order another machine may choose."""
    assert [{**row, "value": None} for row in rows] == [{**row, "value": None} for row in others]
    values, expected = ([row["value"] for row in some] for some in (rows, others))
    assert [value is None for value in values] == [value is None for value in expected]
    pairs = [(a, b) for a, b in zip(values, expected, strict=True) if a is not None]
    np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-3, atol=1e-5)


@pytest.mark.timeout(600)  # each node starts a TensorFlow of its own
def test_a_node_is_lost_in_mid_run(small, tmp_path, cluster):
    made, (node, _), small_node = cluster
    suite = small(methods=METHODS, seeds=(0, 1))
    seen = []

    def progress(done, total, what):
        seen.append(what)
        if done == 1:  # the other node is at work now
            made.remove_node(node, allow_graceful=False)
            made.add_node(num_cpus=1, **small_node)

    rows = Benchmark(suite, tmp_path / "cluster", on_ray(made.address, at_once=3)).run(progress=progress)
    assert len([what for what in seen if what]) == 4  # each cell once
    near(without_seconds(rows), without_seconds(Benchmark(suite, tmp_path / "here").run()))
    assert len(list((tmp_path / "cluster" / "cells").glob("*.json"))) == 4


class FakeRay:
    """Ray's calls, without processes: some runs of some cells are lost."""

    class exceptions:
        class RayError(Exception):
            pass

    def __init__(self, lost):
        self.lost, self.runs, self.most, self.now = lost, [], 0, 0

    def remote(self, **options):
        assert options["max_retries"] == 0

        class Remote:
            def __init__(self, fake):
                self.fake = fake

            def remote(self, spec):
                self.fake.runs.append(spec["seed"])
                self.fake.now += 1
                self.fake.most = max(self.fake.most, self.fake.now)
                return (len(self.fake.runs), spec["seed"])

        return lambda function: Remote(self)

    def cluster_resources(self):
        return {"CPU": 1.0}

    def wait(self, running, num_returns):
        return [running[-1]], running[:-1]

    def get(self, run):
        self.now -= 1
        if self.lost.get(run[1], 0) > 0:
            self.lost[run[1]] -= 1
            raise self.exceptions.RayError("worker died\nand more")
        return running_module.Outcome([{"split": "test", "metric": "seed", "value": float(run[1])}])


def test_lost_cells_are_run_again_five_times_at_most(small, tmp_path, monkeypatch):
    fake = FakeRay({1: 4, 2: 99})
    monkeypatch.setattr(ray_engine, "_connect", lambda ray, address: False)
    monkeypatch.setitem(sys.modules, "ray", fake)
    suite = small(methods={"MAP": {"name": "MAP"}}, seeds=(0, 1, 2, 3))
    rows = Benchmark(suite, tmp_path, on_ray()).run()
    assert {row["seed"]: row["metric"] for row in rows} == {0: "seed", 1: "seed", 2: "failed", 3: "seed"}
    assert next(row for row in rows if row["seed"] == 2)["reason"] == "Lost 5 times: RayError: worker died"
    assert {seed: fake.runs.count(seed) for seed in range(4)} == {0: 1, 1: 5, 2: 5, 3: 1}
    assert fake.most == 2  # twice the processors, and not all cells
    assert Results(tmp_path).rows() == rows


def test_bad_calls(small, tmp_path, monkeypatch):
    with pytest.raises(WrongArgument, match="one at once at least"):
        on_ray(at_once=0)
    monkeypatch.setattr(ray, "init", lambda **_: (_ for _ in ()).throw(ConnectionError("refused\nmore")))
    with pytest.raises(ConnectionProblem, match=r"No Ray cluster at nowhere:1: refused$"):
        Benchmark(small(), tmp_path, on_ray("nowhere:1")).run()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependency, match=r"keras-efficient\[ray\]"):
        on_ray()
