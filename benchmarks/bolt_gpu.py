"""Kernels on a GPU beside PyTorch and JAX; needs these, and neither TensorFlow nor Keras.

All but JAX is timed by replays of CUDA graphs, of as many launches for ours as for peers; inputs and outputs take turns
and do not fit into the L2 cache together, but for the smallest cases (see `meter.MOST_SETS`); numbers are medians. The
kernel that a search found is timed once more before its peers run and once more behind them, and all these times
count, not the search's, which chose the luckiest. Peers do not take turns with it launch by launch.

Each group of cases runs in a process of its own: after an error that a GPU's context does not get over, or a crash,
another one goes on behind the case at fault, as it does where a case hangs for half of its group's time. The whole
ends within ten minutes (`BUDGET`): half of what a group has left is shared out among its searches, and a peer for which
there is no time is told as such. What fails, ours or a peer, costs its row only. Not verified: no GPU was at hand yet;
the order of all is tested with stand-ins.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from math import exp, isnan, log, prod
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bolt_networks import BERT, CONVOLUTIONS, PAIRS, ROW_PAIRS, convolution, pair, row_pair, rows_of, sesr
from benchmarks.harness import Row
from keras_efficient.errors import ConversionError, KerasEfficientError
from keras_efficient.export.bolt import build, runtime, spec, tuning
from keras_efficient.export.bolt.architectures import architecture
from keras_efficient.export.bolt.bundle import Bundle
from keras_efficient.export.bolt.checking import TOLERANCE
from keras_efficient.export.bolt.meter import LAUNCHES, CudaMeter, turns
from keras_efficient.export.bolt.region import Activate, Add, Region
from keras_efficient.export.bolt.search import Candidate, candidates

__all__ = ["rows"]

NOT_MEASURED = "no GPU was at hand"
NO_TIME = "no time was left"
NOT_ENDED = "its peers did not end"
CANDIDATES = 16
BUDGET = 540.0  # seconds of the whole run, so that it ends within ten minutes
GRACE = 20.0  # beyond its share, until a group's process is killed
SEARCHES = 0.5  # of what is left, for searches; the rest is for peers
MOST, LEAST = 20.0, 4.0  # seconds of one search, and what is kept for each that is to come
PRODUCTS = 989e12  # operations a second of float16, by the data sheet of an H200
ROUNDS = 10  # of timing a peer
FRESH = 10  # and of ours, before the peers run and behind them


Shape = tuple[int, int, int]
Peer = Callable[[Region, Shape, int], float | None]


@dataclass(frozen=True)
class Case:
    """A region at a size: images, height and width."""

    label: str
    region: Region
    shape: Shape


@dataclass(frozen=True)
class Bar:
    """What is to be reached: at least or at most a number.

    Attributes:
        what, unit: of the row.
        least, most: one of both.
        sign: behind the number, in the row's words.
    """

    what: str
    unit: str = ""
    least: float | None = None
    most: float | None = None
    sign: str = ""

    @property
    def text(self) -> str:
        return f"≤ {self.most:g}{self.sign}" if self.least is None else f"≥ {self.least:g}{self.sign}"

    def is_reached(self, number: float) -> bool:
        return (self.least is None or number >= self.least) and (self.most is None or number <= self.most)

    def row(self, ours: float | None, number: float | None = None, why: str = "", **more: Any) -> Row:
        """The row; `number` is what the bar is about, by default the ratio, else `ours`."""
        number = more.get("ratio", ours) if number is None else number
        reached = None if number is None or why else self.is_reached(number)
        return Row(self.what, ours, self.unit, bar=self.text, reached=reached, why=why, **more)


ERROR = Bar("every kernel against float64: the largest relative error", most=1e-3)
TIME = Bar("SESR-M5 ×2, 1080p: time", "ms", most=0.25, sign=" ms; floor 0.07 to 0.11")
SESR = {
    (1080, 1920): Bar(
        "SESR-M5 ×2, 1080p: the best of torch eager, torch.compile and jax.jit over ours", "ms", least=3, sign="×"
    ),
    (540, 960): Bar("SESR-M5 ×2, 540p: the best peer over ours", "ms", least=2, sign="×"),
    (256, 256): Bar("SESR-M5 ×2, 256×256: the best peer over ours", "ms", least=2, sign="×"),
}
ONE = Bar("convolutions with epilogues: geometric mean of the best peer over ours", least=1.3, sign="×")
TWO = Bar("pairs of convolutions and of products: geometric mean of the best peer over ours", least=1.1, sign="×")
BERTS = Bar("products of BERT with GELU: the slowest of cuBLASLt over ours", least=0.95, sign="×")
COLD = Bar("search for the kernels of a network, from cold", "s", most=1200, sign=" s")
AGAIN = Bar("the same from the file of measurements", "s", most=10, sign=" s")
BARS = (ERROR, TIME, *SESR.values(), ONE, TWO, BERTS, COLD, AGAIN)


def rows(quick: bool) -> Iterator[Row]:
    """All rows; without a GPU each says that it was not measured."""
    try:
        runtime.driver()  # no context: that of each group is its process's own
    except KerasEfficientError as err:
        print(err.message, file=sys.stderr)
        networks = {bar: [Case(bar.what, sesr(5), (1, *size))] for size, bar in SESR.items()}
        several = {ONE: _convolutions(quick), TWO: _pairs(quick), BERTS: _products(quick)}
        for bar in BARS:
            cases = {**networks, **several}.get(bar, [])
            yield bar.row(None, why=NOT_MEASURED, details={"estimates for an H200, ms": _estimates(cases)})
        return
    with tempfile.TemporaryDirectory() as folder:
        yield from everything(quick, partial(isolated, quick=quick, path=Path(folder) / "measured.jsonl"))


def _networks(quick: bool) -> Iterator[Case]:
    for size, bar in list(SESR.items())[: 1 if quick else None]:
        yield Case(bar.what, sesr(5), (1, *size))


def _again(quick: bool) -> Iterator[Case]:
    """The first network once more."""
    yield replace(next(_networks(quick)), label=AGAIN.what)


def _convolutions(quick: bool) -> Iterator[Case]:
    for case in CONVOLUTIONS[: 2 if quick else None]:
        n, size, channels, filters, kernel, stride, activation, residual = case
        region = convolution(channels, filters, kernel, stride, activation, residual)
        width = 1920 if size == 1080 else size
        more = " + residual" if residual else ""
        label = f"{n}×{size}×{width}, {kernel}×{kernel}, {channels} to {filters}, /{stride}, {activation}{more}"
        yield Case(label, region, (n, size, width))


def _pairs(quick: bool) -> Iterator[Case]:
    for n, size, channels, filters, stride in PAIRS[: 1 if quick else None]:
        label = f"{n}×{size}², 3×3 {channels} to {filters}, /{stride}, and 1×1"
        yield Case(label, pair(channels, filters, stride), (n, size, size))
    for number, channels, middle, filters in ROW_PAIRS[: 1 if quick else None]:
        label = f"{number} rows, {channels} to {middle} to {filters}"
        yield Case(label, row_pair(channels, middle, filters), (1, 1, number))


def _products(quick: bool) -> Iterator[Case]:
    for number, filters, channels in BERT[: 1 if quick else None]:
        label = f"{number} rows, {channels} to {filters}, GELU"
        yield Case(label, rows_of(channels, filters, "gelu_tanh"), (1, 1, number))


def _estimates(cases: Iterable[Case]) -> dict[str, dict[str, float]]:
    """Milliseconds on an H200 that no GPU has measured: of the best candidates, and what no kernel is faster than."""
    arch, found = architecture("sm_90a"), {}
    for case in cases:
        found[case.label] = {
            "estimate": 1000 * candidates(case.region, arch, *case.shape, limit=1)[0].seconds,
            "roofline of memory": 1000 * _roofline(case.region, case.shape, arch.memory_rate),
            "roofline of products": 1000 * _operations(case.region, case.shape) / PRODUCTS,
        }
    return found


# -------------------------------------------------------------------------------------------------------------- groups


def _geometric(ratios: Sequence[float]) -> float:
    return exp(sum(map(log, ratios)) / len(ratios))


@dataclass(frozen=True)
class Group:
    """Cases that share a process.

    Attributes:
        share: seconds of `BUDGET`; what others leave comes on top.
        cases: of a quick run or not.
        bar: what the mean of their ratios is to reach.
        peer: the one that counts; by default the best one.
        mean: of ratios.
    """

    share: float
    cases: Callable[[bool], Iterator[Case]]
    bar: Bar | None = None
    peer: str | None = None
    mean: Callable[[list[float]], float] = _geometric

    def summary(self, bar: Bar, rows: Sequence[Row]) -> Row:
        """The mean of ratios; without a bar's verdict where a case has none."""
        ratios = [one.ratio for one in rows if one.ratio is not None]
        value = self.mean(ratios) if ratios else None
        why = "; ".join(f"{one.what}: {one.why}" for one in rows if one.why)
        return bar.row(value, why=why, ratio=value, details={"ratios": ratios})


