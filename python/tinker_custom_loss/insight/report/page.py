"""The page: one file, no request to anywhere, charts that need no script."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from html import escape
from importlib import resources

from ...errors import RequestError
from ..diagnosis import diagnose
from ..recorder import Run
from ..series import BASE, JUDGED, key_prefix
from ..tokenizing import decoder
from .composition import composition
from .figures import Figure, comparison, figures, term_names
from .svg import COLORS, RIGHT, STYLE, WIDTH
from .tokens import tokens_section

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
    across = comparison(runs, prefix)
    body = [_figure(across, "all")] if across else []
    shown = {"all": across} if across else {}
    charts: dict[str, Figure] = {f"{key}-comparison": figure for key, figure in shown.items()}
    for index, run in enumerate(runs):
        found = figures(run, prefix)
        charts |= {f"r{index}-{figure.key}": figure for figure in found}
        body.append(_section(run, found, index, prefix, len(runs) > 1))
        body.append(tokens_section(run, load=load, decode=decode))
    title = ", ".join(run.title for run in runs)
    numbers = json.dumps({key: _numbers(figure) for key, figure in charts.items()}, allow_nan=False)
    numbers = numbers.replace("<", "\\u003c")  # a name may look like a tag
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
<main>{"".join(body)}</main>
<script type="application/json" id="numbers">{numbers}</script>
<script>{script}</script></body></html>
"""


def _section(run: Run, found: Sequence[Figure], index: int, prefix: str, named: bool) -> str:
    steps = list(run.steps)
    head = f"{len(steps)} steps, {steps[0]} to {steps[-1]}"
    if run.torn:
        head += f"; {run.torn} lines were cut short and are left out"
    charts = "".join(_figure(figure, f"r{index}") for figure in found)
    return (
        "<section>" + (f"<h2>{escape(run.title)}</h2>" if named else "") + f"<p>{head}</p>"
        f"{_findings(run, prefix)}{_last(run, prefix)}"
        f'<div class="charts">{charts}</div>{composition(run)}{_config(run)}</section>'
    )


def _findings(run: Run, prefix: str) -> str:
    judged = list(run.steps.values())[-JUDGED:]
    found = diagnose(judged, prefix=prefix, composition=run.composition)
    if not found:
        return f'<p class="quiet">Nothing odd in the last {len(judged)} steps.</p>'
    items = "".join(
        f"<li><strong>{escape(f.message)}</strong>: {escape(f.advice)}.</li>" for f in found
    )
    return f'<ul class="findings">{items}</ul>'


def _last(run: Run, prefix: str) -> str:
    """First and last numbers of every term."""
    rows = list(run.steps.values())
    cells = []
    for index, name in enumerate(term_names(run, prefix)):
        term = f"{prefix}{BASE if name == BASE else f'regularizers/{name}'}"
        having = [row for row in rows if f"{term}/value" in row]
        if not having:
            continue
        first, last = having[0], having[-1]
        numbers = (
            first[f"{term}/value"],
            last[f"{term}/value"],
            last.get(f"{term}/weight"),
            last.get(f"{term}/contribution"),
            last.get(f"{term}/grad_norm_weighted", last.get(f"{term}/grad_norm")),
            last.get(f"{term}/cosine_to_total"),
        )
        cells.append(
            f'<tr><th scope="row">{_swatch(index)} {escape(name)}</th>'
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


def _figure(figure: Figure, where: str) -> str:
    legend = "".join(
        f"<li>{_swatch(figure.colors[name])} {escape(name)}</li>"
        for name in figure.series
        if name in figure.colors
    )
    lost = sum(s.non_finite for s in figure.series.values())
    note = f"; {lost} values were not finite and are not drawn" if lost else ""
    return (
        f'<figure id="{where}-{figure.key}"><h3>{escape(figure.title)}</h3>{figure.svg}'
        + (f'<ul class="legend">{legend}</ul>' if figure.legend else "")
        + f'<p class="readout" aria-live="polite"></p>'
        f"<figcaption>{escape(figure.caption)}{note}</figcaption></figure>"
    )


def _swatch(index: int) -> str:
    return (
        '<svg class="key" viewBox="0 0 10 10" aria-hidden="true">'
        f'<rect class="swatch c{index % len(COLORS)}" width="10" height="10"/></svg>'
    )


def _numbers(figure: Figure) -> dict[str, object]:
    """What the readout under a chart shows, to four digits."""
    return {
        "steps": figure.steps,
        "plot": [figure.left, WIDTH - RIGHT, WIDTH],
        "series": {
            name: {"mean": _rounded(s.mean)}
            | ({} if s.low == s.high else {"low": _rounded(s.low), "high": _rounded(s.high)})
            for name, s in figure.series.items()
        },
    }


def _rounded(values: Sequence[float]) -> list[float | None]:
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
