"""Measures candidates on a GPU, and keeps what was found in a file that can be shared.

Each candidate is compiled, held to its meaning at a small size, and then timed at the real one with its real epilogue,
over inputs that do not fit into the L2 cache, while the next ones are compiled. The fastest halves go on with more
repetitions. Not verified: no GPU was at hand yet; the order of steps is tested with a stand-in.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from keras_efficient.errors import ConversionError, FileProblem, KerasEfficientError
from keras_efficient.export.bolt import build, spec
from keras_efficient.export.bolt.checking import TOLERANCE
from keras_efficient.export.bolt.region import Region
from keras_efficient.export.bolt.search import Candidate
from keras_efficient.export.bolt.source import Source

__all__ = ["Cache", "Meter", "compilers", "key", "tuned"]

FIRST = 3  # repetitions for each candidate, as soon as it is compiled
ROUNDS = ((7, 0.5), (15, 0.25))  # repetitions, and the share of candidates that take part
FOLDER = Path(__file__).parent


class Meter(Protocol):
    """A GPU that times kernels.

    Attributes:
        arch: whose machine code it takes.
        identity: device, driver, and whatever else a measurement hangs on; strings and integers, `arch` among them.
    """

    arch: str
    identity: dict[str, Any]

    def error(self, region: Region, source: Source, cubin: bytes) -> float:
        """Relative error at a small size."""

    def seconds(
        self, region: Region, source: Source, cubin: bytes, shape: tuple[int, int, int], repetitions: int
    ) -> list[float]:
        """Of single launches within a graph.

        Raises:
            KerasEfficientError: the kernel does not run, or computes something else at this size.
        """


@cache
def _templates() -> str:
    """A hash of all that makes sources, launches them and measures."""
    digest = hashlib.sha256()
    for path in (*sorted((FOLDER / "templates").iterdir()), FOLDER / "grids.py", FOLDER / "meter.py"):
        if path.suffix in (".py", ".cuh"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def key(region: Region, shape: Sequence[int]) -> str:
    """What a measurement hangs on besides its GPU: structure, epilogue, sizes, number format, compiler, templates."""
    parts = [spec.spec(region), list(shape), "float16", _compiler(), _templates()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@cache
def _compiler() -> str:
    """Versions of what compiles: of CUTLASS's kernels nvcc and headers too."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for package in ("nvidia-cuda-nvrtc", "nvidia-cuda-nvcc", "nvidia-cutlass"):
        try:
            found.append(version(package))
        except PackageNotFoundError:
            found.append("none")
    return " ".join(found)