GROUPS = {
    "networks": Group(180, _networks),
    "convolutions": Group(140, _convolutions, ONE),
    "pairs": Group(140, _pairs, TWO),
    "products": Group(60, _products, BERTS, "cuBLASLt", min),
    "again": Group(20, _again),
}
WHOLE = Row("SESR-M5 ×2, 1080p: replays of its bundle's graph, as a user runs it", None, "ms")


def planned(name: str, case: Case) -> list[Row]:
    """The rows that a case of a group gives, without their numbers."""
    if name == "again":
        return [AGAIN.row(None)]
    if name != "networks":
        return [Row(case.label, None, "ms")]
    bar = next(one for one in SESR.values() if one.what == case.label)
    return [*([TIME.row(None), COLD.row(None), WHOLE] if _is_first(case) else []), bar.row(None)]


def _is_first(case: Case) -> bool:
    return case.shape == (1, *next(iter(SESR)))


def everything(quick: bool, run: Callable[[str, float, list[float]], Iterator[Row]]) -> Iterator[Row]:
    """All rows.

    Args:
        quick: fewer cases and candidates.
        run: takes a group's name, when it is to end, and a list that it adds errors of kernels to; gives its rows.
    """
    errors: list[float] = []
    end, shares = time.monotonic() + BUDGET, sum(group.share for group in GROUPS.values())
    for name, group in GROUPS.items():
        now, found = time.monotonic(), []
        for row in run(name, now + max(end - now, 0) * group.share / shares, errors):
            found.append(row)
            yield row
        shares -= group.share
        if group.bar is not None:
            yield group.summary(group.bar, found)
    worst = max(errors, key=lambda one: float("inf") if isnan(one) else one, default=None)
    yield ERROR.row(worst, why="" if errors else "no kernel ran", details={"kernels": len(errors)})


