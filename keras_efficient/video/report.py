"""An evaluation as numbers for JSON, and as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from keras_efficient import plot
from keras_efficient.macroblocks import BLOCK
from keras_efficient.video.delay import TERMS, Link, bandwidth_for
from keras_efficient.video.evaluation import Comparison, Evaluation, Point, Saving, saving
from keras_efficient.video.frames import packages, rgb
from keras_efficient.video.schemes import uniform
from keras_efficient.video.servers import Detections

__all__ = ["ACCURACIES", "BANDWIDTHS", "BETWEEN", "Shown", "page", "picture", "shown", "summary"]

ACCURACIES = (0.80, 0.85, 0.90, 0.95)
GRID = tuple(np.linspace(0.80, 0.95, 7).round(3).tolist())  # of means
BANDWIDTHS = (0.1e6, 0.2e6, 0.5e6, 1e6, 2e6)
BASELINES, OURS = ("uniform", "defaults"), "camera"
BETWEEN = (0.78, 0.97)  # settings farther off are not tried
SHOWN_AT = 0.85  # accuracy nearest to which frames are shown


@dataclass(frozen=True, eq=False)
class Shown:
    """A frame as it came, and what the server found.

    Attributes:
        number: of the frame.
        picture: (h, w, 3) uint8.
        offsets: (rows, columns).
        reference, found: what the server finds in the reference, and in this picture.
    """

    number: int
    picture: np.ndarray
    offsets: np.ndarray
    reference: Any
    found: Any


def shown(server: Any, found: Evaluation, scheme: str, count: int = 3) -> list[Shown]:
    """Some frames of a scheme, at the setting whose accuracy is nearest to 0.85."""
    setting = _shown_point(found, scheme)[0].setting
    coded = next(one for one in found.schemes if one.name == scheme).code(found.clip, setting)
    frames = len(coded.sizes)
    wanted = sorted({int(frames * (2 * index + 1) / (2 * count)) for index in range(count)})
    reference = map(rgb, found.clip) if found.reference is None else uniform(found.clip, found.reference)
    kept = []
    for number, (good, picture) in enumerate(zip(reference, coded.pictures(), strict=True)):
        if number in wanted:
            offsets = np.zeros((1, 1), int) if coded.offsets is None else coded.offsets[number]
            results = [server.predict(one[None])[0] for one in (good, picture)]
            kept.append(Shown(number, picture, offsets, *results))
    return kept


def summary(found: Evaluation, link: Link, *, draws: int = 200) -> dict[str, Any]:
    """What was measured of a clip, and what follows, as JSON holds it."""
    rate = found.clip.video.rate
    best = _best_baseline(found)
    curves = []
    for scheme in found.schemes:
        points = [
            {
                "setting": point.setting,
                "bytes": point.bytes,
                "kbit/s": 8 * point.bytes / found.seconds / 1e3,
                "delay": link.delay(point, rate),
                **{one.name: float(found.curve(scheme.name, one).accuracies()[index]) for one in found.measures},
            }
            for index, point in enumerate(found.points[scheme.name])
        ]
        curves.append({"scheme": scheme.name, "about": scheme.about, "points": points})
    savings = [
        {"scheme": scheme.name, "against": other, "measure": one.name, **_plain(comparison)}
        for one in found.measures
        for other in BASELINES
        if other in found.points
        for scheme in found.schemes
        if scheme.name != other
        for comparison in [saving(found.curve(scheme.name, one), found.curve(other, one), GRID, draws=draws)]
    ]
    delay = [
        {
            "scheme": scheme.name,
            "bandwidth": bandwidth,
            **_delay_at(found, scheme.name, replace(link, bandwidth=bandwidth)),
        }
        for scheme in found.schemes
        for bandwidth in BANDWIDTHS
    ]
    return {
        "clip": str(found.clip.video.path),
        "frames": len(found.points[found.schemes[0].name][0].sizes),
        "evaluated": len(next(iter(found.points[found.schemes[0].name][0].sums.values()))),
        "frames/s": float(rate),
        "reference": "the clip itself" if found.reference is None else f"one QP, {found.reference:g}",
        "measures": [one.name for one in found.measures],
        "curves": curves,
        "savings": savings,
        "link": {**asdict(link), "terms": list(TERMS)},
        "delays": delay,
        "best baseline": best,
        "bandwidth of 0.6 s": None if best is None else bandwidth_for(found, best, SHOWN_AT, chunk=link.chunk),
    }


def _best_baseline(found: Evaluation) -> str | None:
    """Of all schemes without knowledge of the server's network that were tried, the one with the fewest bytes."""
    needed = {name: found.curve(name).bytes_at(SHOWN_AT) for name in (*BASELINES, "aq") if name in found.points}
    known = {name: value for name, value in needed.items() if value is not None}
    return min(known, key=lambda name: known[name]) if known else None


