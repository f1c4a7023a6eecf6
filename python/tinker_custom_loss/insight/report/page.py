"""The page: one file, no request to anywhere, charts that need no script."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources

from ...errors import RequestError
from ..diagnosis import diagnose
from ..run import Run, kept_steps
from ..series import BASE, JUDGED, key_prefix
from ..tokenizing import decoder
from .across import comparison_figures, comparison_tables, term_figures, titles
from .axes import RIGHT, WIDTH, span, usual_distance
from .buckets import Bucketed
from .composition import composition
from .figures import Figure, figures, term_key, term_names
from .svg import COLORS, STYLE

__all__ = ["report_page"]


def report_page(
    runs: Sequence[Run], *, prefix: str = "", load: Sequence[str] = (), tokenizer: str | None = None
) -> str:
    """One HTML page about one or more runs.

    Args:
        runs: from :func:`~tinker_custom_loss.insight.read_run`.
        prefix: the ``prefix`` that :func:`~tinker_custom_loss.flatten` was given.
        load: modules with terms of kept steps that are not of the catalogue.
        tokenizer: for the tokens of kept steps: see :func:`~..tokenizing.decoder`.

    Raises:
        RequestError: a run holds no step with a ``loss_total``, or there is no such tokenizer.
    """
    prefix, decode = key_prefix(prefix), decoder(tokenizer)
    for run in runs:
        if not any(f"{prefix}loss_total" in metrics for metrics in run.steps.values()):
            raise RequestError(
                f'{run.directory} holds no step with "{prefix}loss_total"; if the keys have a '
                "prefix, give it"
            )
    style = f"{STYLE}\n{_asset('page.css')}{_asset('tokens.css')}"
    script = _asset("page.js")
    names = titles(runs)
    pulls: list[Mapping[str, object]] = []
    page = _Page(names, colors_of(runs, prefix), prefix)
    if len(runs) > 1:
        page.compare(runs)
    for index, run in enumerate(runs):
        text = ""
        if kept_steps(run.directory):  # only to compute them again is torch needed, and a second
            from .tokens import tokens_section

            texts = tokens_section(run, page.colors, load=load, decode=decode)
            text, pulls = texts.html, [*pulls, *texts.pulls]
        page.show(run, index, text)
    title = ", ".join(names)
    numbers = _json({key: _numbers(figure) for key, figure in page.charts.items()})
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{style}</style></head>
<body><header><h1>{escape(title)}</h1></header>
<main>{"".join(page.body)}</main>
<script type="application/json" id="numbers">{numbers}</script>
<script type="application/json" id="pulls">{_json(pulls)}</script>
<script>{script}</script></body></html>
"""


def colors_of(runs: Sequence[Run], prefix: str = "") -> dict[str, int]:
    """One colour a term, in all runs, charts and texts."""
    every = dict.fromkeys(name for run in runs for name in term_names(run, prefix))
    return {name: index for index, name in enumerate(sorted(every, key=lambda n: n != BASE))}


class _Page:
    """The body, and the charts that are in it by their ids."""

    def __init__(self, names: Sequence[str], colors: Mapping[str, int], prefix: str) -> None:
        self.names, self.colors, self._prefix = names, colors, prefix
        self.body: list[str] = []
        self.charts: dict[str, Figure] = {}

    def compare(self, runs: Sequence[Run]) -> None:
        """All runs beside each other."""
        large = comparison_figures(runs, self.names, self._prefix)
        small = [
            self._charts("all", found, "charts small")
            for _, found in term_figures(runs, self.names, self._prefix)
            if found
        ]
        self.body.append(
            f"<section>{self._charts('all', large)}"
            f"{comparison_tables(runs, self.names, self._prefix)}"
            f"{'<h3>The terms that they have in common</h3>' if small else ''}{''.join(small)}"
            "</section>"
        )

    def show(self, run: Run, index: int, tokens: str) -> None:
        """One run."""
        found = figures(run, self._prefix, colors=self.colors)
        several = len(self.names) > 1
        self.body.append(
            "<section>"
            + (f"<h2>{escape(self.names[index])}</h2>" if several else "")
            + f"<p>{_head(run, self._prefix)}</p>{_findings(run, self._prefix)}"
            f"{_last(run, self.colors, self._prefix)}{self._charts(f'r{index}', found)}{tokens}"
            f"{composition(run)}{_config(run)}</section>"
        )

    def _charts(self, where: str, found: Sequence[Figure], kind: str = "charts") -> str:
        self.charts |= {f"{where}-{figure.key}": figure for figure in found}
        charts = "".join(_figure(figure, f"{where}-{figure.key}") for figure in found)
        return f'<div class="{kind}">{charts}</div>'


