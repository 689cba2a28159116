"""MEmCom against the whole table, the other ways to make it small, and the bars of this project.

    python -m benchmarks.memcom [--quick] [--only SECTION …]      SECTION: ranking, slow_baselines, hundredfold, ratios,
                                                                  ranknet, keras_io, lookup, training_step, fitting

Quality is measured on the frozen tables, that is, on what would be stored. The first four sections and `fitting` train
many models; what is trained is kept in `results/memcom_runs.jsonl` and not trained again, so that a run may be stopped
at any time. Rates, and whether to train at all after a fit, are chosen on validation data, alike for every method.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np

from benchmarks import harness
from benchmarks import memcom_training as training
from benchmarks.harness import Row

SEEDS = (0, 1, 2)
SEEDS_OF = {"deep hash": SEEDS[:2]}  # a training takes a quarter of an hour, and it loses half


def _wholes(dataset: str, dim: int) -> list[dict[str, Any]]:
    """The results of the whole table, for all seeds."""
    return _scores(training.reference(dataset, dim))


def _scores(run: training.Run, scale: float | None = None, seeds: tuple[int, ...] = SEEDS) -> list[dict[str, Any]]:
    """The test results of what was chosen on validation, by seed; with another factor of histories than that."""
    runs = [training.tested(run, seed) for seed in seeds]
    return [training.result(run if scale is None else dataclasses.replace(run, scale=scale)) for run in runs]


def _mean(values: list[float]) -> tuple[float, float]:
    """Mean and standard error over seeds."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


def _lost(full: list[dict[str, Any]], other: list[dict[str, Any]]) -> tuple[float, float]:
    """Per cent of nDCG lost: mean and standard error over pairs of one seed."""
    return _mean([100 * (1 - b["ndcg"] / a["ndcg"]) for a, b in zip(full, other, strict=True)])