# ----------------------------------------------------------------------------------------------------------- processes


def isolated(
    name: str, end: float, errors: list[float], *, quick: bool, path: Path, target: Callable[..., Any] | None = None
) -> Iterator[Row]:
    """A group's rows out of a process of its own; where that ends early, the next one goes on behind the case at fault.

    Args:
        name, end, errors: as of `everything`.
        quick: fewer cases and candidates.
        path: of the file of measurements.
        target: what runs there, as `measured`.
    """
    left = {case.label: planned(name, case) for case in GROUPS[name].cases(quick)}
    patience = (end - time.monotonic()) / 2 + GRACE
    while left:
        sent: set[str] = set()
        early: dict[str, Row] = {}
        own: list[float] = []
        why, hung = "", False
        arguments = (name, quick, list(left), str(path), end)
        try:
            for row, own in _sent(target or measured, arguments, end + GRACE, patience):  # noqa: B007
                if row.why == NOT_ENDED:
                    early[row.what] = row
                    continue
                sent.add(row.what)
                yield row
        except RuntimeError as err:
            why, hung = str(err), isinstance(err, _Hung)
            print(f"{name}: {why}", file=sys.stderr, flush=True)
        errors += own
        count = len(left)
        left = {label: rows for label, rows in left.items() if not sent.issuperset(row.what for row in rows)}
        is_over = not why or time.monotonic() >= end
        # Where others were done before it, the first one is tried once more: what they left may be at fault.
        at_fault = list(left) if is_over else list(left)[: hung or len(left) == count]
        for label in at_fault:
            missing = [early.get(row.what, row) for row in left.pop(label) if row.what not in sent]
            yield from (replace(row, why=why or "it gave no row") for row in missing)


class _Hung(RuntimeError):
    """A process took too long."""


