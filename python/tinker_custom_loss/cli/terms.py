"""``python -m tinker_custom_loss terms``: what may be named as a term, and what one takes."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from ..regularizer import nearest

__all__ = ["describe", "overview"]

_WIDEST = 100
_NARROWEST = 60
_COLUMN = 36
"""Longer names have a line of their own."""

_Term = Mapping[str, Any]


def overview(terms: Sequence[_Term]) -> Iterator[str]:
    """Lines: the terms of this package, then those of each loaded module, one after another."""
    width = max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size().columns))
    for module, group in groupby(terms, key=_module):
        members = list(group)
        column = min(max(len(term["name"]) for term in members) + 2, _COLUMN)
        yield module or "built in"
        for term in members:
            yield from _row(term["name"], _summary(term), column, width)
        yield ""
    yield f"For what one takes, name it: terms {terms[-1]['name']}"


def describe(terms: Sequence[_Term], names: Sequence[str]) -> Iterator[str]:
    """Lines: all that there is to know about the terms of these names.

    Raises:
        LookupError: there is no term of that name; the message has the nearest.
    """
    known = {term["name"]: term for term in terms}
    for name in names:
        if name not in known:
            raise LookupError(f'there is no term "{name}"; {nearest(name, [*known])}')
    for name in names:
        term = known[name]
        kinds = [term["kind"]] + ["async"] * term["async"] + [f"scope {term['scope']}"]
        reads = [f"reads {', '.join(term['inputs'])}"] if term["inputs"] else []
        yield f"{name}  ({', '.join(kinds + reads)})"
        yield from (f"    {_parameter(param)}" for param in term["params"])
        yield ""
        yield textwrap.indent(term["doc"] or "(no docstring)", "    ")
        yield ""


def _module(term: _Term) -> str:
    return "" if term["kind"] == "builtin" else term["name"].partition(":")[0]


def _summary(term: _Term) -> str:
    first = term["doc"].partition("\n\n")[0] or "(no docstring)"
    return " ".join(first.replace("``", "").split())


def _row(name: str, summary: str, column: int, width: int) -> Iterator[str]:
    lines = textwrap.wrap(summary, width - 2 - column)
    if len(name) + 2 > column:
        yield f"  {name}"
    else:
        yield f"  {name:{column}}{lines.pop(0)}"
    yield from (f"  {'':{column}}{line}" for line in lines)


def _parameter(param: Mapping[str, Any]) -> str:
    annotation = f": {param['type']}" if param["type"] and not param["choices"] else ""
    default = "" if param["required"] else f" = {param['default']!r}"
    choices = f"  ({' | '.join(map(str, param['choices']))})" if param["choices"] else ""
    return f"{param['name']}{annotation}{default}{choices}"
