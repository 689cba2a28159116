"""What `keras-efficient video evaluate` does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keras_efficient.atomic import check_target, replacing
from keras_efficient.cli.output import out
from keras_efficient.errors import FileProblem

__all__ = ["run"]

USUAL = ("uniform", "defaults", "aq")
OF_BOXES = ("boxes", "vigil", "eaar")
NO_SHARED = "the clip is too easy for the network, or too hard, or --frames are too few."
DRAWN = ("defaults", "camera")  # of which frames are shown


def run(
    server: Any,
    files: Sequence[Path],
    clips: Sequence[Path],
    model: Any,
    names: Sequence[str] | None,
    folder: Path,
    *,
    coding: dict[str, Any],
    link: dict[str, Any],
    every: int,
    frames: int | None,
    reference: float | None,
    force: bool,
) -> None:
    """Evaluates clips and writes `evaluation.json` and `evaluation.html`.

    Args:
        server: with its files, which tell its kept results from another's.
        files: of the server.
        clips: paths of videos.
        model: of a camera, or `None`.
        names: of schemes; `None`: without knowledge of the network, with its boxes where it has some, the model's.
        folder: is made where there is none.
        coding: arguments of `video.coding_schemes`.
        link: arguments of `video.Link`.
        every, reference: of `video.evaluate`.
        frames: of each clip.
        force: whether files may be replaced.
    """
    from keras_efficient import video
    from keras_efficient.video import report

    opened = [video.Clip(video.Video.open(path), frames) for path in clips]
    if not names:
        names = [
            *USUAL,
            *(OF_BOXES if isinstance(server, video.DetectionServer | video.KeypointServer) else ()),
            *(("camera", "camera-short") if model is not None else ()),
        ]
    schemes = video.coding_schemes(names, server, model, **coding)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileProblem(folder, f"cannot be made: {error.strerror}.") from error
    targets = [check_target(folder / f"evaluation.{suffix}", overwrite=force) for suffix in ("json", "html")]
    # One file answers in other ways for another task, or when it is given frames in another way.
    who = [
        type(server).__name__,
        server.preprocessing,
        *(hashlib.sha256(path.read_bytes()).hexdigest() for path in files),
    ]
    speed, shown = video.Link(**link), [name for name in DRAWN if name in names] or [names[-1]]
    pages, numbers = [], []
    for clip in opened:
        with out.progress(clip.video.path.name) as show, out.hushed():
            options: dict[str, Any] = {
                "every": every,
                "reference": reference,
                "between": report.BETWEEN,
                "folder": folder / "kept",
                "name": str(who),
            }
            found = video.evaluate(server, clip, schemes, on_progress=show, **options)
        numbers.append(report.summary(found, speed))
        drawn = {name: report.shown(server, found, name) for name in shown}
        pages.append((found, numbers[-1], drawn))
    page = report.page(pages, speed, "Video coding for a server's network")
    for target, text in zip(targets, (json.dumps(numbers, indent=1, allow_nan=False), page), strict=True):
        with replacing(target, overwrite=force) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    if len(schemes) > 1 or out.as_json:
        _table(numbers)
    savings = [row for clip in numbers for row in clip["savings"]]
    if savings and all(row["mean"]["value"] is None for row in savings):
        out.message(f"No two curves share an accuracy from {report.GRID[0]:.2f} to {report.GRID[-1]:.2f}: {NO_SHARED}")
    out.message(f"Written, with delays and curves: {', '.join(map(str, targets))}.")


def _table(numbers: Sequence[dict[str, Any]]) -> None:
    """A line for each clip, scheme and baseline, by the measure that decides; of the others people see the mean."""
    from keras_efficient.video.evaluation import Saving

    rows, heads = [], {"clip": "clip", "scheme": "scheme", "against": "against"}
    for clip in numbers:
        for row in clip["savings"]:
            plain = {"clip": Path(clip["clip"]).stem, **row}
            if out.as_json:
                rows.append(plain)
                continue
            mean = f"bytes saved, mean at equal {row['measure']}"
            plain[mean] = str(Saving(**row["mean"]))
            if row["measure"] == clip["measures"][0]:
                cells = {f"at {one['accuracy']:.2f}": str(Saving(**one)) for one in row["at"]}
                rows.append({**plain, **cells})
                heads |= {name: name for name in (*cells, mean)}
            else:
                same = ("clip", "scheme", "against")
                first = next(other for other in rows if all(other[name] == plain[name] for name in same))
                first[mean], heads[mean] = plain[mean], mean
    out.rows(rows, heads)
