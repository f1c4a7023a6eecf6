"""What was composed, from the ``config.json`` of a run, in a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

from ..run import Run

__all__ = ["composition"]

_HEADS = ("term", "function", "scope", "weight", "parameters")


def composition(run: Run) -> str:
    """The terms of a run's composition; "" if its ``config.json`` has none."""
    described = run.composition
    if described is None:
        return ""
    base = described.get("base_loss")
    rows: list[Mapping[str, Any]] = []
    if isinstance(base, Mapping):
        rows.append({"name": "base_loss", **base})
    rows += described["regularizers"]
    head = "".join(f'<th scope="col">{text}</th>' for text in _HEADS)
    versions = described.get("versions")
    of = (
        ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        if isinstance(versions, Mapping)
        else ""
    )
    return (
        f'<h3>The composition</h3><div class="wide"><table class="words"><thead><tr>{head}</tr>'
        f"</thead>{''.join(map(_row, rows))}</table></div>"
        f'<p class="quiet">{escape(of)}</p>'
    )


def _row(term: Mapping[str, Any]) -> str:
    params = term.get("params") or {}
    cells = (
        term.get("fn") or term.get("unnamed"),
        term.get("scope"),
        _weight(term.get("weight")),
        ", ".join(f"{name}={json.dumps(value)}" for name, value in params.items()),
    )
    off = " (not enabled)" if term.get("enabled") is False else ""
    return (
        f'<tr><th scope="row">{escape(str(term.get("name")))}{off}</th>'
        + "".join(f"<td>{escape(str(cell or ''))}</td>" for cell in cells)
        + "</tr>"
    )


def _weight(weight: Any) -> str:
    if not isinstance(weight, Mapping):
        return "" if weight is None else f"{weight:g}"
    at = weight.get("at") or {}
    steps = ", ".join(f"{value:g} at {step}" for step, value in at.items())
    return f"{weight.get('schedule')}: {steps}"
