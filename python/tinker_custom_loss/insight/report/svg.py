"""Charts as SVG text: lines with their range, stacked areas, a heat map.

Colours are classes (``c0`` … ``c7``), which the page gives for light and dark; a figure that
stands alone carries :data:`STYLE`.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Mapping, Sequence
from html import escape

from .axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axes, axes_over, span, usual_distance
from .buckets import Bucketed, Steps

__all__ = ["COLORS", "STYLE", "heat_map", "lines", "stacked", "with_legend"]

# Okabe and Ito's palette, told apart with any kind of colour vision.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c8c00", "#666666")
_AGREES, _FIGHTS = 0, 5
_SHADES = 20

STYLE = "\n".join(
    [
        "svg{font:10px system-ui,sans-serif;background:var(--paper,#fff)}",
        "svg text{fill:var(--ink,#333)}",
        ".grid{stroke:var(--rule,#ddd);stroke-width:1}",
        ".line{fill:none;stroke-width:1.5;stroke-linejoin:round}",
        ".band{stroke:none;fill-opacity:.18}",
        ".area{stroke:none;fill-opacity:.75}",
        ".cell{stroke:none;shape-rendering:crispEdges}",
        ".total{fill:none;stroke:var(--ink,#333);stroke-width:1.5}",
        ".total-band{stroke:none;fill:var(--ink,#333);fill-opacity:.15}",
        ".cursor{stroke:var(--ink,#333);stroke-width:1;visibility:hidden}",
        *(
            f".line.c{i}{{stroke:var(--c{i},{color})}}"
            f":is(.band,.area,.swatch,.cell).c{i}{{fill:var(--c{i},{color})}}"
            for i, color in enumerate(COLORS)
        ),
    ]
)


def lines(
    title: str,
    series: Mapping[str, Bucketed],
    steps: Steps,
    *,
    colors: Mapping[str, int],
    log: bool = False,
) -> str:
    """Each series' mean as a line, over the range between its least and greatest."""
    axes = axes_over(
        (value for s in series.values() for value in (*s.low, *s.high)), steps, log=log
    )
    parts = []
    for name, s in series.items():
        color = f"c{colors[name] % len(COLORS)}"
        if _has_range(s):
            bands = _bands(axes, s.low, s.high, s.passed)
            parts += [f'<path class="band {color}" d="{d}"/>' for d in bands]
        parts.append(f'<path class="line {color}" d="{_path(axes, s.mean, s.passed)}"/>')
    return _figure(title, axes, parts)


def stacked(
    title: str,
    series: Mapping[str, Bucketed],
    total: Bucketed,
    steps: Steps,
    *,
    colors: Mapping[str, int],
) -> str:
    """Means, the positive ones piled up and the negative ones piled down, and their sum."""
    ups, downs = [0.0] * len(steps), [0.0] * len(steps)
    layers = []
    for name, s in series.items():
        for pile, wanted in ((ups, 1), (downs, -1)):
            sizes = [v if math.isfinite(v) and v * wanted > 0 else 0.0 for v in s.mean]
            if any(sizes):
                base = pile.copy()
                pile[:] = map(sum, zip(base, sizes, strict=True))
                layers.append((name, base, pile.copy()))
    finite = [value for value in (*total.low, *total.high) if math.isfinite(value)]
    axes = axes_over([*ups, *downs, *finite], steps, zero=True)
    parts = [
        f'<path class="area c{colors[name] % len(COLORS)}" d="{d}"/>'
        for name, base, top in layers
        for d in _bands(axes, base, top)
    ]
    if _has_range(total):
        bands = _bands(axes, total.low, total.high)
        parts += [f'<path class="total-band" d="{d}"/>' for d in bands]
    parts.append(f'<path class="total" d="{_path(axes, total.mean)}"/>')
    return _figure(title, axes, parts)