def _sent(target: Callable[..., Any], arguments: Sequence[Any], end: float, patience: float) -> Iterator[Any]:
    """What a new process sends; at the end it is killed, and whatever it started.

    Args:
        target: what runs there, and gives what is sent.
        arguments: of it.
        end: of `time.monotonic()`, when it is killed at the latest.
        patience: seconds that it may send nothing.

    Raises:
        RuntimeError: it ended early, or had to be killed.
    """
    context = multiprocessing.get_context("spawn")  # a fork would share what the parent knows of the driver
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, target, arguments))
    process.start()
    sender.close()
    try:
        while receiver.poll(max(min(end - time.monotonic(), patience), 0)):
            try:
                message = receiver.recv()
            except (EOFError, OSError):
                process.join(5)
                raise RuntimeError(f"its process ended with {process.exitcode}") from None
            if message is None:
                return
            if isinstance(message, str):
                raise RuntimeError(message)
            yield message
        raise _Hung("its process was killed when its time was up")
    finally:
        try:
            assert process.pid  # of 0 the group would be our own
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it ended, or has not begun
            process.kill()
        process.join()
        receiver.close()


def _child(sender: Any, target: Callable[..., Any], arguments: Sequence[Any]) -> None:
    os.setpgid(0, 0)  # so that compilers are killed with it
    threading.Thread(target=_watch, daemon=True).start()
    try:
        for message in target(*arguments):
            sender.send(message)
        sender.send(None)
    except Exception as err:
        sender.send(_line(err))


