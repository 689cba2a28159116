"""Puts the results of the benchmarks into README.md and docs/, between `<!-- table:NAME -->` and `<!-- /table -->`.

`table:zoo_SYSTEM` is made of the cards of that system's models, every other of `benchmarks/results/NAME.json`, of which
`table:NAME_short` has a row for each measure instead of one for each network.

python -m benchmarks.tables            writes
python -m benchmarks.tables --check    ends with 1 where one of these files and the results differ
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

__all__ = ["filled", "table"]

ROOT = Path(__file__).resolve().parent.parent
# Columns of quality, by system: heading, name of the metric, data set (or how its name begins).
ZOO_COLUMNS = {
    "sesr": (("Set5", "PSNR", "Set5"), ("Set14", "PSNR", "Set14"), ("BSD100", "PSNR", "BSD100")),
    "memcom": (("nDCG@20", "nDCG@20", "Gowalla"), ("Recall@20", "Recall@20", "Gowalla")),
    "halos": (("nDCG@20", "nDCG@20", "Amazon"), ("Recall@20", "Recall@20", "Amazon")),
    "accmpeg": (("area under ROC", "area under the ROC curve", "dashcam_highway_960x540.mp4"),),
}
_MARKED = re.compile(r"(<!-- table:(\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def filled(text: str, results: Path) -> str:
    """The text with every marked table made anew from the cards or `results`/NAME.json; without a file it is empty."""

    def replace(match: re.Match[str]) -> str:
        if match[2].startswith("zoo_"):
            return f"{match[1]}{zoo_table(match[2].removeprefix('zoo_'))}{match[3]}"
        path = results / f"{match[2].removesuffix('_short')}.json"
        made = short_table if match[2].endswith("_short") else table
        lines = made(json.loads(path.read_text("utf-8"))["rows"]) if path.exists() else "Not measured yet.\n"
        return f"{match[1]}{lines}{match[3]}"

    return _MARKED.sub(replace, text)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of a benchmark that have a bar, as a table in Markdown. A bar that was missed stays, with its reason."""
    lines = ["| what | ours | peer | ratio | bar | reached |", "|---|---|---|---|---|---|"]
    for row in (row for row in rows if row["bar"]):
        reached = {True: "yes", False: "**no**", None: "not measured"}[row["reached"]]
        why = row["why"] if row["reached"] is not True else ""
        cells = [
            row["what"],
            _number(row["ours"], row["unit"]),
            _number(row["peer"], row["unit"]),
            _number(row["ratio"]),
            row["bar"],
            ": ".join(filter(None, (reached, why))),
        ]
        lines.append("| " + " | ".join(cells).replace("\n", " ") + " |")
    return "\n".join(lines) + "\n"


def short_table(rows: list[dict[str, Any]]) -> str:
    """A row for each measure that several networks have ("NETWORK: MEASURE"), and one for all that was not measured."""
    measures: dict[tuple[str, str], list[dict[str, Any]]] = {}
    missing: dict[str, int] = {}
    for row in (row for row in rows if row["bar"]):
        if row["reached"] is None:
            missing[row["why"]] = missing.get(row["why"], 0) + 1
        else:
            measures.setdefault((row["what"].split(": ", 1)[-1], row["bar"]), []).append(row)
    lines = ["| what | how many | ours | bar | reached |", "|---|---|---|---|---|"]
    for (what, bar), found in measures.items():
        ends = [_number(end(row["ours"] for row in found), found[0]["unit"]) for end in (min, max)]
        reached = sum(row["reached"] for row in found)
        told = "all" if reached == len(found) else f"**{reached}**"
        lines.append(f"| {what} | {len(found)} | {' to '.join(dict.fromkeys(ends))} | {bar} | {told} |")
    lines += [f"| other bars | {count} |  |  | not measured: {why} |" for why, count in missing.items()]
    return "\n".join(lines) + "\n"


def zoo_table(system: str) -> str:
    """The models of one system with the quality in their cards."""
    from keras_efficient import zoo

    columns = ZOO_COLUMNS[system]
    head = ["name", "what", "weights", *(heading for heading, _, _ in columns)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for card in (card for card in map(zoo.card, zoo.list_models()) if card.system == system):
        scores = [_score(card.metrics, name, dataset) for _, name, dataset in columns]
        lines.append("| " + " | ".join([f"`{card.name}`", card.summary, f"{card.parameters:,}", *scores]) + " |")
    return "\n".join(lines) + "\n"


def _score(metrics: tuple[Any, ...], name: str, dataset: str) -> str:
    """The first of that name and data set: of Set14 there are two conventions."""
    found = next(m for m in metrics if m.name == name and m.dataset.split()[0] == dataset)
    return f"{found.value:.2f}" if found.unit == "dB" else f"{found.value:.4f}"


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return ""
    digits = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{digits} {unit}".strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 where a file is out of date")
    arguments = parser.parse_args()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        before = path.read_text("utf-8")
        after = filled(before, ROOT / "benchmarks" / "results")
        if arguments.check and before != after:
            sys.exit(f"{path.relative_to(ROOT)} is out of date: run python -m benchmarks.tables")
        if not arguments.check and before != after:
            path.write_text(after, "utf-8")


if __name__ == "__main__":
    main()
