"""Curves of accuracy over bytes: how many bytes a way of coding needs for a server's network to see as well.

::

    clip = video.Clip(video.Video.open("road.mp4"))
    found = video.evaluate(server, clip, video.coding_schemes(["uniform", "defaults", "camera"], server, model))
    video.saving(found.curve("camera"), found.curve("defaults"), [0.8, 0.85, 0.9, 0.95])
"""

from __future__ import annotations

import bisect
import hashlib
import json
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from keras_efficient.atomic import replacing
from keras_efficient.errors import FileProblem, UnknownName, WrongArgument
from keras_efficient.video.accuracy import Measure, measures_of
from keras_efficient.video.frames import rgb
from keras_efficient.video.labels import DAMAGED
from keras_efficient.video.schemes import Clip, Scheme, uniform

__all__ = ["Comparison", "Curve", "Evaluation", "Point", "Saving", "drawn", "evaluate", "isotonic", "saving"]

FEWEST_BLOCKS = 4  # of a bootstrap


@dataclass(frozen=True, eq=False)
class Point:
    """A clip coded in one way at one setting.

    Attributes:
        setting: of the scheme.
        sizes, out_at, encoding, looking, passes: as of `Coded`.
        serving: seconds that the server takes for a frame: the median of a coding's, or of all codings', kept ones too.
        sums: of each measure, (evaluated frames, m).
    """

    setting: float
    sizes: np.ndarray
    out_at: np.ndarray
    encoding: float
    looking: float
    passes: int
    serving: float
    sums: dict[str, np.ndarray]

    @property
    def bytes(self) -> int:
        return int(self.sizes.sum())