def _watch() -> None:
    """Ends with the parent, whatever hangs."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)


def measured(name: str, quick: bool, labels: Sequence[str], path: str, end: float) -> Iterator[tuple[Row, list[float]]]:
    """Rows of some cases of a group, each with all errors of kernels so far: in a process that has the GPU to itself.

    Raises:
        KerasEfficientError: the GPU's context is of no more use.
    """
    cases = [one for one in GROUPS[name].cases(quick) if one.label in labels]
    with contextlib.ExitStack() as exits:
        bench = Bench(CudaMeter(), quick, Path(path), end, exits)
        bench.left = len(cases)
        for case in cases:
            for row in bench.rows(name, case):
                yield row, list(bench.errors)
            bench.meter.device.finish(bench.meter.device.stream)  # an error that stays would fail all that follow


class Bench:
    """Measures cases.

    Args:
        meter: the GPU.
        quick: fewer candidates.
        path: of the file of measurements.
        end: of `time.monotonic()`.
        exits: ends what was started.
        peers: by name; each takes a region, its shape, and how many sets of inputs take turns, and gives seconds of a
            call, or `None` where it has no such operation.
        compilers: makes a pool that compiles.

    Attributes:
        left: how many cases are to come.
        errors: of all kernels that were chosen.
    """

    def __init__(
        self,
        meter: Any,
        quick: bool,
        path: Path,
        end: float,
        exits: contextlib.ExitStack,
        peers: dict[str, Peer] | None = None,
        compilers: Callable[[], Any] = tuning.compilers,
    ):
        self.meter, self.quick, self.path, self.end = meter, quick, path, end
        self.exits, self.compilers = exits, compilers
        self.pool = exits.enter_context(compilers())
        # The slowest comes last: where time is short, the others were run.
        own: dict[str, Peer] = {"torch eager": _eager, "cuBLASLt": _cublas, "jax.jit": _jax, "torch.compile": _compiled}
        self.runs = own if peers is None else peers
        self.arch, self.cache = architecture(meter.arch), tuning.Cache(path)
        self.errors: list[float] = []
        self.left = 0
        self.compiled: dict[str, build.Compiled] = {}
        self.took: dict[str, float] = {}  # by a peer for a layer, the last time

    def rows(self, name: str, case: Case) -> Iterator[Row]:
        """Those that `planned` names; and before its peers run what there is of a case, as `NOT_ENDED`."""
        if name == "again":
            yield self.again(case)
            return
        plan, found = planned(name, case)[-1], self.ours(case)
        if found.candidate is not None:
            yield replace(plan, ours=found.ours, why=NOT_ENDED, details={"ours": found.candidate.to_dict()})
        if name == "networks" and _is_first(case):
            yield TIME.row(found.ours, why=found.failed)
            details = {"network": "SESR-M5, 1080p: one kernel"}
            yield COLD.row(found.searched or None, why=found.failed, details=details)
            yield self.whole(case, found)
        self.compare(case, found, GROUPS[name].peer)
        numbers: dict[str, Any] = {"peer": found.peer, "ratio": found.ratio, "details": found.details}
        if name == "networks":
            bar = next(one for one in SESR.values() if one.what == case.label)
            yield bar.row(found.ours, found.ratio, found.why, **numbers)
        else:
            yield replace(plan, ours=found.ours, why=found.why, **numbers)

    def again(self, case: Case) -> Row:
        """A second search, by the file that the first one wrote and nothing else."""
        start, self.compiled = time.perf_counter(), {}
        try:
            self.cache = tuning.Cache(self.path)
            # What the file lacks was refused then; only the winner is compiled.
            self.search(case, is_known=True)
        except Exception as err:
            return AGAIN.row(None, why=_line(err))
        return AGAIN.row(time.perf_counter() - start)

    # ----------------------------------------------------------------------------------------------- ours, and peers

    def ours(self, case: Case) -> Found:
        """The fastest kernel."""
        found, start = Found(), time.perf_counter()
        try:
            found.candidate = self.search(case)
            found.searched = time.perf_counter() - start
            found.take(self.fresh(case, found.candidate))
        except Exception as err:  # of one case, of which the others know nothing
            found.candidate, found.why = None, _line(err)
            print(f"{case.label}: {found.why}", file=sys.stderr, flush=True)
        return found

    def compare(self, case: Case, found: Found, peer: str | None = None) -> None:
        """Adds the peers that run: all, of which the best one counts, unless one is named."""
        if found.candidate is None:
            return
        peers, failures = self.peers(case)
        try:
            found.take(self.fresh(case, found.candidate))
        except KerasEfficientError as err:
            failures["ours, behind the peers"] = _line(err)
        best = replace(found.candidate, seconds=statistics.median(found.times))
        counted = {name: one for name, one in peers.items() if peer in (None, name)}
        found.details = {
            "peers, ms": {name: 1000 * one for name, one in peers.items()},
            "failures": failures,
            "roofline of memory, ms": 1000 * _roofline(case.region, case.shape, self.arch.memory_rate),
            "TFLOP/s": 1e-12 * _operations(case.region, case.shape) / best.seconds,
            "ours": best.to_dict(),
            "ours before and behind the peers, ms": [
                1000 * statistics.median(part) for part in (found.times[:FRESH], found.times[FRESH:]) if part
            ],
        }
        if counted:
            name = min(counted, key=lambda one: counted[one])
            found.peer, found.ratio = 1000 * counted[name], counted[name] / best.seconds
            found.details["best peer"] = name
        without = [name for name, why in failures.items() if why == NO_TIME and peer in (None, name)]
        if without:
            found.why = f"{NO_TIME} for {', '.join(without)}"
        elif not counted:
            found.why = "no peer ran: " + "; ".join(f"{name}: {why}" for name, why in failures.items())

    def search(self, case: Case, is_known: bool = False) -> Candidate:
        """The fastest candidate, measured; its error is kept.

        Args:
            case: a region at a size.
            is_known: nothing is measured that the file has no time of.
        """
        self.left -= 1
        now = time.monotonic()
        seconds = min(max(SEARCHES * (self.end - now) / (self.left + 1), LEAST), MOST)
        ranking = candidates(case.region, self.arch, *case.shape, limit=4 if self.quick else CANDIDATES)
        found, refused = self.tuned(case, ranking, now if is_known else now + seconds)
        if not found or not found[0].measured:
            why = "; ".join(refused[:3]) or "none was measured"
            raise RuntimeError(why if is_known else f"no kernel of {len(ranking)} ran in {seconds:.0f} s: {why}")
        source = found[0].emit(case.region)
        if source.kernel not in self.compiled:  # whose time came out of the file
            self.compiled[source.kernel] = build.compiled_source(source, self.meter.arch)
        error = self.meter.error(case.region, source, self.compiled[source.kernel].cubin)
        self.errors.append(error)
        if not error < TOLERANCE:  # which NaN is not, too
            raise RuntimeError(f"{source.kernel}: its relative error is {error:.2g}")
        return found[0]

    def tuned(self, case: Case, ranking: list[Candidate], deadline: float) -> tuple[list[Candidate], list[str]]:
        """As `tuning.tuned`; where compilers were killed, by new ones."""
        how: dict[str, Any] = {"arch": self.meter.arch, "deadline": deadline, "cache": self.cache}
        how |= {"compiled": self.compiled}
        try:
            return tuning.tuned(case.region, ranking, case.shape, self.meter, executor=self.pool, **how)
        except ConversionError as err:
            if not isinstance(err.__cause__, BrokenExecutor):
                raise
        self.pool = self.exits.enter_context(self.compilers())
        return tuning.tuned(case.region, ranking, case.shape, self.meter, executor=self.pool, **how)

    def fresh(self, case: Case, best: Candidate) -> list[float]:
        """Seconds of a kernel that a search found, which that has no part in."""
        source = best.emit(case.region)
        cubin = self.compiled[source.kernel].cubin
        found: list[float] = self.meter.seconds(case.region, source, cubin, case.shape, FRESH)
        return found

    def peers(self, case: Case) -> tuple[dict[str, float], dict[str, str]]:
        """Seconds of each peer, and why others have none."""
        found, failures = {}, {}
        arrays = [*case.region.input_shapes(*case.shape), case.region.output_shape(*case.shape)]
        count = turns(2 * sum(map(prod, arrays)), self.meter.device.cache_bytes)
        for name, run in self.runs.items():
            start, layers = time.monotonic(), len(case.region.layers)
            if self.end - start < self.took.get(name, 0.0) * layers + LEAST * self.left:
                failures[name] = NO_TIME
                continue
            try:
                value = run(case.region, case.shape, count)
            except Exception as err:  # a peer that cannot is no reason to measure nothing
                failures[name] = _line(err)
                print(f"{case.label}: {name}: {failures[name]}", file=sys.stderr, flush=True)
                continue
            finally:
                self.took[name] = (time.monotonic() - start) / layers
            if value is not None:
                found[name] = value
        return found, failures

    def whole(self, case: Case, found: Found) -> Row:
        """The first network from its bundle to an array of PyTorch: a graph's replay, and plain calls."""
        if found.candidate is None:
            return replace(WHOLE, why=found.failed)
        try:
            code = self.compiled[found.candidate.emit(case.region).kernel].cubin
            bundle = _bundle(case.region, found.candidate, self.meter.arch, code)
            replay, call = _runner_seconds(bundle, self.meter.device, case.shape)
        except Exception as err:
            return replace(WHOLE, why=_line(err))
        return replace(WHOLE, ours=1000 * replay, details={"a call that makes its output, ms": 1000 * call})


