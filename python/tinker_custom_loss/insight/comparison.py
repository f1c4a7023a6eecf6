"""A replayed step beside the step as it was, in lines of at most 80 columns."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ..description import versions
from ..wording import counted
from .kept import KeptStep
from .series import BASE, short

if TYPE_CHECKING:
    from .replaying import Replay

__all__ = ["comparison"]

_WIDTH = 80


def comparison(replay: Replay) -> Iterator[str]:
    """What :class:`~.replaying.Replay` prints."""
    step, was, now = replay.step, replay.step.outcome, replay.again
    number = "without a number" if step.step is None else str(step.step)
    datums = counted(len(step.logprobs), "datum")
    yield f"step {number}: {datums}, {counted(_values(step), 'logprob')}"
    for sentence in replay.changes:
        yield f"  {sentence}"
    if replay.is_same and not replay.changes:
        if was.error is None:
            yield f"bit-equal: the loss {short(was.loss_total)}, the gradient and the record"
        else:
            yield f"reproduced: {_said(was.error)}"
        return
    if was.error is not None or now.error is not None:
        yield f"then: {_said(was.error) if was.error else f'loss {short(was.loss_total)}'}"
        yield f"now:  {_said(now.error) if now.error else f'loss {short(now.loss_total)}'}"
    if not replay.changes:
        yield from _reasons(step)
    if was.record is not None or now.record is not None:
        yield from _table(was.record, now.record)
    if (change := replay.gradient_change) is not None:
        before, after, cosine = change
        yield (
            f"gradient: norm {before:.6g} then, {after:.6g} now; cosine {cosine:+.6f} "
            "(with respect to the logprobs)"
        )


def _reasons(step: KeptStep) -> Iterator[str]:
    was = step.description["versions"]
    others = [
        f"{name} {was.get(name)} then, {version} now"
        for name, version in versions().items()
        if was.get(name) != version
    ]
    if step.device != "cpu":
        others.append(f"computed on {step.device} then, on the CPU now")
    yield "NOT the same, although nothing was changed: " + (
        "; ".join(others)
        or "a term depends on more than its datums, logprobs and params, or was edited"
    )


def _said(error: Mapping[str, Any]) -> str:
    return f"{error['type']}: {error['message']}"


def _values(step: KeptStep) -> int:
    return sum(tensor.numel() for tensor in step.logprobs)


def _table(was: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> Iterator[str]:
    """Two rows a term: then, now."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("term", no_wrap=True, overflow="ellipsis", max_width=18)
    table.add_column("")
    for name in ("value", "weight", "w·value", "w·|∇|", "cos"):
        table.add_column(name, justify="right", no_wrap=True)
    before, after = _terms(was), _terms(now)
    names = dict.fromkeys([*before, *after])
    rows = [(name, before.get(name), after.get(name)) for name in names]
    for name, then, again in [*rows, ("total", _total(was), _total(now))]:
        table.add_row(name, "then", *_cells(then))
        table.add_row("", "now", *_cells(again))
    text = io.StringIO()
    Console(file=text, width=_WIDTH, color_system=None).print(table)
    yield from (line.rstrip() for line in text.getvalue().splitlines())


def _terms(record: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    if record is None:
        return {}
    base = record["base_loss"]
    terms: dict[str, Mapping[str, Any]] = {BASE: base} if base else {}
    return {**terms, **record["regularizers"]}


def _total(record: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if record is None:
        return None
    return {"value": record["loss_total"], "grad_norm": record["total_grad_norm"]}


def _cells(term: Mapping[str, Any] | None) -> list[str]:
    if term is None:
        return ["-"] * 5
    value, cosine = term.get("value"), term.get("cosine_to_total")
    return [
        short(value),
        short(term["weight"]) if "weight" in term else "",
        short(term.get("contribution", value)),
        short(term.get("grad_norm_weighted", term.get("grad_norm"))),
        "" if cosine is None else f"{cosine:+.2f}",
    ]
