"""Cells on a Ray cluster: the same function, elsewhere; only the driver writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from keras_efficient.bayes import datasets
from keras_efficient.bayes.benchmark.results import Outcome
from keras_efficient.bayes.benchmark.running import Engine, run_cell
from keras_efficient.bayes.benchmark.suites import Cell
from keras_efficient.errors import ConnectionProblem, MissingDependency, WrongArgument

__all__ = ["on_ray"]

TRIES = 5  # of a cell whose machine goes away


def on_ray(address: str | None = None, *, cpus: float = 1, gpus: float = 0, at_once: int | None = None) -> Engine:
    """An engine for `Benchmark`.

    A cell whose worker or machine is lost is run again elsewhere, up to five times in all, then it has failed. Cells
    are handed out as results come back, so that not all of them wait in the cluster.

    Args:
        address: of the cluster, `"auto"`, `"host:6379"` or `"ray://host:10001"`; `None`: a cluster on this machine.
        cpus, gpus: that a cell takes.
        at_once: cells in the cluster; `None`: twice its processors.

    Raises:
        MissingDependency: Ray is not installed.
        ConnectionProblem: no cluster at the address.
        WrongArgument: numbers below 0, or nothing at once.
    """
    if cpus < 0 or gpus < 0 or (at_once is not None and at_once < 1):
        raise WrongArgument(f"Cells take 0 processors or more, one at once at least: {cpus=}, {gpus=}, {at_once=}.")
    try:
        import ray
    except ImportError as err:
        raise MissingDependency("ray", "A sweep on a cluster", "ray") from err

    def engine(cells: list[Cell]) -> Iterator[tuple[Cell, Outcome]]:
        started = _connect(ray, address)
        try:
            yield from _results(ray, cells, {"num_cpus": cpus, "num_gpus": gpus}, at_once)
        finally:
            if started:
                ray.shutdown()

    return engine


def _connect(ray: Any, address: str | None) -> bool:
    """Whether it was this call that connected."""
    if ray.is_initialized():
        return False
    names = ("KERAS_BACKEND", "KERAS_HOME", datasets.VARIABLE)
    passed = {name: os.environ[name] for name in names if name in os.environ}
    options = {"log_to_driver": False, "logging_level": "ERROR", "runtime_env": {"env_vars": passed}}
    try:
        ray.init(address=address, include_dashboard=False if address is None else None, **options)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as err:
        reason = str(err).strip().splitlines()[0]
        raise ConnectionProblem(f"No Ray cluster at {address or 'this machine'}: {reason}") from err
    return True


def _results(ray: Any, cells: list[Cell], needs: dict[str, Any], at_once: int | None) -> Iterator[tuple[Cell, Outcome]]:
    # Tries are counted here: Ray would not tell which cell it gave up.
    run = ray.remote(max_retries=0, **needs)(run_cell)
    limit = at_once or max(2 * int(ray.cluster_resources().get("CPU", 1)), 1)
    waiting = [(cell, 1) for cell in reversed(cells)]
    running: dict[Any, tuple[Cell, int]] = {}
    while waiting or running:
        while waiting and len(running) < limit:
            cell, attempt = waiting.pop()
            running[run.remote(cell.spec)] = cell, attempt
        (ready, *_), _ = ray.wait(list(running), num_returns=1)
        cell, attempt = running.pop(ready)
        try:
            outcome = ray.get(ready)
        except ray.exceptions.RayError as err:
            if attempt < TRIES:
                waiting.append((cell, attempt + 1))
                continue
            reason = str(err).strip().splitlines()[0]
            outcome = Outcome(failed=f"Lost {attempt} times: {type(err).__name__}: {reason}"[:500])
        yield cell, outcome