@dataclass
class Found:
    """What a case gave: milliseconds of ours and of the peer that counts, and why one of them is missing."""

    candidate: Candidate | None = None
    searched: float = 0.0
    ours: float | None = None
    peer: float | None = None
    ratio: float | None = None
    why: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)

    def take(self, times: list[float]) -> None:
        """More seconds of ours, of which the median of all counts."""
        self.times += times
        self.ours = 1000 * statistics.median(self.times)

    @property
    def failed(self) -> str:
        """Why there is no time of ours."""
        return self.why if self.candidate is None else ""


def _line(err: BaseException) -> str:
    text = str(err).strip() or "no reason"
    return f"{type(err).__name__}: {text.splitlines()[0][:200]}"


def _roofline(region: Region, shape: Shape, rate: float) -> float:
    """Seconds in which memory moves inputs, weights and output once."""
    arrays = [*region.input_shapes(*shape), region.output_shape(*shape)]
    return 2 * (sum(map(prod, arrays)) + sum(layer.weights.size for layer in region.layers)) / rate


def _operations(region: Region, shape: Shape) -> int:
    """Products and sums."""
    sizes = region.sizes(*shape[1:])[len(region.channels) :]
    return sum(2 * shape[0] * prod(size) * layer.macs for size, layer in zip(sizes, region.layers, strict=True))


