"""Charts as SVG text: lines with their range, stacked areas, a heat map.

Colours are classes (``c0`` … ``c7``), which the page gives for light and dark; a figure that
stands alone carries :data:`STYLE`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from .buckets import Bucketed

__all__ = [
    "COLORS",
    "LEFT",
    "RIGHT",
    "STYLE",
    "WIDTH",
    "Axes",
    "heat_map",
    "lines",
    "stacked",
    "with_legend",
]

WIDTH, HEIGHT = 480, 190
LEFT, RIGHT, TOP, BOTTOM = 50, 8, 8, 20

# Okabe and Ito's palette, told apart with any kind of colour vision.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c8c00", "#666666")

STYLE = "\n".join(
    [
        "svg{font:10px system-ui,sans-serif;background:var(--paper,#fff)}",
        "svg text{fill:var(--ink,#333)}",
        ".grid{stroke:var(--rule,#ddd);stroke-width:1}",
        ".line{fill:none;stroke-width:1.5;stroke-linejoin:round}",
        ".band{stroke:none;fill-opacity:.18}",
        ".area{stroke:none;fill-opacity:.75}",
        ".total{fill:none;stroke:var(--ink,#333);stroke-width:1.5}",
        ".cursor{stroke:var(--ink,#333);stroke-width:1;visibility:hidden}",
        *(
            f".line.c{i}{{stroke:{color}}}.band.c{i},.area.c{i},.swatch.c{i}{{fill:{color}}}"
            for i, color in enumerate(COLORS)
        ),
    ]
)


@dataclass(frozen=True)
class Axes:
    """Where data lies on the paper: ``steps`` per bucket on x, a linear or log range on y."""

    count: int
    low: float
    high: float
    log: bool = False

    def x(self, index: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (index / max(1, self.count - 1))

    def y(self, value: float) -> float:
        low, high = (
            (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        )
        at = math.log10(max(value, self.low)) if self.log else value
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (at - low) / (high - low)

    def ticks(self) -> list[float]:
        if self.log:
            exponents = range(
                math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1
            )
            skip = max(1, len(exponents) // 5)
            return [10.0**e for e in exponents][::skip]
        step = _nice((self.high - self.low) / 4)
        first = math.ceil(self.low / step)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axes_over(
    values: Iterable[float], count: int, *, log: bool = False, zero: bool = False
) -> Axes:
    """Axes that hold all finite ``values``; logarithmic only where that shows more."""
    finite = [value for value in values if math.isfinite(value)]
    positive = [value for value in finite if value > 0]
    if log and positive and max(positive) > 100 * min(positive):
        high = max(positive)
        return Axes(count, max(min(positive), high * 1e-9), high, log=True)
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if not high > low:
        margin = abs(high) * 0.1 or 1.0
        low, high = low - margin, high + margin
    return Axes(count, low, high)


def lines(
    title: str,
    series: Mapping[str, Bucketed],
    steps: Sequence[tuple[int, int]],
    *,
    colors: Mapping[str, int],
    log: bool = False,
) -> str:
    """Each series' mean as a line, over the range between its least and greatest."""
    axes = axes_over(
        (value for s in series.values() for value in (*s.low, *s.high)), len(steps), log=log
    )
    parts = []
    for name, s in series.items():
        color = f"c{colors[name] % len(COLORS)}"
        if s.low != s.high:
            parts += [f'<path class="band {color}" d="{d}"/>' for d in _bands(axes, s.low, s.high)]
        parts.append(f'<path class="line {color}" d="{_path(axes, s.mean)}"/>')
    return _figure(title, axes, steps, parts)


def stacked(
    title: str, series: Mapping[str, Bucketed], total: Bucketed, steps: Sequence[tuple[int, int]]
) -> str:
    """Means, the positive ones piled up and the negative ones piled down, and their sum."""
    ups, downs = [0.0] * len(steps), [0.0] * len(steps)
    layers = []
    for s in series.values():
        base, top = [], []
        for i, value in enumerate(s.mean):
            value = value if math.isfinite(value) else 0.0
            pile = ups if value >= 0 else downs
            base.append(pile[i])
            pile[i] += value
            top.append(pile[i])
        layers.append((base, top))
    finite = [value for value in (*total.low, *total.high) if math.isfinite(value)]
    axes = axes_over([*ups, *downs, *finite], len(steps), zero=True)
    parts = [
        f'<path class="area c{index % len(COLORS)}" d="{d}"/>'
        for index, (base, top) in enumerate(layers)
        for d in _bands(axes, base, top)
    ]
    if total.low != total.high:
        parts += [f'<path class="band c7" d="{d}"/>' for d in _bands(axes, total.low, total.high)]
    parts.append(f'<path class="total" d="{_path(axes, total.mean)}"/>')
    return _figure(title, axes, steps, parts)