def _delay_at(found: Evaluation, scheme: str, link: Link) -> dict[str, Any]:
    """Mean and 95th percentile of a scheme's delay at an accuracy of 0.85, between its points by interpolation."""
    rate = found.clip.video.rate

    def at(of: Callable[[np.ndarray], Any]) -> float | None:
        return found.cost(scheme, SHOWN_AT, lambda point: link.delay(point, rate, of))

    return {"mean": at(np.mean), "p95": at(lambda seconds: np.percentile(seconds, 95))}


def _plain(comparison: Comparison) -> dict[str, Any]:
    return {
        "at": [asdict(one) for one in comparison.at if one.accuracy in ACCURACIES],
        "mean": asdict(comparison.mean),
        "highest": asdict(comparison.highest),
    }


def page(clips: Sequence[tuple[Evaluation, dict[str, Any], dict[str, list[Shown]]]], link: Link, title: str) -> str:
    """One HTML page.

    Args:
        clips: of each an evaluation, its `summary`, and of some schemes what is `shown`.
        link: for the curves over delay.
        title: of the page.
    """
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    head += f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
    body = "".join(_clip(*one, link) for one in clips)
    return f"{head}<body><h1>{html.escape(title)}</h1>{body}</body></html>\n"


def _shown_point(found: Evaluation, scheme: str) -> tuple[Point, float]:
    """Of the coding whose accuracy is nearest to 0.85, and that accuracy."""
    accuracies = found.curve(scheme).accuracies()
    index = int(np.abs(accuracies - SHOWN_AT).argmin())
    return found.points[scheme][index], float(accuracies[index])


def _clip(found: Evaluation, numbers: dict[str, Any], frames: dict[str, list[Shown]], link: Link) -> str:
    accuracy, rate = found.measures[0].name, found.clip.video.rate
    facts = (
        f"{numbers['frames']} frames at {float(rate):.4g} a second, {numbers['evaluated']} of them evaluated. "
        f"Accuracy is: {accuracy}, of what the server finds against what it finds in the reference. The reference is: "
        f"{numbers['reference']}."
    )
    parts = [f"<section><h2>{html.escape(found.clip.video.path.name)}</h2><p>{html.escape(facts)}</p>"]
    parts.append("<div class='plots'>")
    for heading, unit, amount in (
        ("Accuracy and bytes", "kbit/s", lambda point: 8 * point.bytes / found.seconds / 1e3),
        ("Accuracy and delay", "seconds", lambda point: link.delay(point, rate)),
    ):
        drawn = _curves(found, amount)
        over = f"mean delay of a chunk, {unit}" if unit == "seconds" else unit
        svg = plot.lines(drawn, x=over, y=accuracy, least=_least(drawn)) + plot.legend(drawn)
        parts.append(f"<figure><figcaption>{heading}</figcaption>{svg}</figure>")
    bands = " Bands hold 95 % of a bootstrap." if any(line.band for line in drawn) else ""
    parts.append(f"</div><p class='note'>Dots are measured, each a setting; lines never fall.{bands}</p>")
    parts += [_savings(numbers), _delays(numbers, link), _abouts(found)]
    for scheme, some in frames.items():
        point, reached = _shown_point(found, scheme)
        rates = f"{8 * point.bytes / found.seconds / 1e3:,.0f} kbit/s, {accuracy} {reached:.2f}"
        heading = f"What the server finds: {scheme}, setting {point.setting:g}, {rates}"
        parts.append(f"<h3>{html.escape(heading)}</h3><p class='note'>{_KEY}</p><div class='frames'>")
        parts += [_frame(one) for one in some]
        parts.append("</div>")
    return "".join(parts) + "</section>"


def picture(clips: Sequence[Evaluation], schemes: Sequence[str]) -> str:
    """Accuracy over bits a second of some schemes, a plot for each clip, as one SVG file."""
    plots, drawn = [], []
    for found in clips:
        some = replace(found, schemes=[one for name in schemes for one in found.schemes if one.name == name])
        drawn = _curves(some, lambda point, found=found: 8 * point.bytes / found.seconds / 1e3)
        wanted = plot.lines(drawn, x="kbit/s", y=found.measures[0].name, least=_least(drawn))
        plots.append((found.clip.video.path.stem, wanted))
    return plot.picture(plots, drawn)