def _bundle(region: Region, best: Candidate, arch: str, code: bytes) -> Bundle:
    """A network of one region, without its meaning in standard operators."""
    from onnx import TensorProto, helper

    from keras_efficient.export.bolt.standard import DOMAIN, FUSED

    source = best.emit(region)
    half = TensorProto.FLOAT16
    x, y = (helper.make_tensor_value_info(name, half, [None] * 4) for name in "xy")
    node = helper.make_node(FUSED, ["x"], ["y"], domain=DOMAIN, spec=spec.written(spec.spec(region)), region=0)
    entry = {"rule": dict(source.rule), "threads": source.threads, "shared_bytes": source.shared_bytes}
    return Bundle(
        helper.make_model(helper.make_graph([node], "network", [x], [y])).SerializeToString(),
        cubins={f"{source.kernel}/{arch}": code},
        weights={"0": source.packed},
        launches={"regions": [source.kernel], "kernels": {source.kernel: entry}},
    )


# ------------------------------------------------------------------------------------------------------------- PyTorch


def _module(region: Region) -> Any:
    """A region in PyTorch: channels-last images in half precision."""
    import torch
    from torch.nn import functional

    def tensor(array: np.ndarray) -> Any:
        return torch.tensor(np.ascontiguousarray(array), dtype=torch.float16, device="cuda")

    weights = [
        tensor(layer.weights[0, 0].T)
        if region.rows
        else tensor(layer.weights.transpose(3, 2, 0, 1)).contiguous(memory_format=torch.channels_last)
        for layer in region.layers
    ]
    biases = [tensor(layer.bias) for layer in region.layers]
    slopes = {
        id(step): tensor(np.broadcast_to(step.slopes, layer.filters))
        for layer in region.layers
        for step in layer.steps
        if isinstance(step, Activate) and step.slopes is not None
    }
    kinds: dict[str, Callable[[Any], Any]] = {
        "relu": functional.relu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "silu": functional.silu,
        "hard_swish": functional.hardswish,
        "softplus": functional.softplus,
    }

    def forward(*inputs: Any) -> Any:
        values = list(inputs)
        for number, layer in enumerate(region.layers):
            x, weight, bias = values[layer.value], weights[number], biases[number]
            if region.rows:
                x = functional.linear(x, weight, bias)
            else:
                x = functional.conv2d(x, weight, bias, stride=layer.stride, padding=layer.padding[:2])
            for step in layer.steps:
                if isinstance(step, Add):
                    x = x + values[step.value]
                elif step.kind == "prelu":
                    x = functional.prelu(x, slopes[id(step)])
                else:
                    x = kinds[step.kind](x)
            values.append(x)
        return functional.pixel_shuffle(values[-1], region.shuffle) if region.shuffle > 1 else values[-1]

    return forward


def _torch_inputs(region: Region, shape: Shape, count: int) -> list[list[Any]]:
    """Sets of inputs; images are N×C×H×W, channels last in memory."""
    import torch

    def drawn(one: tuple[int, ...]) -> Any:
        numbers = torch.randn(one, dtype=torch.float16, device="cuda")
        return numbers if region.rows else numbers.permute(0, 3, 1, 2)

    return [[drawn(one) for one in region.input_shapes(*shape)] for _ in range(count)]