def heat_map(title: str, rows: Mapping[str, Bucketed], steps: Steps, *, label: int) -> str:
    """Values in -1..1: blue where they are positive, orange where they are negative.

    A cell is of the mean, and a third of it of the least, which may hide in a mean. The names of
    the rows have ``label`` units of the width.
    """
    height, letters = 16, label // 6
    bounds = _cell_bounds(steps, label)
    shades: dict[tuple[int, int], list[str]] = collections.defaultdict(list)
    parts = []
    for r, (name, s) in enumerate(rows.items()):
        y = TOP + r * height
        text = name if len(name) <= letters else name[: letters - 1] + "…"
        parts.append(f'<text x="{label - 4}" y="{y + 11}" text-anchor="end">{escape(text)}</text>')
        has_range = _has_range(s)
        for (left, right), mean, low in zip(bounds, s.mean, s.low, strict=True):
            if not math.isfinite(mean):
                continue
            upper = height - 6 if has_range else height - 1
            shades[_shade(mean)].append(f"M{left} {y}H{right}v{upper}H{left}z")
            if has_range:
                shades[_shade(low)].append(f"M{left} {y + upper}H{right}v5H{left}z")
    parts += [
        f'<path class="cell c{color}" fill-opacity="{shade / _SHADES:g}" d="{"".join(cells)}"/>'
        for (color, shade), cells in sorted(shades.items())
    ]
    bottom = TOP + len(rows) * height
    parts += _step_marks(steps, label, bottom + 11)
    return _svg(title, bottom + BOTTOM, parts)


def _cell_bounds(steps: Steps, label: int) -> list[tuple[str, str]]:
    """From each bucket's first step to the next one's; less far where the next is far away."""
    first, last = span(steps)
    usual = usual_distance(steps)
    scale = (WIDTH - label - RIGHT) / (last + usual - first)
    starts = [*(start for start, _ in steps[1:]), last + usual]
    ends = [min(end + usual, start) for (_, end), start in zip(steps, starts, strict=True)]
    return [
        (f"{label + (start - first) * scale:.1f}", f"{label + (end - first) * scale:.1f}")
        for (start, _), end in zip(steps, ends, strict=True)
    ]


def _shade(value: float) -> tuple[int, int]:
    """A 0 is not as pale as the paper: what was not recorded is."""
    size = min(_SHADES, max(1, round(abs(value) * _SHADES)))
    return (_AGREES if value >= 0 else _FIGHTS), size


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
    style = re.sub(r":is\(([^)]*)\)(\.c\d)", _one_by_one, style)  # nor is all that draws a browser
    return f"{head}</title><style>{style}</style>{body}{''.join(parts)}</svg>\n"


def _one_by_one(found: re.Match[str]) -> str:
    return ",".join(each + found[2] for each in found[1].split(","))


def _figure(title: str, axes: Axes, parts: list[str]) -> str:
    rules = []
    for y, text in axes.ticks():
        rules.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        rules.append(
            f'<text x="{LEFT - 5}" y="{y + 3:.1f}" text-anchor="end">{escape(text)}</text>'
        )
    rules += _step_marks(axes.steps, LEFT, HEIGHT - 5)
    cursor = f'<path class="cursor" d="M0 {TOP}V{HEIGHT - BOTTOM}"/>'
    return _svg(title, HEIGHT, [*rules, *parts, cursor])


def _step_marks(steps: Steps, left: float, y: float) -> list[str]:
    first, last = span(steps)
    return [
        f'<text x="{left}" y="{y}">{first}</text>',
        f'<text x="{WIDTH - RIGHT}" y="{y}" text-anchor="end">step {last}</text>',
    ]


def _svg(title: str, height: float, parts: list[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {height:g}" role="img">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _has_range(series: Bucketed) -> bool:
    pairs = zip(series.low, series.high, strict=True)
    return any(high > low for low, high in pairs)


def _path(axes: Axes, values: Sequence[float], passed: frozenset[int] = frozenset()) -> str:
    """A line with gaps where there is no value; a value alone is a dot of a line."""
    text, drawing = [], False
    for index, value in enumerate(values):
        if index in passed:
            continue
        if not math.isfinite(value):
            drawing = False
            continue
        text.append(f"{'L' if drawing else 'M'}{axes.x(index):.1f} {axes.y(value):.1f}")
        if not drawing:
            text.append("h0.5")
        drawing = True
    return "".join(text)


def _bands(
    axes: Axes,
    low: Sequence[float],
    high: Sequence[float],
    passed: frozenset[int] = frozenset(),
) -> list[str]:
    """Closed areas between two lines, one for each stretch without a gap."""
    stretches: list[list[int]] = [[]]
    for index, (a, b) in enumerate(zip(low, high, strict=True)):
        if index in passed:
            continue
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
