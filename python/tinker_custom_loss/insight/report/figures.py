"""Which figures a run has, and the numbers behind each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..recorder import Run
from ..series import BASE, key_prefix
from .buckets import Bucketed, bucket, edges
from .svg import LEFT, heat_map, lines, stacked, with_legend

__all__ = ["Figure", "comparison", "figures", "standalone", "term_names"]

BUCKETS = 160
_HEAT_BUCKETS = 60
_PAIRS = 12
_NAME_WIDTH, _PAIR_WIDTH = 96, 168


@dataclass(frozen=True)
class Figure:
    """One chart: ``series`` are the numbers that it draws, over ``steps``, ``(first, last)``.

    ``left`` is where the first step is drawn.
    """

    key: str
    title: str
    caption: str
    svg: str
    series: dict[str, Bucketed]
    steps: list[tuple[int, int]]
    colors: dict[str, int]
    legend: bool = True
    left: int = LEFT

    def _repr_svg_(self) -> str:  # what a notebook draws
        return standalone(self)


def figures(run: Run, prefix: str = "") -> list[Figure]:
    """Every chart of one run; one that would be empty is left out."""
    prefix = key_prefix(prefix)
    source = _Source(run, prefix, BUCKETS)
    coarse = _Source(run, prefix, _HEAT_BUCKETS)
    names = term_names(run, prefix)
    colors = {name: index for index, name in enumerate(names)}  # one term, one colour
    found = []

    contributions = {
        name: source.of(name, "value" if name == BASE else "contribution") for name in names
    }
    total = source.series(f"{prefix}loss_total")
    title = "What each term adds to the loss"
    found.append(
        Figure(
            "contributions",
            title,
            "weight · value, stacked (means); the line is their sum, the loss",
            stacked(title, contributions, total, source.steps),
            {"loss_total": total} | contributions,
            source.steps,
            colors,
        )
    )

    def chart(
        key: str, title: str, caption: str, quantity: Callable[[str], str | None], log: bool = False
    ) -> None:
        series = {name: source.of(name, q) for name in names if (q := quantity(name))}
        if any(value == value for s in series.values() for value in s.mean):
            svg = lines(title, series, source.steps, colors=colors, log=log)
            found.append(Figure(key, title, caption, svg, series, source.steps, colors))

    chart(
        "norms",
        "How hard each term pulls",
        "norm of the weighted gradient, with respect to the logprobs",
        lambda name: "grad_norm" if name == BASE else "grad_norm_weighted",
        log=True,
    )
    cosines = {name: coarse.of(name, "cosine_to_total") for name in names}
    _heat(
        found,
        coarse,
        "cosines",
        "With the step or against it",
        "cosine of the weighted gradient and the total one, with respect to the logprobs: "
        "blue +1, orange -1",
        cosines,
        _NAME_WIDTH,
    )
    pairs = coarse.pairs()
    shown = dict(sorted(pairs.items(), key=lambda pair: _mean(pair[1]))[:_PAIRS])
    which = f"the {_PAIRS} of {len(pairs)} pairs that differ most; " if len(pairs) > _PAIRS else ""
    _heat(
        found,
        coarse,
        "conflicts",
        "Which terms fight",
        f"{which}cosine of the weighted gradients of two terms, with respect to the logprobs: "
        "blue they agree, orange they fight",
        shown,
        _PAIR_WIDTH,
    )
    chart("values", "Values", "each term's own loss, without its weight", lambda name: "value")
    chart(
        "weights", "Weights", "as the schedule gave them", lambda n: None if n == BASE else "weight"
    )
    chart("seconds", "Time", "seconds of each term in a step", lambda name: "seconds", log=True)
    return found


def _heat(
    found: list[Figure],
    source: _Source,
    key: str,
    title: str,
    caption: str,
    rows: dict[str, Bucketed],
    left: int,
) -> None:
    if any(value == value for s in rows.values() for value in s.mean):
        svg = heat_map(title, rows, source.steps, label=left)
        found.append(
            Figure(key, title, caption, svg, rows, source.steps, {}, legend=False, left=left)
        )


def _mean(series: Bucketed) -> float:
    values = [value for value in series.mean if value == value]
    return sum(values) / len(values) if values else 1.0


def standalone(figure: Figure) -> str:
    """A figure as a file of its own: with its colours, and a legend below."""
    names = [name for name in figure.series if name in figure.colors] if figure.legend else []
    return with_legend(figure.svg, {name: figure.colors[name] for name in names})


def comparison(runs: Sequence[Run], prefix: str = "") -> Figure | None:
    """The losses of several runs over one axis of steps."""
    if len(runs) < 2:
        return None
    prefix = key_prefix(prefix)
    every = sorted({step for run in runs for step in run.steps})
    ranges = edges(every, BUCKETS)
    steps = [(every[a], every[b - 1]) for a, b in ranges]
    series = {
        run.title: bucket(
            [run.steps.get(step, {}).get(f"{prefix}loss_total") for step in every], ranges
        )
        for run in runs
    }
    title = "Loss of each run"
    colors = {name: index for index, name in enumerate(series)}
    svg = lines(title, series, steps, colors=colors)
    return Figure("comparison", title, "loss_total", svg, series, steps, colors)


def term_names(run: Run, prefix: str = "") -> list[str]:
    """The terms of a run in the order in which they appeared, the base loss first."""
    start = f"{prefix}regularizers/"
    names: dict[str, None] = {}
    for key in dict.fromkeys(itertools.chain.from_iterable(run.steps.values())):
        if key.startswith(f"{prefix}{BASE}/"):
            names.setdefault(BASE)
        elif key.startswith(start):
            names.setdefault(key.removeprefix(start).partition("/")[0])
    return sorted(names, key=lambda name: name != BASE)


class _Source:
    """Series of one run, over one division into buckets."""

    def __init__(self, run: Run, prefix: str, buckets: int) -> None:
        self._rows = list(run.steps.values())
        self._prefix = prefix
        numbers = list(run.steps)
        self._ranges = edges(numbers, buckets)
        self.steps = [(numbers[a], numbers[b - 1]) for a, b in self._ranges]

    def series(self, key: str) -> Bucketed:
        return bucket([row.get(key) for row in self._rows], self._ranges)

    def pairs(self) -> dict[str, Bucketed]:
        """The cosines of each pair of terms, the names with a ``·`` between."""
        start = f"{self._prefix}cosines/"
        keys = dict.fromkeys(key for row in self._rows for key in row if key.startswith(start))
        return {key.removeprefix(start).replace("/", " · "): self.series(key) for key in keys}

    def of(self, name: str, quantity: str) -> Bucketed:
        term = BASE if name == BASE else f"regularizers/{name}"
        return self.series(f"{self._prefix}{term}/{quantity}")