def _torch_seconds(run: Callable[..., Any], sets: list[list[Any]]) -> float:
    """Of one call, in a graph of as many as ours has launches."""
    import torch

    torch.backends.cudnn.benchmark = True
    count = max(LAUNCHES, len(sets))
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for inputs in sets[:3]:
                run(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            # All results are kept: else each one would be written where the one before was, in the L2 cache.
            kept = [run(*sets[number % len(sets)]) for number in range(count)]
        seconds = _event_seconds(graph.replay) / count
        del kept
        return seconds


def _event_seconds(work: Callable[[], None]) -> float:
    """Median of what the GPU takes for `work` on the current stream, as `CudaDevice.timed` does it."""
    import torch

    def event() -> Any:
        made = torch.cuda.Event(enable_timing=True)
        made.record()
        return made

    work()  # which uploads a graph
    begin = event()
    work()
    end = event()
    end.synchronize()
    for _ in range(runtime.warmups(begin.elapsed_time(end) / 1000)):
        work()
    events = [event()]
    for _ in range(ROUNDS):
        work()
        events.append(event())
    events[-1].synchronize()
    return statistics.median(one.elapsed_time(other) / 1000 for one, other in pairwise(events))


def _runner_seconds(bundle: Bundle, device: Any, shape: Shape) -> tuple[float, float]:
    """Of a bundle on arrays of PyTorch: for each of many replays of its graph, and of many calls."""
    import torch

    run, x = runtime.load(bundle, device), torch.rand((*shape, 1), dtype=torch.float16, device="cuda")
    graph, wanted = run.captured(x), run(x)
    graph.replay()
    if not torch.equal(graph.outputs[0], wanted):
        raise RuntimeError("the graph computes something else than the call")

    def often(work: Callable[[], Any]) -> float:
        def several() -> None:
            for _ in range(LAUNCHES):
                work()

        return _event_seconds(several) / LAUNCHES

    return often(graph.replay), often(lambda: run(x))


def _eager(region: Region, shape: Shape, count: int) -> float:
    return _torch_seconds(_module(region), _torch_inputs(region, shape, count))


def _compiled(region: Region, shape: Shape, count: int) -> float:
    import torch

    torch._dynamo.reset()
    # Graphs are captured by ours, so that all are timed alike.
    run = torch.compile(_module(region), mode="max-autotune-no-cudagraphs")
    return _torch_seconds(run, _torch_inputs(region, shape, count))


def _cublas(region: Region, shape: Shape, count: int) -> float | None:
    """cuBLASLt with its own epilogue, for one product with GELU."""
    import torch

    step = region.layers[0].steps[0] if region.layers[0].steps else None
    if not region.rows or len(region.layers) > 1 or getattr(step, "kind", None) != "gelu_tanh":
        return None
    layer = region.layers[0]
    weight = torch.tensor(layer.weights[0, 0], dtype=torch.float16, device="cuda")
    bias = torch.tensor(layer.bias, dtype=torch.float16, device="cuda")
    run = lambda x: torch.ops.aten._addmm_activation(bias, x, weight, use_gelu=True)  # noqa: E731
    return _torch_seconds(run, _torch_inputs(region, shape, count))


# ----------------------------------------------------------------------------------------------------------------- JAX


def _jax_function(region: Region) -> Callable[..., Any]:
    """A region in JAX: N×H×W×C images in half precision."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    kinds: dict[str, Callable[[Any], Any]] = {
        "relu": jax.nn.relu,
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_tanh": jax.nn.gelu,
        "silu": jax.nn.silu,
        "hard_swish": jax.nn.hard_swish,
        "softplus": jax.nn.softplus,
    }
    weights = [jnp.asarray(layer.weights, jnp.float16) for layer in region.layers]
    biases = [jnp.asarray(layer.bias, jnp.float16) for layer in region.layers]

    def forward(*inputs: Any) -> Any:
        values = list(inputs)
        for number, layer in enumerate(region.layers):
            x = values[layer.value]
            if region.rows:
                x = x @ weights[number][0, 0]
            else:
                pads = ((layer.padding[0], layer.padding[2]), (layer.padding[1], layer.padding[3]))
                x = lax.conv_general_dilated(
                    x, weights[number], layer.stride, pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
            x = x + biases[number]
            for step in layer.steps:
                if isinstance(step, Add):
                    x = x + values[step.value]
                elif step.kind == "prelu":
                    x = jnp.where(x > 0, x, x * jnp.asarray(step.slopes, jnp.float16))
                else:
                    x = kinds[step.kind](x)
            values.append(x)
        x = values[-1]
        if region.shuffle > 1:
            n, height, width, channels = x.shape
            block = region.shuffle
            x = x.reshape(n, height, width, block, block, channels // block**2).transpose(0, 1, 3, 2, 4, 5)
            x = x.reshape(n, height * block, width * block, -1)
        return x

    return forward


def _jax(region: Region, shape: Shape, count: int) -> float:
    """Many calls, one behind the other, until all results are there: JAX has no graphs to replay."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # it would take most of the memory
    import jax
    import jax.numpy as jnp

    key, shapes = jax.random.key(0), region.input_shapes(*shape)
    sets = [[jax.random.normal(key, one, jnp.float16) for one in shapes] for _ in range(count)]
    run = jax.jit(_jax_function(region))
    for inputs in sets:
        run(*inputs).block_until_ready()
    times, calls = [], max(5 * LAUNCHES, len(sets))
    for _ in range(ROUNDS + 2):
        start = time.perf_counter()
        found = [run(*sets[number % len(sets)]) for number in range(calls)]
        jax.block_until_ready(found)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times[2:])  # in the first ones clocks go up
