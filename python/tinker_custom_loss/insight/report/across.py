"""Several runs beside each other: what they were made of, how they ended, what is odd in each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from ..diagnosis import diagnose
from ..run import Run
from ..series import BASE, JUDGED
from .axes import LEFT
from .buckets import Bucketed, Range, bucket, edges_by_step
from .figures import BUCKETS, Figure, term_key, term_names
from .svg import lines

__all__ = ["common_terms", "comparison_figures", "comparison_tables", "titles"]

_SMALL_BUCKETS = 60
_QUANTITIES = {
    "value": "value",
    "contribution": "weight · value",
    "grad_norm_weighted": "weight · |∇|",
}


def titles(runs: Sequence[Run]) -> list[str]:
    """A name a run: that of its directory, and of those above it where two are the same."""
    parts = [run.directory.resolve().parts for run in runs]
    if len(set(parts)) < len(parts):
        return [f"{run.title} ({number})" for number, run in enumerate(runs, 1)]
    depth = 1
    while len({each[-depth:] for each in parts}) < len(parts):
        depth += 1
    return ["/".join(each[-depth:]) for each in parts]


def common_terms(runs: Sequence[Run], prefix: str) -> list[str]:
    """The terms that at least two of the runs have."""
    having = [term_names(run, prefix) for run in runs]
    every = dict.fromkeys(name for names in having for name in names)
    return [name for name in every if sum(name in names for names in having) > 1]


def comparison_figures(runs: Sequence[Run], names: Sequence[str], prefix: str) -> list[Figure]:
    """The losses of several runs over one axis of steps, and how hard all terms pull together."""
    found = [
        _figure(runs, names, f"{prefix}loss_total", "loss", "Loss of each run", "loss_total"),
        _figure(
            runs,
            names,
            f"{prefix}total_grad_norm",
            "norm",
            "The whole gradient of each run",
            "its norm, with respect to the logprobs",
            log=True,
        ),
    ]
    return [figure for figure in found if figure is not None]


def term_figures(
    runs: Sequence[Run], names: Sequence[str], prefix: str
) -> Iterator[tuple[str, list[Figure]]]:
    """Of each term that two runs have in common, three small charts."""
    for index, term in enumerate(common_terms(runs, prefix)):
        found = [
            _figure(
                runs,
                names,
                prefix + term_key(term, quantity),
                f"term{index}-{quantity}",
                f"{term}: {text}",
                "",
                buckets=_SMALL_BUCKETS,
                log=quantity == "grad_norm_weighted",
            )
            for quantity, text in _QUANTITIES.items()
            if term != BASE or quantity != "contribution"
        ]
        yield term, [figure for figure in found if figure is not None]


def _figure(
    runs: Sequence[Run],
    names: Sequence[str],
    metric: str,
    key: str,
    title: str,
    caption: str,
    *,
    buckets: int = BUCKETS,
    log: bool = False,
) -> Figure | None:
    every = sorted({step for run in runs for step in run.steps})
    ranges = edges_by_step(every, buckets)
    steps = [(every[a], every[b - 1]) for a, b in ranges]
    series = {
        name: _series(run, metric, every, ranges) for name, run in zip(names, runs, strict=True)
    }
    colors = {name: index for index, name in enumerate(names)}
    series = {name: s for name, s in series.items() if not s.is_empty}
    if not series:
        return None
    svg = lines(title, series, steps, colors=colors, log=log)
    return Figure(key, title, caption, svg, series, steps, colors, left=LEFT)


def _series(run: Run, metric: str, every: Sequence[int], ranges: Sequence[Range]) -> Bucketed:
    rows = [run.steps.get(step) for step in every]
    made = bucket([None if row is None else row.get(metric) for row in rows], ranges)
    passed = frozenset(
        index
        for index, (start, end) in enumerate(ranges)
        if all(row is None for row in rows[start:end])
    )
    return Bucketed(made.mean, made.low, made.high, made.lost, passed)


def comparison_tables(runs: Sequence[Run], names: Sequence[str], prefix: str) -> str:
    """What differs, what is odd in each, and where each term stood at the last common step."""
    return (
        _differences(runs, names)
        + _oddities(runs, names, prefix)
        + _at_the_end(runs, names, prefix)
    )


def _at_the_end(runs: Sequence[Run], names: Sequence[str], prefix: str) -> str:
    common = set(runs[0].steps).intersection(*(run.steps for run in runs[1:]))
    if common:
        at = [max(common)] * len(runs)
        title = f"At step {at[0]}, the last that all have"
    else:
        at = [max(run.steps) for run in runs]
        title = "At the last step of each, since no step is common to all"
    last = [run.steps[step] for run, step in zip(runs, at, strict=True)]
    every = dict.fromkeys(name for run in runs for name in term_names(run, prefix))
    cells = [
        (
            term,
            [
                metrics.get(prefix + term_key(term, quantity))
                for quantity in _QUANTITIES
                for metrics in last
            ],
        )
        for term in every
    ]
    losses = [metrics.get(f"{prefix}loss_total") for metrics in last]
    cells.append(
        ("all", [None] * len(runs) + losses + [m.get(f"{prefix}total_grad_norm") for m in last])
    )
    heads = names if common else [f"{n}, step {s}" for n, s in zip(names, at, strict=True)]
    groups = "".join(
        f'<th scope="colgroup" colspan="{len(runs)}">{text}</th>' for text in _QUANTITIES.values()
    )
    rows = [(name, [_number(number) for number in numbers]) for name, numbers in cells]
    table = _table([*heads] * len(_QUANTITIES), rows, above=f"<tr><td></td>{groups}</tr>")
    return f"<h3>{title}</h3>{table}"


def _number(number: float | None) -> str:
    return "-" if number is None else f"{number:.4g}"


def _differences(runs: Sequence[Run], names: Sequence[str]) -> str:
    told = [_told(run) for run in runs]
    silent = [name for name, run in zip(names, runs, strict=True) if run.composition is None]
    note = "".join(
        f'<p class="quiet">{escape(name)} does not say what it was composed of.</p>'
        for name in silent
    )
    every = dict.fromkeys(key for each in told for key in each)
    rows = [
        (key, [each.get(key, "-") for each in told])
        for key in every
        if len({each.get(key) for each in told}) > 1 and not _is_beside_the_point(key, told)
    ]
    body = '<p class="quiet">Nothing differs in what their config.json says.</p>' if every else ""
    return f"<h3>What differs</h3>{_table(names, rows, 'words') if rows else body}{note}"


def _is_beside_the_point(key: str, told: Sequence[Mapping[str, str]]) -> bool:
    """Of a term that a run does not have, function and weight are enough."""
    term, colon, item = key.rpartition(": ")
    if not colon or item in ("fn", "weight"):
        return False
    return any(f"{term}: fn" in each for each in told) and not all(
        f"{term}: fn" in each for each in told
    )


def _told(run: Run) -> dict[str, str]:
    """The configuration of a run, a line an item."""
    items = {key: _text(value) for key, value in run.config.items() if key != "composition"}
    described = run.composition
    if described is None:
        return items
    terms: list[Mapping[str, Any]] = [*described["regularizers"]]
    if isinstance(described.get("base_loss"), Mapping):
        terms.insert(0, {"name": BASE, **described["base_loss"]})
    for each in terms:
        for key, value in each.items():
            if key in ("params", "defaults"):
                items |= {f"{each['name']}: {param}": _text(v) for param, v in value.items()}
            elif key not in ("name", "unnamed", "load"):
                shown = each.get("unnamed") if key == "fn" and value is None else value
                items[f"{each['name']}: {key}"] = _text(shown)
    versions = described.get("versions")
    if isinstance(versions, Mapping):
        items |= {f"version of {name}": _text(version) for name, version in versions.items()}
    return items


def _text(value: Any) -> str:
    if isinstance(value, Mapping) and "schedule" in value:
        at = ", ".join(f"{weight:g} at {step}" for step, weight in (value.get("at") or {}).items())
        return f"{value['schedule']}: {at}"
    return value if isinstance(value, str) else json.dumps(value)


def _oddities(runs: Sequence[Run], names: Sequence[str], prefix: str) -> str:
    parts = []
    for name, run in zip(names, runs, strict=True):
        judged = list(run.steps.values())[-JUDGED:]
        found = diagnose(judged, prefix=prefix, composition=run.composition)
        said = "; ".join(finding.message for finding in found) or "nothing odd"
        parts.append(f"<li><strong>{escape(name)}</strong>: {escape(said)}.</li>")
    return f"<h3>Findings</h3><ul>{''.join(parts)}</ul>"


def _table(
    heads: Sequence[str],
    rows: Sequence[tuple[str, Sequence[str]]],
    kind: str = "",
    *,
    above: str = "",
) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in ("", *heads))
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, cells in rows
    )
    table = f'<table class="{kind}"><thead>{above}<tr>{head}</tr></thead>{body}</table>'
    return f'<div class="wide">{table}</div>'