def _least(drawn: Sequence[plot.Line]) -> float:
    """Where an axis of accuracies begins."""
    return min(max(int(10 * min(value for line in drawn for value in line.y)) / 10, 0.5), 0.9)


def _curves(found: Evaluation, amount: Any) -> list[plot.Line]:
    from keras_efficient.video.evaluation import drawn

    made, colours = [], itertools.cycle(plot.COLOURS)
    for scheme in found.schemes:
        colour = plot.OURS if scheme.name == OURS else next(colours)
        curve = found.curve(scheme.name)
        order = np.argsort(curve.amounts, kind="stable")
        weights = drawn(curve.sums.shape[1])
        band = None
        if len(weights):
            fits = np.stack([curve.fitted(one)[1] for one in weights])
            low, high = np.percentile(fits, [2.5, 97.5], axis=0)
            band = (low.tolist(), high.tolist())
        _, fit = curve.fitted()
        amounts = [float(amount(found.points[scheme.name][index])) for index in order]
        made.append(
            plot.Line(
                scheme.name,
                amounts,
                curve.accuracies()[order].tolist(),
                fit.tolist(),
                band if scheme.name in (*BASELINES, OURS) else None,
                scheme.name == OURS,
                colour,
            )
        )
    return made


def _savings(numbers: dict[str, Any]) -> str:
    parts = []
    for name in numbers["measures"]:
        rows = [
            [
                row["scheme"],
                row["against"],
                *(_percent(one) for one in (*row["at"], row["mean"])),
                _highest(row["highest"]),
            ]
            for row in numbers["savings"]
            if row["measure"] == name
        ]
        heads = [
            "scheme",
            "against",
            *(f"{value:.2f}" for value in ACCURACIES),
            "mean .80–.95",
            "highest that both reach",
        ]
        parts.append(f"<h3>Bytes saved at equal {html.escape(name)}</h3>{_table(heads, rows)}")
    note = (
        "Below zero: more bytes. In brackets, where there are frames enough, what 95 % of a bootstrap over blocks of "
        "frames hold. –: one of both does not reach that accuracy, or exceeds it at each of its settings."
    )
    return "".join(parts) + f"<p class='note'>{note}</p>"


def _percent(one: dict[str, Any]) -> str:
    return str(Saving(**one))


def _highest(one: dict[str, Any]) -> str:
    return f"{Saving(**one)} at {one['accuracy']:.2f}"


def _delays(numbers: dict[str, Any], link: Link) -> str:
    names = list(dict.fromkeys(row["scheme"] for row in numbers["delays"]))
    rows = [[name, *(_seconds(row) for row in numbers["delays"] if row["scheme"] == name)] for name in names]
    heads = ["scheme", *(f"{bandwidth / 1e6:g} Mbit/s" for bandwidth in BANDWIDTHS)]
    left_out = [name for name, counts in (("queue", link.queues), ("hold", link.holds)) if not counts]
    terms = " + ".join(term for term in TERMS if term not in left_out)
    note = (
        f"Mean (95th percentile) over chunks of {link.chunk} frames: {terms}. fill: frames of a chunk; hold: what the "
        "encoder keeps back to look ahead; look: the camera's model; queue: chunks before; link: bytes over bandwidth; "
        f"round trip {1000 * link.round_trip:g} ms, a half of it, and a whole one more for a second pass; look, encode "
        "and server as measured on this machine where not given. "
        f"The plot is at {link.bandwidth / 1e6:g} Mbit/s."
    )
    if numbers["bandwidth of 0.6 s"]:
        kilobits = numbers["bandwidth of 0.6 s"] / 1e3
        note += f" A mean chunk of {numbers['best baseline']} takes 0.6 s on a link of {kilobits:.0f} kbit/s."
    heading = f"<h3>Delay in seconds at an accuracy of {SHOWN_AT}</h3>"
    return f"{heading}{_table(heads, rows)}<p class='note'>{html.escape(note)}</p>"


def _seconds(row: dict[str, Any]) -> str:
    if row["mean"] is None:
        return "–"
    return f"{row['mean']:.2f}" + (f" ({row['p95']:.2f})" if row["p95"] is not None else "")