def _gain(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> tuple[float, float]:
    """Per cent of nDCG gained: mean and standard error over pairs of one seed."""
    return _mean([100 * (a["ndcg"] / b["ndcg"] - 1) for a, b in zip(ours, theirs, strict=True)])


def _row(what: str, run: training.Run, full: list[dict[str, Any]], seeds: tuple[int, ...] = SEEDS, **more: Any) -> Row:
    """What a method loses."""
    scores = _scores(run, seeds=seeds)
    lost, error = _lost(full[: len(seeds)], scores)
    return Row(f"nDCG@20 lost on {what}", round(lost, 2), "%", details=_details(run, scores, error=error), **more)


def _details(run: training.Run, scores: list[dict[str, Any]], **more: float) -> dict[str, Any]:
    keep = ("ndcg", "ndcg_error", "recall", "seconds")
    start = "fitted to the trained whole table" if run.fitted else "random weights"
    return {
        **{name: round(value, 5) for name, value in more.items()},
        **{name: scores[0][name] for name in ("ratio", "nbytes", "size", "users", "scale")},
        "start": start,
        "epochs": run.epochs,
        "rate": run.rate,
        "decay": run.decay,
        "validation": round(training.result(run)["ndcg"], 5),
        "commits": sorted({score.get("commit", "before b7449e9") for score in scores}),
        "seeds": [{name: round(score[name], 5) for name in keep} for score in scores],
    }


def ranking(quick: bool) -> Iterator[Row]:
    """Gowalla, 16 times fewer bytes of the input embedding: every form of ours, the baselines."""
    if quick:
        return
    full = _wholes("gowalla", 64)
    mean, error = _mean([score["ndcg"] for score in full])
    plain, _ = _mean([score["ndcg"] for score in _scores(training.whole("gowalla", 64))])
    details = _details(training.reference("gowalla", 64), full, error=error, **{"without further epochs": plain})
    yield Row("nDCG@20 on Gowalla, whole table, float32, d = 64", round(mean, 5), "", details=details)
    methods = {**training.FORMS, **training.BASELINES}
    runs = {name: training.tuned("gowalla", options, 16.0) for name, options in methods.items()}
    for name, run in runs.items():
        yield _row(f"Gowalla at 16×: {name}", run, full)
    yield from _winner(16, full, runs)


def slow_baselines(quick: bool) -> Iterator[Row]:
    """The same of methods that compute much for a vector."""
    if quick:
        return
    for name, options in training.SLOW_BASELINES.items():
        run, seeds = training.tuned("gowalla", options, 16.0), SEEDS_OF.get(name, SEEDS)
        yield _row(f"Gowalla at 16×: {name}", run, _wholes("gowalla", 64), seeds)


def _winner(ratio: int, full: list[dict[str, Any]], runs: dict[str, training.Run]) -> Iterator[Row]:
    """Our best form and the best baseline, both chosen on validation; a difference within its noise is a tie."""
    best = {
        ours: max((n for n in runs if (n in training.FORMS) == ours), key=lambda n: training.result(runs[n])["ndcg"])
        for ours in (True, False)
    }
    ours, theirs = (_scores(runs[best[key]]) for key in (True, False))
    lost, error = _lost(full, ours)
    bar = {"bar": "≤ 4", "reached": bool(lost <= 4)}
    what = f"nDCG@20 lost on Gowalla at {ratio}×, our best form ({best[True]})"
    yield Row(what, round(lost, 2), "%", details={"standard_error": round(error, 2)}, **bar)
    means = [_mean([score["ndcg"] for score in scores]) for scores in (ours, theirs)]
    gain, error = _gain(ours, theirs)
    # What a factor gains differs between validation and test: does the order hang on which one was chosen for whom?
    equal = {scale: _gain(*(_scores(runs[best[key]], scale) for key in (True, False))) for scale in (0.8, 1.0)}
    ahead = gain > 2 * error
    verdict = "" if ahead else f"{best[False]} won" if gain < -2 * error else "a tie"
    yield Row(
        f"nDCG@20 on Gowalla at {ratio}×, our best form against the best baseline ({best[False]})",
        round(means[0][0], 5),
        "",
        peer=round(means[1][0], 5),
        ratio=round(means[0][0] / means[1][0], 4),
        details={
            "gain_percent": round(gain, 2),
            "standard_error": round(error, 2),
            "with one factor for both": {str(scale): [round(x, 2) for x in found] for scale, found in equal.items()},
            "ours_ratio": round(ours[0]["ratio"], 4),
            "peer_ratio": round(theirs[0]["ratio"], 4),
        },
        bar="ahead",
        reached=bool(ahead),
        why=verdict and f"{verdict}: {gain:+.2f} ± {error:.2f} %",
    )


def hundredfold(quick: bool) -> Iterator[Row]:
    """Gowalla at 100×: what the form of `lookup`'s smallest file loses."""
    if quick:
        return
    name = "MEmCom, int8 rows, int8 scalar"
    run = training.tuned("gowalla", training.FORMS[name], 100.0, 128)
    yield _row(f"Gowalla at 100×, d = 128: {name}", run, _wholes("gowalla", 128))


DATASETS = ("ml-1m-implicit", "gowalla", "amazon-beauty")
RATIOS = {4: 64, 12: 64, 16: 64, 40: 128}  # the paper's, with the width of the vectors


def ratios(quick: bool) -> Iterator[Row]:
    """The paper's four ratios on three sets, in our form and in the paper's."""
    if quick:
        return
    losses: dict[str, list[float]] = {"our form": [], "MEmCom as published": []}
    for dataset, (ratio, dim) in itertools.product(DATASETS, RATIOS.items()):
        full = _wholes(dataset, dim)
        for name in losses:
            options = training.ours_at(dataset, ratio, dim) if name == "our form" else training.PAPER
            run = training.tuned(dataset, options, float(ratio), dim)
            losses[name].append(_lost(full, _scores(run))[0])
            label = ", ".join(f"{key} {value}" for key, value in options.items())
            yield _row(f"{dataset} at {ratio}×, d = {dim}: {name} ({label})", run, full)
    for name, values in losses.items():
        mean = float(np.mean(values))
        bar = {"bar": "≤ 4", "reached": mean <= 4} if name == "our form" else {}
        yield Row(f"mean nDCG@20 lost over 4×, 12×, 16×, 40× and three sets: {name}", round(mean, 2), "%", **bar)


def ranknet(quick: bool) -> Iterator[Row]:
    """RankNet on pairs of ML-100k ratings at 32×."""
    from benchmarks import memcom_ratings

    yield from memcom_ratings.ranknet(SEEDS[:1] if quick else SEEDS)


def keras_io(quick: bool) -> Iterator[Row]:
    """The recipe of keras.io on ML-100k, ours beside it."""
    from benchmarks import memcom_ratings

    yield from memcom_ratings.keras_io(SEEDS[:1] if quick else SEEDS)


def lookup(quick: bool) -> Iterator[Row]:
    """64 ids + mean of 480,000 × 128 in LiteRT; a process of its own for each file's memory."""
    from benchmarks import memcom_lookup

    yield from memcom_lookup.rows(rounds=300 if quick else 3000)


def training_step(quick: bool) -> Iterator[Row]:
    """A step of Adam at a million entities, and what is kept for it, in a process for each backend."""
    for backend in ("tensorflow", "jax"):
        command = [sys.executable, "-m", "benchmarks.memcom_step", "--rounds", "3" if quick else "15"]
        environment = {**os.environ, "KERAS_BACKEND": backend}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        found = json.loads(done.stdout.splitlines()[-1])
        for form in ("scaled", "subspace", "codebooks"):
            barred = form == "scaled"  # the form that is trained from nothing
            ours, peer = found["ms"][form], found["ms"]["peer"]
            yield Row(
                f"training step, Adam, 1,000,000 × 64, 256 × 64 ids, model.fit, {backend}: "
                f"MEmCom 16×, {form}, against Embedding",
                round(ours, 1),
                "ms",
                peer=round(peer, 1),
                ratio=round(ours / peer, 3),
                **({"bar": "≤ 1×", "reached": ours <= peer} if barred else {}),
            )
            if backend == "tensorflow":
                ours, peer = (found["bytes"][name] / 1e6 for name in (form, "peer"))
                yield Row(
                    f"weights and optimizer at 1,000,000 × 64: MEmCom 16×, {form}, against Embedding",
                    round(ours, 1),
                    "MB",
                    peer=round(peer, 1),
                    ratio=round(ours / peer, 4),
                    **({"bar": "≤ 1/8", "reached": ours <= peer / 8} if barred else {}),
                )


def fitting(quick: bool) -> Iterator[Row]:
    """`from_embedding` on a trained table: as it is, after one epoch, and against training from nothing."""
    if quick:
        return
    full, run = _wholes("gowalla", 64), training.whole("gowalla", 64)
    longer = training.result(dataclasses.replace(run, epochs=2 * run.epochs))["ndcg"]
    yield Row(
        f"nDCG@20 on Gowalla's validation part, whole table: {2 * run.epochs} epochs against {run.epochs}",
        round(longer, 5),
        "",
        peer=round(training.result(run)["ndcg"], 5),
        ratio=round(longer / training.result(run)["ndcg"], 4),
    )
    for name in training.FROM_NOTHING:
        options = {**training.FORMS, **training.BASELINES}[name]
        run = training.from_nothing("gowalla", options, 16.0)
        yield _row(f"Gowalla at 16×, trained from nothing: {name}", run, full)
        scratch, _ = _lost(full, _scores(run))
        for epochs in (0, 1):
            run = training.fitted("gowalla", options, 16.0, epochs)
            lost, error = _lost(full, _scores(run))
            ours = epochs == 1 and options == training.SUBSPACE
            bar = {"bar": "≤ 2 points behind", "reached": lost - scratch <= 2} if ours else {}
            yield Row(
                f"nDCG@20 lost on Gowalla at 16× by from_embedding and {('no', 'one')[epochs]} epoch: {name}",
                round(lost, 2),
                "%",
                peer=round(scratch, 2),
                details={"peer": "trained from nothing", "standard_error": round(error, 2)},
                **bar,
            )


SECTIONS = {
    "ranking": ranking,
    "slow_baselines": slow_baselines,
    "hundredfold": hundredfold,
    "ratios": ratios,
    "ranknet": ranknet,
    "keras_io": keras_io,
    "lookup": lookup,
    "training_step": training_step,
    "fitting": fitting,
}


if __name__ == "__main__":
    harness.main("memcom", SECTIONS)