class Cache:
    """Measurements in a file of JSON lines, each with a checksum; several processes may write it at a time.

    Lines that are damaged or of somebody else's making are passed over and counted in `damaged`.

    Args:
        path: of the file, which need not exist yet.

    Raises:
        FileProblem: it cannot be read, or is somebody else's: it has lines, and none of them is a measurement.
    """

    def __init__(self, path: str | Path):
        self.path, self.damaged = Path(path), 0
        self._found: dict[str, list[tuple[dict[str, Any], list[dict[str, Any]]]]] = {}
        try:
            lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        except OSError as err:
            raise FileProblem(path, f"cannot be read: {err.strerror}.") from err
        for line in lines:
            entry = _entry(line)
            if entry is None:
                self.damaged += 1
            else:
                self._found.setdefault(entry["key"], []).append((entry["device"], entry["candidates"]))
        if self.damaged and not self._found:  # a line more would damage it
            raise FileProblem(path, "has no measurement of kernels in it.", hint="Name another file, or a new one.")

    @property
    def architectures(self) -> set[str]:
        """Of the GPUs that measured."""
        return {str(device.get("arch")) for entries in self._found.values() for device, _ in entries}

    def get(self, name: str, device: dict[str, Any]) -> list[dict[str, Any]]:
        """Candidates as `Candidate.to_dict` has them, with their `seconds`, as a GPU ran them last.

        Args:
            name: as of `key`.
            device: its identity, or a part of it, such as its `arch` alone.
        """
        for known, found in reversed(self._found.get(name, [])):
            if device.items() <= known.items():
                return found
        return []

    def put(self, name: str, device: dict[str, Any], found: list[dict[str, Any]]) -> None:
        """Appends a line.

        Raises:
            FileProblem: it cannot be written.
        """
        self._found.setdefault(name, []).append((device, found))
        body = json.dumps({"key": name, "device": device, "candidates": found}, sort_keys=True)
        line = json.dumps({"body": body, "sha256": hashlib.sha256(body.encode()).hexdigest()}) + "\n"
        try:
            with open(self.path, "ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                # A line that was not ended, by a process that was killed, must not swallow this one.
                torn = file.tell() > 0 and not self.path.read_bytes().endswith(b"\n")
                file.write((b"\n" if torn else b"") + line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as err:
            raise FileProblem(self.path, f"cannot be written: {err.strerror}.") from err


def _entry(line: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError, AttributeError):
        outer = json.loads(line)
        if hashlib.sha256(outer["body"].encode()).hexdigest() != outer["sha256"]:
            return None
        body = json.loads(outer["body"])
        plain = all(isinstance(one, str | int) for one in body["device"].values())
        fits = (
            plain
            and isinstance(body["key"], str)
            and all(
                isinstance(one["seconds"], float) and 0 < one["seconds"] < 3600 and isinstance(one["template"], str)
                for one in body["candidates"]
            )
        )
        return body if fits and body["candidates"] else None
    return None


@contextlib.contextmanager
def compilers() -> Iterator[Executor]:
    """Processes that compile, as many as there are cores; what they have not begun at the end is left."""
    # A fork would have the parent's CUDA context, which is of no use in a child.
    pool = ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@dataclass
class _Trial:
    place: int
    candidate: Candidate
    source: Source
    cubin: bytes
    times: list[float]


def tuned(
    region: Region,
    ranking: Sequence[Candidate],
    shape: tuple[int, int, int],
    meter: Meter | None,
    *,
    arch: str,
    deadline: float,
    cache: Cache | None = None,
    on_progress: Callable[[str], None] = lambda line: None,
    executor: Executor | None = None,
    compiled: dict[str, build.Compiled] | None = None,
) -> tuple[list[Candidate], list[str]]:
    """Candidates in the order in which a GPU runs them, with its times; and why others were refused.

    Args:
        region: what they compute.
        ranking: as of `search.candidates`; after the deadline those that were not measured follow in this order.
        shape: images, height and width.
        meter: the GPU; without one, what the cache knows of any of this architecture is taken.
        arch: of the GPU.
        deadline: of `time.monotonic()`. What is compiled or measured by then counts.
        cache: of earlier measurements; these are taken as they are, and candidates that it lacks are measured.
        on_progress: called with a line for each candidate.
        executor: that compiles; by default `compilers()` of its own.
        compiled: kernels for this architecture, by their names; they are taken as they are, and new ones come to them.

    Raises:
        ConversionError: processes that compile cannot run. What was measured before is in the cache.
    """
    name, device = key(region, shape), {"arch": arch} if meter is None else meter.identity
    earlier = _from_cache([] if cache is None else cache.get(name, device), ranking)
    left = [one for one in ranking if one.to_dict() not in [other.to_dict() for other in earlier]]
    if meter is None or not left or time.monotonic() >= deadline:
        return [*earlier, *left], []
    trials: list[_Trial] = []
    refused: dict[int, str] = {}
    compiled = {} if compiled is None else compiled
    try:
        with contextlib.nullcontext(executor) if executor is not None else compilers() as pool:
            for place, source, result in _compiled(region, left, meter.arch, pool, deadline, compiled):
                on_progress(f"candidate {len(earlier) + len(trials) + len(refused) + 1} of {len(ranking)}")
                problem = _problem(region, source, result, meter)
                if problem is None and isinstance(result, build.Compiled):
                    trial = _Trial(place, left[place], source, result.cubin, [])
                    problem = _timed(trial, region, shape, meter, FIRST)
                    if problem is None:
                        trials.append(trial)
                if problem is not None:
                    refused[place] = f"{left[place].parameters}: {problem}"
        for repetitions, share in ROUNDS:
            trials.sort(key=_median)
            for trial in trials[: max(1, round(share * len(trials)))]:
                if time.monotonic() > deadline:
                    break
                problem = _timed(trial, region, shape, meter, repetitions)
                if problem is not None:
                    trials.remove(trial)
                    refused[trial.place] = f"{trial.candidate.parameters}: {problem}"
    finally:  # what was measured is worth keeping, whatever came in between
        news = [replace(one.candidate, seconds=_median(one), measured=True) for one in trials]
        found = sorted([*earlier, *news], key=lambda one: one.seconds)
        if news and cache is not None:
            cache.put(name, device, [{**one.to_dict(), "seconds": one.seconds} for one in found])
    rest = [one for one in ranking if one.to_dict() not in [other.to_dict() for other in found]]
    return [*found, *rest], [refused[place] for place in sorted(refused)]


def _timed(trial: _Trial, region: Region, shape: tuple[int, int, int], meter: Meter, repetitions: int) -> str | None:
    """Times a candidate some more; why it cannot be, or `None`."""
    try:
        times = meter.seconds(region, trial.source, trial.cubin, shape, repetitions)
    except KerasEfficientError as err:
        return err.message
    trial.times += times
    return None


def _median(trial: _Trial) -> float:
    return statistics.median(trial.times)


def _from_cache(known: list[dict[str, Any]], ranking: Sequence[Candidate]) -> list[Candidate]:
    """Known ones that are among today's candidates, the fastest first: a file cannot bring parameters of its own."""
    by_parameters = {json.dumps(one.to_dict(), sort_keys=True): one for one in ranking}
    found = []
    for entry in known:
        own = {name: value for name, value in entry.items() if name != "seconds"}
        candidate = by_parameters.get(json.dumps(own, sort_keys=True))
        if candidate is not None:
            found.append(replace(candidate, seconds=entry["seconds"], measured=True))
    return sorted(found, key=lambda one: one.seconds)


def _compiled(
    region: Region,
    ranking: Sequence[Candidate],
    arch: str,
    pool: Executor,
    deadline: float,
    known: dict[str, build.Compiled],
) -> Iterator[tuple[int, Source, build.Compiled | KerasEfficientError]]:
    """Places in the ranking, as compilers get done with them, until the deadline."""
    sources = [one.emit(region) for one in ranking]
    jobs: dict[Any, int] = {}
    try:
        for place, source in enumerate(sources):
            if source.kernel not in known:  # weights have no part in it
                jobs[pool.submit(build.compiled_source, replace(source, packed=b""), arch)] = place
        for place in sorted(set(range(len(sources))) - set(jobs.values())):
            yield place, sources[place], known[sources[place].kernel]
            if time.monotonic() > deadline:
                return
        for job in as_completed(jobs, timeout=max(deadline - time.monotonic(), 0)):
            place = jobs[job]
            try:
                known[sources[place].kernel] = job.result()
                yield place, sources[place], job.result()
            except KerasEfficientError as err:
                yield place, sources[place], err
            if time.monotonic() > deadline:
                return
    except TimeoutError:  # a compiler takes longer than there is time
        return
    except BrokenExecutor as err:  # mostly since each process runs the script that started it, up to this call
        reason = "A process that compiles kernels ended early; in a script, put the call under"
        raise ConversionError(f"{reason} `if __name__ == '__main__':`.") from err
    finally:
        for job in jobs:
            job.cancel()


def _problem(region: Region, source: Source, result: Any, meter: Meter) -> str | None:
    if isinstance(result, KerasEfficientError):
        return result.message
    info = result.kernels[source.kernel]
    if info.spill_stores or info.spill_loads or info.stack_bytes:
        return f"{info.spill_stores} bytes of registers spill"
    try:
        error = meter.error(region, source, result.cubin)
    except KerasEfficientError as err:
        return err.message
    return None if error < TOLERANCE else f"its relative error is {error:.2g}"