def _head(run: Run, prefix: str) -> str:
    steps = list(run.steps)
    losses = [m[f"{prefix}loss_total"] for m in run.steps.values() if f"{prefix}loss_total" in m]
    head = (
        f"{len(steps)} steps, {steps[0]} to {steps[-1]}; loss <strong>{_number(losses[0])}</strong>"
        f" at first, <strong>{_number(losses[-1])}</strong> at last"
    )
    if run.torn:
        head += f"; {run.torn} lines are not whole and are left out"
    return head


def _findings(run: Run, prefix: str) -> str:
    judged = list(run.steps.values())[-JUDGED:]
    found = diagnose(judged, prefix=prefix, composition=run.composition)
    if not found:
        return f'<p class="quiet">Nothing odd in the last {len(judged)} steps.</p>'
    items = "".join(
        f"<li><strong>{escape(f.message)}</strong>: {escape(f.advice)}.</li>" for f in found
    )
    return f'<ul class="findings">{items}</ul>'


def _last(run: Run, colors: Mapping[str, int], prefix: str) -> str:
    """First and last numbers of every term."""
    end = [*run.steps][-1]
    cells = []
    for name in term_names(run, prefix):
        having = [
            (step, row)
            for step, row in run.steps.items()
            if prefix + term_key(name, "value") in row
        ]
        if not having:
            continue
        (_, first), (at, last) = having[0], having[-1]
        quantities = ("value", "weight", "contribution", "grad_norm_weighted", "cosine_to_total")
        numbers = [first.get(prefix + term_key(name, "value"))]
        numbers += [last.get(prefix + term_key(name, quantity)) for quantity in quantities]
        gone = "" if at == end else f" (last at step {at})"
        cells.append(
            f'<tr><th scope="row">{_swatch(colors[name])} {escape(name)}{gone}</th>'
            + "".join(f"<td>{_number(number)}</td>" for number in numbers)
            + "</tr>"
        )
    heads = ("term", "first value", "last value", "weight", "w · value", "w · |∇|", "cosine")
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>{"".join(cells)}</table></div>'


def _config(run: Run) -> str:
    if not run.config:
        return ""
    text = escape(json.dumps(run.config, indent=2))
    return f"<details><summary>config.json</summary><pre>{text}</pre></details>"


def _figure(figure: Figure, key: str) -> str:
    legend = "".join(
        f"<li>{_swatch(figure.colors[name])} {escape(name)}</li>"
        for name in figure.series
        if name in figure.colors
    )
    lost = sum(s.non_finite for s in figure.series.values())
    note = [figure.caption] if figure.caption else []
    note += [f"{lost} values were not finite and are not drawn"] if lost else []
    return (
        f'<figure id="{key}"><h3>{escape(figure.title)}</h3>{figure.svg}'
        + (f'<ul class="legend">{legend}</ul>' if legend else "")
        + '<p class="readout" aria-live="polite"></p>'
        + (f"<figcaption>{escape('; '.join(note))}</figcaption>" if note else "")
        + "</figure>"
    )


def _swatch(index: int) -> str:
    return (
        '<svg class="key" viewBox="0 0 10 10" aria-hidden="true">'
        f'<rect class="swatch c{index % len(COLORS)}" width="10" height="10"/></svg>'
    )


def _numbers(figure: Figure) -> dict[str, object]:
    """What the readout under a chart shows, to four digits."""
    first, last = span(figure.steps)
    return {
        "steps": figure.steps,
        "plot": [figure.left, WIDTH - RIGHT, WIDTH],
        "cells": figure.cells,
        "length": last - first + (usual_distance(figure.steps) if figure.cells else 0),
        "series": {name: _readable(series) for name, series in figure.series.items()},
    }


def _readable(series: Bucketed) -> dict[str, object]:
    shown: dict[str, object] = {"mean": _rounded(series.mean)}
    if any(high > low for low, high in zip(series.low, series.high, strict=True)):
        shown |= {"low": _rounded(series.low), "high": _rounded(series.high)}
    if series.non_finite:
        shown["lost"] = series.lost
    return shown


def _rounded(values: Sequence[float]) -> list[float | None]:
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values]


def _json(value: object) -> str:
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")  # a name may look like a tag


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
