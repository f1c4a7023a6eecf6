"""Which term drives training, which fights it and which is dead, while it happens.

On a terminal: a table that is drawn anew with every step. Elsewhere: plain lines of at most 80
columns, and the table once at the end.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self, TextIO, TypeVar, cast

from rich.console import Console, Group, RenderableType
from rich.live import Live as RichLive
from rich.table import Table
from rich.text import Text

from ..errors import RequestError
from ..record import flatten
from .diagnosis import findings
from .encodable import Encodable
from .recorder import Recorder
from .series import BASE, History, TermSeries, bar, short, sparkline

__all__ = ["Live", "live", "watch"]

R = TypeVar("R", bound=Mapping[str, Any])

_NARROW = 80
_SHARE, _TREND = 8, 10
_PLAIN_LINES = 12


def live(
    recorder: Recorder | None = None,
    *,
    total: int | None = None,
    prefix: str = "",
    composition: Mapping[str, Any] | None = None,
    file: TextIO | None = None,
) -> Live:
    """A table of a run, for the extent of a ``with``::

        with Recorder("runs/first") as recorder, live(recorder, total=200):
            ...

    Without a recorder it is a sink itself: ``with live() as table: table.log(metrics, step)``.

    Args:
        recorder: whose steps are shown.
        total: the number of steps there will be, for progress and the time that is left.
        prefix: the ``prefix`` that :func:`~tinker_custom_loss.flatten` was given.
        composition: what :meth:`Composer.describe` gives, from which it is known which weights are
            schedules; a recorder that is a composer's own knows it by itself.
        file: where it is drawn; the standard output if None.
    """
    return Live(recorder, total=total, prefix=prefix, composition=composition, file=file)


def watch(
    records: Iterable[R],
    *,
    total: int | None = None,
    composition: Mapping[str, Any] | None = None,
    file: TextIO | None = None,
) -> Iterator[R]:
    """Show the records of steps as they come by, and hand them on::

        for record in watch(train()):
            ...

    The arguments are those of :func:`live`.
    """
    with live(total=total, composition=composition, file=file) as table:
        for step, record in enumerate(records):
            table.log(flatten(record), step)
            yield record


class Live:
    """The table behind :func:`live`; a sink while its ``with`` block lasts."""

    def __init__(
        self,
        recorder: Recorder | None = None,
        *,
        total: int | None = None,
        prefix: str = "",
        composition: Mapping[str, Any] | None = None,
        file: TextIO | None = None,
    ) -> None:
        if total is not None and total < 1:
            raise RequestError(f"total must be a positive number of steps, got {total}")
        self._recorder = recorder
        self._total = total
        self._history = History(prefix, composition)
        self._composition = composition
        self._file = cast(TextIO, Encodable(file if file is not None else sys.stdout))
        self._console = Console(file=self._file)
        self._terminal = self._console.is_terminal
        self._display = RichLive(console=self._console, auto_refresh=False)
        self._every = max(1, total // _PLAIN_LINES) if total else 10
        self._started = time.monotonic()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Show one more step."""
        if self._recorder is not None and self._composition is None:
            self._history.compose(self._recorder.composition)
        self._history.add(metrics, step)
        if self._terminal:
            self._display.update(self._screen(), refresh=True)
        elif (self._history.count - 1) % self._every == 0:
            self._print(plain_line(self._history))

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if self._terminal:
            self._display.start()
        if self._recorder is not None:
            self._recorder.attach(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._recorder is not None:
            self._recorder.detach(self)
        if self._terminal:
            self._display.stop()
        elif self._history.count:
            plain = Console(file=self._file, width=_NARROW, color_system=None)
            plain.print()
            table = table_of(self._history, _NARROW)
            plain.print(table, *_remarks(self._history), sep="\n")

    def _print(self, line: str) -> None:
        print(line, file=self._file, flush=True)

    def _screen(self) -> RenderableType:
        table = table_of(self._history, self._console.width)
        return Group(self._heading(), table, *_remarks(self._history))

    def _heading(self) -> Text:
        history = self._history
        loss = history.losses[-1]
        head = Text(no_wrap=True, overflow="ellipsis")
        at = f"{history.count}/{self._total} steps" if self._total else f"step {history.step}"
        head.append(at, style="bold")
        head.append(f"  loss {short(loss)}  ")
        head.append(sparkline(history.losses, 24), style="cyan")
        head.append(f"  |∇| {short(history.norm)}")
        if self._total:
            head.append(f"  {_minutes(self._left(self._total))} left", style="dim")
        return head

    def _left(self, total: int) -> float:
        done = self._history.count
        return (time.monotonic() - self._started) / done * max(0, total - done)


def plain_line(history: History) -> str:
    """One step in at most 80 columns: the loss, and what each term added to it."""
    line = f"{history.step:>5}  loss {short(history.losses[-1])} ="
    cells = [f"{name} {term.contribution:.3g}" for name, term in history.terms.items() if term.last]
    for done, cell in enumerate(cells):
        rest = len(cells) - done
        tail = f" + {rest} more"
        sign = " + " if done else " "
        room = _NARROW - (len(tail) if rest > 1 else 0)
        if len(line) + len(sign) + len(cell) > room:
            return line + (tail if done else f" {rest} terms")
        line += sign + cell
    return line


def table_of(history: History, width: int) -> Table:
    """A row a term. Norms and cosines are with respect to the logprobs.

    Where ``width`` columns are too few, the trend is shorter, or missing, or else the share is: no
    number is cut short.
    """
    for share in (_SHARE, 0):
        room = width - _columns_of(_table(history, share, 0))
        if room >= 0:
            break
    trend = min(_TREND, room - 1)
    return _table(history, share, trend if trend >= _TREND // 2 else 0)


def _columns_of(table: Table) -> int:
    return Console(width=1_000).measure(table).maximum


def _table(history: History, share: int, trend: int) -> Table:
    """``share`` and ``trend`` columns wide; without those that are 0."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), expand=False)
    table.add_column("term", no_wrap=True, overflow="ellipsis", max_width=16)
    for name in ("value", "weight", "w·value"):
        table.add_column(name, justify="right", no_wrap=True)
    if share:
        table.add_column("share", no_wrap=True, width=share)
    table.add_column("w·|∇|", justify="right", no_wrap=True)
    table.add_column("cos", justify="right", no_wrap=True)
    if trend:
        table.add_column("trend", no_wrap=True, width=trend)
    shares = history.shares()
    for name, term in history.terms.items():
        values = [row.get("value", math.nan) for row in term.taken]
        table.add_row(
            name,
            short(term.get("value")),
            "" if name == BASE else short(term.get("weight")),
            short(term.contribution if term.last else None),
            *([bar(shares[name], share)] if share else []),
            short(term.get("grad_norm" if name == BASE else "grad_norm_weighted")),
            _cosine(term),
            *([sparkline(values, trend)] if trend else []),
        )
    return table


def _remarks(history: History) -> list[Text]:
    return [Text(f"! {finding}", style="yellow") for finding in findings(history)]


def _cosine(term: TermSeries) -> Text:
    """Green: it pulls with the step as a whole; red: against it."""
    if term.get("skipped"):
        return Text("skipped", style="yellow")
    cosine = term.get("cosine_to_total")
    if cosine is None or not math.isfinite(cosine):
        return Text("-", style="dim")
    style = "green" if cosine > 0.1 else "red" if cosine < -0.1 else "dim"
    return Text(f"{cosine:+.2f}", style=style)


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
