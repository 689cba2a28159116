"""Line plots as SVG: no script, nothing from elsewhere, colours that hold in light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["COLOURS", "OURS", "Line", "legend", "lines", "picture"]

COLOURS = ("#2a78d6", "#15803d", "#9333ea", "#ca8a04", "#0891b2", "#db2777", "#64748b", "#78350f", "#84cc16")
OURS = "#dc2626"  # of the curve that matters, which no other has
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 360, 52, 46, 10, 14
HEADING, KEYS = 34, 30  # heights of what a picture has above each plot and below all
_STYLE = """text{font:12px system-ui,sans-serif;fill:#475569}.grid{stroke:#cbd5e1;fill:none}.ground{fill:#fff}
.heading{font-size:15px;font-weight:600}@media(prefers-color-scheme:dark){text{fill:#cbd5e1}.grid{stroke:#334155}
.ground{fill:#0f172a}}"""


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        name: in the legend and at its points.
        x, y: of its points; on a logarithmic axis x is above 0.
        fit: y of the line through them; `None`: straight from point to point.
        band: lower and upper y of the line; `None`: none.
        is_thick: whether it is the one that matters.
        colour: of it.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    fit: Sequence[float] | None = None
    band: tuple[Sequence[float], Sequence[float]] | None = None
    is_thick: bool = False
    colour: str = field(default=COLOURS[0])


def lines(shown: Sequence[Line], *, x: str, y: str, least: float = 0.0, most: float = 1.0, is_log: bool = True) -> str:
    """An SVG of some curves.

    Args:
        shown: the curves.
        x, y: what the axes are called.
        least, most: of y.
        is_log: whether x is on a logarithmic axis.
    """
    every_x = [value for line in shown for value in line.x]
    scale = math.log if is_log else float
    room = 0.03 if is_log else 0.02 * (max(every_x) - min(every_x))
    low, high = scale(min(every_x)) - room, scale(max(every_x)) + room
    if low == high:
        low, high = low - 0.5, high + 0.5

    def across(value: float) -> float:
        return LEFT + (scale(value) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def down(value: float) -> float:
        return HEIGHT - BOTTOM - (value - least) / (most - least) * (HEIGHT - BOTTOM - TOP)

    def path(xs: Sequence[float], ys: Sequence[float]) -> str:
        return " ".join(f"{across(a):.1f},{down(b):.1f}" for a, b in zip(xs, ys, strict=True))

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(f"{y} over {x}")}">']
    heights = _steps(least, most)
    digits = max(2, -math.floor(math.log10(heights[1] - heights[0]) + 1e-9))
    for value in heights:
        parts.append(f'<path class="grid" d="M{LEFT} {down(value):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down(value) + 4:.1f}" text-anchor="end">{value:.{digits}f}</text>')
    for value in _ticks(math.exp(low), math.exp(high)) if is_log else _steps(low, high):
        parts.append(f'<path class="grid" d="M{across(value):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{across(value):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    middle, below = (LEFT + WIDTH - RIGHT) / 2, f"{x}, logarithmic" if is_log else x
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(below)}</text>')
    turned = f"translate(13 {HEIGHT / 2 - 20:.0f}) rotate(-90)"
    parts.append(f'<text transform="{turned}" text-anchor="middle">{html.escape(y)}</text>')
    # A picture in the picture, which cuts off what is below the axis.
    inner = f"{LEFT} 0 {WIDTH - LEFT - RIGHT} {HEIGHT - BOTTOM}"
    parts.append('<svg x="{}" y="{}" width="{}" height="{}" viewBox="{}">'.format(*inner.split(), inner))
    for line in shown:
        if line.band is not None:
            around = path(line.x, line.band[1]) + " " + path(list(line.x)[::-1], list(line.band[0])[::-1])
            parts.append(f'<polygon points="{around}" fill="{line.colour}" opacity="0.12"/>')
    for line in shown:
        width = 3 if line.is_thick else 1.5
        points = path(line.x, line.y if line.fit is None else line.fit)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{line.colour}" stroke-width="{width}"/>')
        for a, b in zip(line.x, line.y, strict=True):
            title = html.escape(f"{line.name}: {b:.3f} at {a:,.3g}")
            parts.append(
                f'<circle cx="{across(a):.1f}" cy="{down(b):.1f}" r="{width}" fill="{line.colour}">'
                f"<title>{title}</title></circle>"
            )
    parts.append("</svg></svg>")
    return "".join(parts)


def legend(shown: Sequence[Line]) -> str:
    """HTML that says which curve is which."""
    keys = "".join(f'<span><i style="background:{one.colour}"></i>{html.escape(one.name)}</span>' for one in shown)
    return f'<p class="legend">{keys}</p>'


def picture(plots: Sequence[tuple[str, str]], keys: Sequence[Line], *, columns: int = 2) -> str:
    """Some plots as one SVG file, the headings above each, and below them which curve is which."""
    rows = math.ceil(len(plots) / columns)
    width, height = columns * WIDTH, rows * (HEIGHT + HEADING) + KEYS
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{_STYLE}</style>']
    parts.append(f'<rect class="ground" width="{width}" height="{height}"/>')
    for index, (heading, drawing) in enumerate(plots):
        x, y = index % columns * WIDTH, index // columns * (HEIGHT + HEADING)
        parts.append(f'<text class="heading" x="{x + LEFT}" y="{y + HEADING - 8}">{html.escape(heading)}</text>')
        parts.append(f'<svg x="{x}" y="{y + HEADING}" width="{WIDTH}" height="{HEIGHT}"{drawing.removeprefix("<svg")}')
    x = LEFT
    for line in keys:
        parts.append(f'<rect x="{x}" y="{height - 20}" width="20" height="4" fill="{line.colour}"/>')
        parts.append(f'<text x="{x + 26}" y="{height - 13}">{html.escape(line.name)}</text>')
        x += 60 + 8 * len(line.name)
    return "".join(parts) + "</svg>\n"


def _steps(low: float, high: float) -> list[float]:
    """About five round numbers at equal distances."""
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if (high - low) / (factor * power) <= 6)
    return [number * step for number in range(math.ceil(low / step - 1e-9), int(high / step + 1e-9) + 1)]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers of a logarithmic axis."""
    if high / low < 2:
        return _steps(low, high)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 1.5, 2, 3, 4, 5, 7) if high / low < 8 else (1, 2, 3, 5)
    found = [factor * 10.0**power for power in powers for factor in factors]
    return [value for value in found if low <= value <= high]