def _abouts(found: Evaluation) -> str:
    rows = [[one.name, one.about, ", ".join(f"{value:g}" for value in one.settings)] for one in found.schemes]
    return f"<h3>Schemes</h3>{_table(['scheme', 'how it codes', 'settings'], rows)}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(one)}</th>" for one in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(one)}</td>" for one in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _frame(one: Shown) -> str:
    """The picture, the QP offsets over it, and what the server finds."""
    height, width = one.picture.shape[:2]
    parts = [f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="Frame {one.number}">']
    picture = _coloured(one.picture, one.found, one.reference) if _is_classes(one.found) else one.picture
    parts.append(f'<image width="{width}" height="{height}" href="{_jpeg(picture)}"/>')
    for (row, column), offset in np.ndenumerate(one.offsets):
        if offset:
            colour, strength = ("#fff200" if offset < 0 else "#0020c0"), min(abs(int(offset)) / 10, 1) * 0.4
            parts.append(
                f'<rect x="{column * BLOCK}" y="{row * BLOCK}" width="{BLOCK}" height="{BLOCK}" fill="{colour}" '
                f'opacity="{strength:.2f}"/>'
            )
    width_of_line = max(width / 240, 1.5)
    parts += _marks(one.reference, "#22c55e", width_of_line, dashed=False)
    parts += _marks(one.found, "#ef4444", width_of_line, dashed=True)
    return "".join(parts) + f"</svg><figcaption>frame {one.number}</figcaption></figure>"


def _marks(found: Any, colour: str, width: float, *, dashed: bool) -> list[str]:
    dash = f' stroke-dasharray="{4 * width} {3 * width}"' if dashed else ""
    if isinstance(found, Detections):
        return [
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" fill="none" '
            f'stroke="{colour}" stroke-width="{width}"{dash}><title>class {kind}, {score:.2f}</title></rect>'
            for (left, top, right, bottom), score, kind in zip(
                found.boxes.tolist(), found.scores, found.classes, strict=True
            )
        ]
    if np.ndim(found) == 3:
        return [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{width * (1 if dashed else 1.6)}" fill="{colour}"/>'
            for person in np.asarray(found).tolist()
            for x, y, seen in person
            if seen >= 0.5
        ]
    return []


def _is_classes(found: Any) -> bool:
    """Whether a segmenter found it."""
    return not isinstance(found, Detections) and np.ndim(found) == 2


def _coloured(picture: np.ndarray, found: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Classes but the first as colours over the picture; red where the reference has another one."""
    palette = np.array([[37, 120, 214], [21, 160, 61], [147, 51, 234], [14, 160, 180], [120, 140, 15], [100, 116, 139]])
    rows, columns = (np.arange(have) * size // have for have, size in zip(picture.shape[:2], found.shape, strict=True))
    classes, wanted = found[rows][:, columns], reference[rows][:, columns]
    colours = np.where((classes != wanted)[..., None], np.array([255, 0, 0]), palette[classes % len(palette)])
    plain = (classes == 0) & (wanted == 0)
    return np.where(plain[..., None], picture, picture // 2 + colours // 2).astype(np.uint8)


def _jpeg(picture: np.ndarray) -> str:
    av, file = packages(), io.BytesIO()
    with av.open(file, "w", format="mjpeg") as target:
        stream = target.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = picture.shape[1], picture.shape[0], "yuvj420p"
        stream.codec_context.options = {"qmin": "4", "qmax": "4"}
        target.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        target.mux(stream.encode(None))
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


_KEY = (
    "Green: in the reference; red, dashed: in this coding. Of segmenters: colours of classes, red where it is another "
    "one than in the reference. Yellow: macroblocks coded better than the rest, blue: worse."
)
_STYLE = """
:root{color-scheme:light dark;--text:#1b1f24;--soft:#5b6570;--line:#d7dce1;--back:#fff}
@media(prefers-color-scheme:dark){:root{--text:#e6e9ec;--soft:#9aa4ae;--line:#3a424a;--back:#15191d}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--text);background:var(--back)}
body{max-width:1320px;margin:auto;padding:16px}
h2{border-top:1px solid var(--line);padding-top:20px;overflow-wrap:anywhere}
.plots,.frames{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr));gap:16px}
figure{margin:0}figcaption{font-weight:600}.frames figcaption,.note{font-weight:400;color:var(--soft);font-size:13px}
figure>svg{width:100%;height:auto;display:block}
svg text{fill:var(--soft);font-size:12px}.grid{stroke:var(--line);fill:none}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;margin:4px 0;font-size:13px}
.legend i{display:inline-block;width:14px;height:4px;margin-right:6px;vertical-align:middle}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:4px 12px 4px 0;border-bottom:1px solid var(--line);vertical-align:top;white-space:nowrap}
td:nth-child(2){white-space:normal}
"""
