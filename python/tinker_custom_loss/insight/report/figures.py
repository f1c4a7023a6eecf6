"""Which figures a run has, and the numbers behind each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..run import Run
from ..series import BASE, key_prefix
from .axes import LEFT
from .buckets import Bucketed, Steps, bucket, edges
from .svg import heat_map, lines, stacked, with_legend

__all__ = ["BUCKETS", "Figure", "figures", "standalone", "term_key", "term_names"]

BUCKETS = 160
_HEAT_BUCKETS = 60
_PAIRS = 12
_NAME_WIDTH, _PAIR_WIDTH = 96, 168


@dataclass(frozen=True)
class Figure:
    """One chart: ``series`` are the numbers that it draws, over ``steps``.

    ``left`` is where the first step is drawn; ``cells`` says that each bucket has an extent there.
    """

    key: str
    title: str
    caption: str
    svg: str
    series: dict[str, Bucketed]
    steps: Steps
    colors: Mapping[str, int]
    cells: bool = False
    left: int = LEFT

    def _repr_svg_(self) -> str:  # what a notebook draws
        return standalone(self)


def figures(run: Run, prefix: str = "", *, colors: Mapping[str, int] | None = None) -> list[Figure]:
    """Every chart of one run; one that would be empty is left out.

    Args:
        run: whose.
        prefix: of its keys.
        colors: of the terms, where several runs are to have the same.
    """
    prefix = key_prefix(prefix)
    source = _Source(run, prefix, BUCKETS)
    coarse = _Source(run, prefix, _HEAT_BUCKETS)
    names = term_names(run, prefix)
    if colors is None:
        colors = {name: index for index, name in enumerate(names)}  # one term, one colour
    found = []

    contributions = {name: source.of(name, "contribution") for name in names}
    total = source.series(f"{prefix}loss_total")
    title = "What each term adds to the loss"
    found.append(
        Figure(
            "contributions",
            title,
            "weight · value, stacked (means); the line is their sum, the loss",
            stacked(title, contributions, total, source.steps, colors=colors),
            {"loss_total": total} | contributions,
            source.steps,
            colors,
        )
    )

    def chart(
        key: str, title: str, caption: str, quantity: Callable[[str], str | None], log: bool = False
    ) -> None:
        series = {name: source.of(name, q) for name in names if (q := quantity(name))}
        if not all(s.is_empty for s in series.values()):
            svg = lines(title, series, source.steps, colors=colors, log=log)
            found.append(Figure(key, title, caption, svg, series, source.steps, colors))

    chart(
        "norms",
        "How hard each term pulls",
        "norm of the weighted gradient, with respect to the logprobs",
        lambda name: "grad_norm_weighted",
        log=True,
    )
    cosines = {name: coarse.of(name, "cosine_to_total") for name in names}
    _heat(
        found,
        coarse,
        "cosines",
        "With the step or against it",
        "cosine of the weighted gradient and the total one, with respect to the logprobs: "
        f"blue +1, orange -1{_least(coarse)}",
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
        f"blue they agree, orange they fight{_least(coarse)}",
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
    if not all(s.is_empty for s in rows.values()):
        svg = heat_map(title, rows, source.steps, label=left)
        found.append(
            Figure(key, title, caption, svg, rows, source.steps, {}, cells=True, left=left)
        )


def _mean(series: Bucketed) -> float:
    values = [value for value in series.mean if value == value]
    return sum(values) / len(values) if values else 1.0


def standalone(figure: Figure) -> str:
    """A figure as a file of its own: with its colours, and a legend below."""
    names = [name for name in figure.series if name in figure.colors]
    return with_legend(figure.svg, {name: figure.colors[name] for name in names})


def term_names(run: Run, prefix: str = "") -> list[str]:
    """The terms of a run in the order in which they appeared, the base loss first."""
    start = f"{prefix}regularizers/"
    names: dict[str, None] = {}
    for key in _keys(run):
        if key.startswith(f"{prefix}{BASE}/"):
            names.setdefault(BASE)
        elif key.startswith(start):
            names.setdefault(key.removeprefix(start).partition("/")[0])
    return sorted(names, key=lambda name: name != BASE)


def _keys(run: Run) -> list[str]:
    """All keys of all steps, in the order in which they appeared."""
    seen: dict[str, None] = {}
    for metrics in run.steps.values():
        if not metrics.keys() <= seen.keys():
            seen |= dict.fromkeys(metrics)
    return [*seen]


def term_key(name: str, quantity: str) -> str:
    """The key of a term's number; the base loss has no weight, so its value is its contribution."""
    if name != BASE:
        return f"regularizers/{name}/{quantity}"
    same = {"contribution": "value", "grad_norm_weighted": "grad_norm"}
    return f"{BASE}/{same.get(quantity, quantity)}"


def _least(source: _Source) -> str:
    several = any(first != last for first, last in source.steps)
    return "; below each mean the least, where a cell is of several steps" if several else ""


class _Source:
    """Series of one run, over one division into buckets."""

    def __init__(self, run: Run, prefix: str, buckets: int) -> None:
        self._run = run
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
        keys = [key for key in _keys(self._run) if key.startswith(start)]
        return {key.removeprefix(start).replace("/", " · "): self.series(key) for key in keys}

    def of(self, name: str, quantity: str) -> Bucketed:
        return self.series(self._prefix + term_key(name, quantity))
