"""MEmCom against the whole table, the other ways to make it small, and the bars of this project.

    python -m benchmarks.memcom [--quick] [--only ranking ratios ranknet keras_io lookup training_step fitting]

Quality is measured on the frozen tables, that is, on what would be stored. `ranking`, `ratios`, and parts of the others
train many models; what is trained is kept in `results/memcom_runs.jsonl` and not trained again, so that a run may be
stopped at any time. Rates are chosen on validation data, by the same short search for every method.
"""

from __future__ import annotations

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


def _scores(dataset: str, options: dict[str, Any], compression: float | None, dim: int = 64) -> list[dict[str, Any]]:
    """The results of all seeds, with the rate that validation prefers."""
    rate = training.best_rate(dataset, options, compression, dim)
    runs = [training.make(dataset, options, compression, dim=dim, rate=rate, seed=seed) for seed in SEEDS]
    return [training.result(run) for run in runs]


def _mean(scores: list[dict[str, Any]], name: str = "ndcg") -> tuple[float, float]:
    """Mean and standard error over seeds."""
    values = [score[name] for score in scores]
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


def _losses(full: list[dict[str, Any]], other: list[dict[str, Any]]) -> tuple[float, float]:
    """Per cent of nDCG lost: mean and standard error over pairs of one seed."""
    lost = [100 * (1 - b["ndcg"] / a["ndcg"]) for a, b in zip(full, other, strict=True)]
    return float(np.mean(lost)), float(np.std(lost, ddof=1) / math.sqrt(len(lost)))


def ranking(quick: bool) -> Iterator[Row]:
    """Gowalla, 16 times fewer bytes of the input embedding: every form of ours, every baseline."""
    if quick:
        return
    full = _scores("gowalla", training.FULL, None)
    mean, error = _mean(full)
    yield Row("nDCG@20 on Gowalla, whole table, float32", round(mean, 5), "", details=_details(full, error=error))
    found = {
        name: _scores("gowalla", options, 16.0) for name, options in {**training.FORMS, **training.BASELINES}.items()
    }
    best = {
        kind: max(names, key=lambda name: _mean(found[name])[0])
        for kind, names in {"ours": training.FORMS, "theirs": training.BASELINES}.items()
    }
    for name, scores in found.items():
        lost, error = _losses(full, scores)
        yield Row(
            f"nDCG@20 lost on Gowalla at 16×: {name}",
            round(lost, 2),
            "%",
            details=_details(scores, error=error, ndcg=_mean(scores)[0]),
        )
    lost, error = _losses(full, found[best["ours"]])
    yield Row(
        f"nDCG@20 lost on Gowalla at 16×, our best form ({best['ours']})",
        round(lost, 2),
        "%",
        bar="≤ 4",
        reached=lost <= 4,
        details={"standard_error": round(error, 2)},
    )
    ours, peer = (_mean(found[best[kind]]) for kind in ("ours", "theirs"))
    yield Row(
        f"nDCG@20 on Gowalla at 16×, our best form against the best baseline ({best['theirs']})",
        round(ours[0], 5),
        "",
        peer=round(peer[0], 5),
        ratio=round(ours[0] / peer[0], 4),
        bar="ahead",
        reached=ours[0] > peer[0],
        why="" if ours[0] > peer[0] else f"{best['theirs']} won",
        details={"standard_errors": [round(ours[1], 5), round(peer[1], 5)]},
    )


def _details(scores: list[dict[str, Any]], **more: float) -> dict[str, Any]:
    keep = ("ndcg", "recall", "ratio", "nbytes", "size", "seconds")
    return {
        **{name: round(value, 5) for name, value in more.items()},
        "rate": scores[0]["run"]["rate"],
        "epochs": scores[0]["run"]["epochs"],
        "seeds": [{name: round(score[name], 5) for name in keep} for score in scores],
    }


DATASETS = ("gowalla", "amazon-beauty", "ml-1m-implicit")
RATIOS = {4: 64, 12: 64, 16: 64, 40: 128}  # the paper's, with the width of the vectors


def ratios(quick: bool) -> Iterator[Row]:
    """The paper's four ratios on three sets, in our form and in the paper's."""
    if quick:
        return
    losses: dict[str, list[float]] = {"ours": [], "paper": []}
    for dataset, (ratio, dim) in itertools.product(DATASETS, RATIOS.items()):
        full = _scores(dataset, training.FULL, None, dim)
        for kind, options in (("ours", training.ours_at(dataset, ratio, dim)), ("paper", training.PAPER)):
            scores = _scores(dataset, options, float(ratio), dim)
            lost, error = _losses(full, scores)
            losses[kind].append(lost)
            name = "our form" if kind == "ours" else "MEmCom as published"
            yield Row(
                f"nDCG@20 lost on {dataset} at {ratio}×, d = {dim}: {name}",
                round(lost, 2),
                "%",
                details=_details(scores, error=error, full=_mean(full)[0]),
            )
    for kind, name in (("ours", "our form"), ("paper", "MEmCom as published")):
        mean = float(np.mean(losses[kind]))
        bar = {"bar": "≤ 4", "reached": mean <= 4} if kind == "ours" else {}
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
        ours, peer = found["ms"]["ours"], found["ms"]["peer"]
        yield Row(
            f"training step, Adam, 1,000,000 × 64, 256 × 64 ids, model.fit, {backend}: MEmCom 16× against Embedding",
            round(ours, 1),
            "ms",
            peer=round(peer, 1),
            ratio=round(ours / peer, 3),
            bar="≤ 1×",
            reached=ours <= peer,
        )
        if backend == "tensorflow":
            ours, peer = (found["bytes"][name] / 1e6 for name in ("ours", "peer"))
            yield Row(
                "weights and optimizer at 1,000,000 × 64: MEmCom 16× against Embedding",
                round(ours, 1),
                "MB",
                peer=round(peer, 1),
                ratio=round(ours / peer, 4),
                bar="≤ 1/8",
                reached=ours <= peer / 8,
            )


def fitting(quick: bool) -> Iterator[Row]:
    """`from_embedding` on a trained table: as it is, after one epoch, and against training from scratch."""
    if quick:
        return
    for name, options in {"our form": training.OURS, "MEmCom as published": training.PAPER}.items():
        found = [training.fitted(training.make("gowalla", options, 16.0, seed=seed)) for seed in SEEDS]
        full = [result["full"] for result in found]
        scratch = _scores("gowalla", options, 16.0)
        for stage in ("fitted", "one_epoch"):
            lost = [100 * (1 - result[stage] / whole) for result, whole in zip(found, full, strict=True)]
            behind = float(np.mean(lost)) - _losses(_scores("gowalla", training.FULL, None), scratch)[0]
            bar = {"bar": "≤ 2 points behind from scratch", "reached": behind <= 2} if stage == "one_epoch" else {}
            label = "no training" if stage == "fitted" else "one epoch"
            yield Row(
                f"nDCG@20 lost on Gowalla at 16× by from_embedding, {label}: {name}",
                round(float(np.mean(lost)), 2),
                "%",
                details={"behind_from_scratch": round(behind, 2), "seeds": [round(x, 2) for x in lost]},
                **(bar if name == "our form" else {}),
            )


SECTIONS = {
    "ranking": ranking,
    "ratios": ratios,
    "ranknet": ranknet,
    "keras_io": keras_io,
    "lookup": lookup,
    "training_step": training_step,
    "fitting": fitting,
}


if __name__ == "__main__":
    harness.main("memcom", SECTIONS)