def heat_map(
    title: str, rows: Mapping[str, Bucketed], steps: Sequence[tuple[int, int]], *, label: int
) -> str:
    """Values in -1..1: blue where they are positive, orange where they are negative.

    The names of the rows have ``label`` units of the width.
    """
    height, letters = 16, label // 6
    width = (WIDTH - label - RIGHT) / max(1, len(steps))
    parts = []
    for r, (name, s) in enumerate(rows.items()):
        y = TOP + r * height
        text = name if len(name) <= letters else name[: letters - 1] + "…"
        parts.append(f'<text x="{label - 4}" y="{y + 11}" text-anchor="end">{escape(text)}</text>')
        for c, value in enumerate(s.mean):
            if not math.isfinite(value):
                continue
            color = COLORS[0] if value >= 0 else COLORS[5]
            # A 0 is not as pale as the paper: what was not recorded is.
            opacity = min(1.0, max(0.05, abs(value)))
            parts.append(
                f'<rect x="{label + c * width:.1f}" y="{y}" width="{width:.1f}" '
                f'height="{height - 1}" fill="{color}" fill-opacity="{opacity:.2f}" '
                'shape-rendering="crispEdges"/>'
            )
    bottom = TOP + len(rows) * height
    first, last = (steps[0][0], steps[-1][1]) if steps else (0, 0)
    parts.append(f'<text x="{label}" y="{bottom + 11}">{first}</text>')
    parts.append(
        f'<text x="{WIDTH - RIGHT}" y="{bottom + 11}" text-anchor="end">step {last}</text>'
    )
    return _svg(title, bottom + BOTTOM, parts)


def with_legend(svg: str, colors: Mapping[str, int]) -> str:
    """A chart that needs no page around it."""
    width, height = (float(x) for x in svg.split('viewBox="0 0 ')[1].split('"')[0].split())
    rows = [list(colors.items())[start : start + 4] for start in range(0, len(colors), 4)]
    parts = []
    for r, row in enumerate(rows):
        for c, (name, color) in enumerate(row):
            x, y = LEFT + c * (width - LEFT) / 4, height + 4 + 16 * r
            text = name if len(name) <= 16 else name[:15] + "…"
            parts.append(
                f'<rect class="swatch c{color % len(COLORS)}" x="{x:.0f}" y="{y:.0f}" width="10" '
                f'height="10"/><text x="{x + 14:.0f}" y="{y + 9:.0f}">{escape(text)}</text>'
            )
    whole = f'viewBox="0 0 {width:g} {height + 16 * len(rows) + 4:g}"'
    head, tail = svg.split("</title>", 1)
    head = head.replace(f'viewBox="0 0 {width:g} {height:g}"', whole)
    body = tail.removesuffix("</svg>")
    style = re.sub(r"var\(--\w+,(#\w+)\)", r"\1", STYLE)  # there is no page that would say more
    return f"{head}</title><style>{style}</style>{body}{''.join(parts)}</svg>\n"


def _figure(title: str, axes: Axes, steps: Sequence[tuple[int, int]], parts: list[str]) -> str:
    rules = []
    for tick in axes.ticks():
        y = axes.y(tick)
        rules.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        rules.append(f'<text x="{LEFT - 5}" y="{y + 3:.1f}" text-anchor="end">{tick:.4g}</text>')
    foot = HEIGHT - 5
    first, last = (steps[0][0], steps[-1][1]) if steps else (0, 0)
    rules.append(f'<text x="{LEFT}" y="{foot}">{first}</text>')
    rules.append(f'<text x="{WIDTH - RIGHT}" y="{foot}" text-anchor="end">step {last}</text>')
    cursor = f'<path class="cursor" d="M0 {TOP}V{HEIGHT - BOTTOM}"/>'
    return _svg(title, HEIGHT, [*rules, *parts, cursor])


def _svg(title: str, height: float, parts: list[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {height:g}" role="img">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _path(axes: Axes, values: Sequence[float]) -> str:
    """A line with gaps where there is no value; a value alone is a dot of a line."""
    text, drawing = [], False
    for index, value in enumerate(values):
        if not math.isfinite(value):
            drawing = False
            continue
        text.append(f"{'L' if drawing else 'M'}{axes.x(index):.1f} {axes.y(value):.1f}")
        if not drawing:
            text.append("h0.5")
        drawing = True
    return "".join(text)


def _bands(axes: Axes, low: Sequence[float], high: Sequence[float]) -> list[str]:
    """Closed areas between two lines, one for each stretch without a gap."""
    stretches: list[list[int]] = [[]]
    for index, (a, b) in enumerate(zip(low, high, strict=True)):
        if math.isfinite(a) and math.isfinite(b):
            stretches[-1].append(index)
        elif stretches[-1]:
            stretches.append([])
    areas = []
    for stretch in filter(None, stretches):
        there = [f"{axes.x(i):.1f} {axes.y(high[i]):.1f}" for i in stretch]
        back = [f"{axes.x(i):.1f} {axes.y(low[i]):.1f}" for i in reversed(stretch)]
        areas.append("M" + "L".join([*there, *back]) + "Z")
    return areas


def _nice(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(n * power for n in (1, 2, 5, 10) if n * power >= step * 0.999)