@dataclass(frozen=True, eq=False)
class Curve:
    """What accuracy costs.

    Attributes:
        amounts: (points,) bytes of a clip.
        sums: (points, frames, m) of a measure.
        measure: what turns sums into an accuracy.
    """

    amounts: np.ndarray
    sums: np.ndarray
    measure: Measure

    def accuracies(self, weights: np.ndarray | None = None) -> np.ndarray:
        """(points,), or (…, points) where each frame counts as often as (…, frames) says."""
        sums = self.sums.sum(axis=1) if weights is None else np.einsum("...f,pfm->...pm", weights, self.sums)
        return self.measure.accuracy(sums)

    def fitted(self, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Amounts from the least on, and accuracies that never fall."""
        order = np.argsort(self.amounts, kind="stable")
        return self.amounts[order], isotonic(self.accuracies(weights)[order])

    def bytes_at(self, accuracy: float, weights: np.ndarray | None = None) -> float | None:
        """The least amount that reaches an accuracy, between points by the logarithm; `None` beyond its ends."""
        return _reached(*self.fitted(weights), accuracy)


def _reached(amounts: np.ndarray, accuracies: np.ndarray, accuracy: float) -> float | None:
    index = int(np.searchsorted(accuracies, accuracy - 1e-12))
    if index == len(accuracies) or (index == 0 and accuracies[0] > accuracy + 1e-12):
        return None
    if index == 0:
        return float(amounts[0])
    low, high = accuracies[index - 1 : index + 1]
    start, end = np.log(amounts[index - 1 : index + 1])
    return float(np.exp(start + (end - start) * (accuracy - low) / (high - low)))


def isotonic(values: np.ndarray) -> np.ndarray:
    """The nearest values, by least squares, that never fall: neighbours that do are pooled."""
    pools: list[tuple[float, int]] = []
    for value in np.asarray(values, float).tolist():
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            (first, count), (second, more) = pools[-2:]
            pools[-2:] = [((first * count + second * more) / (count + more), count + more)]
    return np.concatenate([np.full(count, value) for value, count in pools])


@dataclass(frozen=True)
class Saving:
    """How much less a curve needs than a baseline: 0.3 is 30 % less, below 0 is more.

    Attributes:
        accuracy: at which they are compared; `None`: the mean over several.
        value: `None` where one of them does not reach the accuracy.
        low, high: 95 % of the draws lie between; `None` where fewer than half of them have a value, and where there are
            fewer than 4 blocks to draw from.
    """

    accuracy: float | None
    value: float | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "–"
        span = "" if self.low is None else f" [{100 * self.low:.0f}, {100 * (self.high or 0):.0f}]"
        return f"{100 * self.value:.1f} %{span}"


@dataclass(frozen=True)
class Comparison:
    """A curve against a baseline.

    Attributes:
        at: a saving for each accuracy asked for.
        mean: over those that both reach, by the logarithm.
        highest: at the highest accuracy that both reach, though no higher than the highest asked for.
    """

    at: list[Saving]
    mean: Saving
    highest: Saving


def saving(
    curve: Curve, baseline: Curve, accuracies: Sequence[float], *, draws: int = 200, block: int = 10, seed: int = 0
) -> Comparison:
    """What a curve saves at equal accuracy.

    ```
    saving = 1 − amount of the curve / amount of the baseline
    ```

    The interval is that of a bootstrap: blocks of frames are drawn with replacement, the same for both curves, and
    each curve is fitted anew to the accuracies of what was drawn. Amounts stay those of the whole clip.

    Args:
        curve, baseline: of the same frames.
        accuracies: from 0 to 1.
        draws: of the bootstrap.
        block: evaluated frames that are drawn together, since neighbours look alike.
        seed: of the draws.

    Raises:
        WrongArgument: curves of different numbers of frames, no accuracies.
    """
    frames = curve.sums.shape[1]
    if not len(accuracies) or frames != baseline.sums.shape[1]:
        raise WrongArgument(f"Curves of {frames} and {baseline.sums.shape[1]} frames, {len(accuracies)} accuracies.")
    highest = min(max(accuracies), *(float(one.fitted()[1][-1]) for one in (curve, baseline)))
    wanted = [*accuracies, highest]
    weights = [None, *drawn(frames, draws, block, seed)]
    logs = np.array([_differences(curve, baseline, wanted, some) for some in weights])  # (1 + draws, wanted)
    # Where the curves themselves meet; a draw may lack some of these.
    shared = np.ma.masked_invalid(logs[:, :-1][:, ~np.isnan(logs[0, :-1])])
    means = shared.mean(axis=1).filled(np.nan) if shared.size else logs[:, 0]
    found = [_saving(accuracy, column) for accuracy, column in zip(wanted, logs.T, strict=True)]
    return Comparison(found[:-1], _saving(None, means), found[-1])


def drawn(frames: int, draws: int = 200, block: int = 10, seed: int = 0) -> np.ndarray:
    """(draws, frames): how often each frame was drawn; no draws from too few blocks, which would look too sure."""
    blocks = np.arange(frames) // block
    count = blocks[-1] + 1
    draws = draws if count >= FEWEST_BLOCKS else 0
    picked = np.random.default_rng(seed).integers(count, size=(draws, count))
    times = np.stack([np.bincount(row, minlength=count) for row in picked]) if draws else np.zeros((0, count), int)
    found: np.ndarray = times[:, blocks].astype(float)
    return found


def _differences(curve: Curve, baseline: Curve, accuracies: Sequence[float], weights: Any) -> list[float]:
    """Logarithms of the ratio of amounts; not a number where one does not reach an accuracy."""
    fits = [one.fitted(weights) for one in (curve, baseline)]
    found = []
    for accuracy in accuracies:
        ours, theirs = (_reached(*fit, accuracy) for fit in fits)
        found.append(np.nan if ours is None or theirs is None else float(np.log(ours / theirs)))
    return found


def _saving(accuracy: float | None, logs: np.ndarray) -> Saving:
    value, draws = logs[0], logs[1:][~np.isnan(logs[1:])]
    if np.isnan(value):
        return Saving(accuracy, None)
    if len(draws) < max(len(logs) - 1, 1) / 2:
        return Saving(accuracy, float(1 - np.exp(value)))
    low, high = 1 - np.exp(np.percentile(draws, [97.5, 2.5]))
    return Saving(accuracy, float(1 - np.exp(value)), float(low), float(high))


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A clip, coded in several ways, as a server sees it.

    Attributes:
        clip: what was coded.
        every: one frame in so many was evaluated.
        reference: the QP of the reference, or `None`: the clip itself.
        measures: the first one decides.
        schemes: that were tried.
        points: of each scheme, by its name, in the order of its settings.
    """

    clip: Clip
    every: int
    reference: float | None
    measures: list[Measure]
    schemes: list[Scheme]
    points: dict[str, list[Point]]

    @property
    def seconds(self) -> float:
        """Of the clip."""
        return float(len(next(iter(self.points.values()))[0].sizes) / self.clip.video.rate)

    def curve(self, scheme: str, measure: Measure | None = None) -> Curve:
        """Of a scheme, by one of the measures.

        Raises:
            UnknownName: the scheme was not tried.
        """
        if scheme not in self.points:
            raise UnknownName("scheme", scheme, self.points)
        points, measure = self.points[scheme], measure or self.measures[0]
        amounts = np.array([point.bytes for point in points], float)
        return Curve(amounts, np.stack([point.sums[measure.name] for point in points]), measure)

    def cost(self, scheme: str, accuracy: float, of: Callable[[Point], float]) -> float | None:
        """What a scheme costs, such as a delay, where its bytes just reach an accuracy; `None`: they do not."""
        needed = self.curve(scheme).bytes_at(accuracy)
        if needed is None:
            return None
        points = sorted(self.points[scheme], key=lambda point: point.bytes)
        return float(np.interp(np.log(needed), np.log([point.bytes for point in points]), [of(one) for one in points]))


def evaluate(
    server: Any,
    clip: Clip,
    schemes: Sequence[Scheme],
    *,
    every: int = 1,
    reference: float | None = 30,
    between: tuple[float, float] | None = None,
    folder: Path | None = None,
    name: str = "",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Codes a clip in several ways, and asks the server what it still sees.

    Args:
        server: whose results are compared with its own on the reference; judged by `accuracy.measures_of`.
        clip: a video or its beginning.
        schemes: ways of coding, each tried at all of its settings, which go from good to bad.
        every: the server looks at one frame in so many.
        reference: QP of the reference, one everywhere; `None`: the clip itself.
        between: accuracies that matter: settings farther off are left out.
        folder: where results are kept; those that are there are not made again.
        name: of the server, which tells its results from another's; needed with `folder`.
        on_progress: called with (settings done, in all).

    Raises:
        FileProblem: the clip, or a kept result, cannot be read.
        WrongArgument: no scheme, two of one name, `every` below 1, a folder without the server's name, a server that
            nobody knows how to judge.
    """
    names = [scheme.name for scheme in schemes]
    if not names or len(set(names)) < len(names) or every < 1:
        raise WrongArgument(f"Schemes must differ by name, and `every` be 1 or more: {names}, {every}.")
    if folder is not None and not name:
        raise WrongArgument("Give the server's name= with folder=: results there are told apart by it.")
    measures = measures_of(server)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    hangs_on = [_digest(clip.video.path), clip.frames, every, reference, name, [repr(one) for one in measures]]

    @cache  # made when it is needed: all may be kept
    def wanted() -> list[Any]:
        return _results(server, map(rgb, clip) if reference is None else uniform(clip, reference), every)[0]

    def tried(scheme: Scheme, setting: float) -> Point:
        key = hashlib.sha256(json.dumps([*hangs_on, scheme.name, scheme.about, scheme.key, setting]).encode())
        kept = None if folder is None else folder / f"{key.hexdigest()[:32]}.npz"
        if kept is not None and kept.exists():
            return _read(kept, setting, measures)
        point = _point(server, clip, scheme, setting, every, measures, wanted())
        if kept is not None:
            _write(kept, point)
        return point

    points: dict[str, list[Point]] = {}
    done, total = 0, sum(len(scheme.settings) for scheme in schemes)
    for scheme in schemes:
        curve = _Tried(scheme, measures[0], tried, partial(_tell, on_progress, done, total))
        points[scheme.name] = curve.points(between)
        done += len(scheme.settings)
    on_progress(total, total)
    # How long a network takes does not hang on how its frames were coded: what differs is how busy the machine was.
    serving = float(np.median([point.serving for curve in points.values() for point in curve]))
    points = {name: [replace(point, serving=serving) for point in curve] for name, curve in points.items()}
    return Evaluation(clip, every, reference, measures, list(schemes), points)


def _tell(on_progress: Callable[[int, int], None], before: int, total: int, count: int) -> None:
    on_progress(before + count, total)


class _Tried:
    """The settings of a scheme, each tried when it is needed."""

    def __init__(
        self,
        scheme: Scheme,
        measure: Measure,
        tried: Callable[[Scheme, float], Point],
        on_progress: Callable[[int], None],
    ):
        self._scheme, self._measure, self._tried, self._on_progress = scheme, measure, tried, on_progress
        self._points: dict[int, Point] = {}

    def points(self, between: tuple[float, float] | None) -> list[Point]:
        """All, or those whose accuracy lies between two, and two on each side: it does not quite fall with each."""
        count = len(self._scheme.settings)
        begin, end = (0, count) if between is None else map(self._first_below, reversed(between))
        for index in range(max(begin - 2, 0), min(end + 2, count)):
            self._point(index)
        return [self._points[index] for index in sorted(self._points)]

    def _first_below(self, accuracy: float) -> int:
        return bisect.bisect_left(range(len(self._scheme.settings)), True, key=lambda i: self._accuracy(i) < accuracy)

    def _accuracy(self, index: int) -> float:
        return float(self._measure.accuracy(self._point(index).sums[self._measure.name].sum(axis=0)))

    def _point(self, index: int) -> Point:
        if index not in self._points:
            self._on_progress(len(self._points))
            self._points[index] = self._tried(self._scheme, self._scheme.settings[index])
        return self._points[index]


def _point(
    server: Any, clip: Clip, scheme: Scheme, setting: float, every: int, measures: list[Measure], wanted: list[Any]
) -> Point:
    coded = scheme.code(clip, setting)
    found, serving = _results(server, coded.pictures(), every)
    if len(found) != len(wanted):
        raise WrongArgument(f"Scheme {scheme.name!r} gives {len(found)} frames of {len(wanted)} to be evaluated.")
    sums = {one.name: np.stack([one.sums(*both) for both in zip(wanted, found, strict=True)]) for one in measures}
    return Point(
        setting, coded.sizes, coded.out_at, coded.encoding, coded.looking, coded.passes, float(np.median(serving)), sums
    )


def _results(server: Any, pictures: Any, every: int) -> tuple[list[Any], list[float]]:
    """What the server finds in each frame that it looks at, and how long that took."""
    found, seconds = [], []
    for number, picture in enumerate(pictures):
        if number % every == 0:
            begun = time.perf_counter()
            found += server.predict(picture[None])
            seconds.append(time.perf_counter() - begun)
    return found, seconds


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_NUMBERS = ("encoding", "looking", "passes", "serving")


def _write(path: Path, point: Point) -> None:
    with replacing(path, overwrite=True) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            sizes=point.sizes,
            out_at=point.out_at,
            numbers=np.array([getattr(point, name) for name in _NUMBERS], float),
            **{f"sums{index}": sums for index, sums in enumerate(point.sums.values())},  # type: ignore[arg-type]
        )


def _read(path: Path, setting: float, measures: list[Measure]) -> Point:
    try:
        with np.load(path, allow_pickle=False) as file:
            sums = {measure.name: file[f"sums{index}"] for index, measure in enumerate(measures)}
            encoding, looking, passes, serving = file["numbers"].tolist()
            return Point(setting, file["sizes"], file["out_at"], encoding, looking, int(passes), serving, sums)
    except (*DAMAGED, zlib.error) as error:
        raise FileProblem(path, "is damaged.", hint="Remove it: it will be made again.") from error
