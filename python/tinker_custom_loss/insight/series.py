"""The history of a run: one series a quantity, read from flat metrics."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["BASE", "JUDGED", "History", "TermSeries", "bar", "key_prefix", "short", "sparkline"]

BASE = "base_loss"
JUDGED = 512
"""How many of the last steps are kept, and judged."""

_LEVELS = "▁▂▃▄▅▆▇█"
_EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass
class TermSeries:
    """What one term did: its numbers in each of the last steps, the latest last.

    The row of a step in which it had no part is empty, so that those of all terms are of the same
    steps.
    """

    rows: deque[Mapping[str, float]] = field(default_factory=lambda: deque(maxlen=JUDGED))

    def get(self, key: str) -> float | None:
        return self.last.get(key)

    @property
    def last(self) -> Mapping[str, float]:
        """Its row of the last step."""
        return self.rows[-1]

    @property
    def values(self) -> list[float]:
        """Its value at each step; nan where it has none."""
        return [row.get("value", math.nan) for row in self.rows]

    @property
    def contribution(self) -> float:
        """What it added to the loss; the base loss has weight 1."""
        return self.last.get("contribution", self.last.get("value", 0.0))

    @property
    def taken(self) -> list[Mapping[str, float]]:
        """The rows of the steps in which it had a part."""
        return [row for row in self.rows if row]


class History:
    """Flat metrics in, series out.

    A term is whatever has keys ``{prefix}regularizers/<name>/…``: no name holds a ``/``. Of the
    ``composition``, if that is known, ``schedules`` has what each schedule gives at some steps.
    """

    def __init__(self, prefix: str = "", composition: Mapping[str, Any] | None = None) -> None:
        self._prefix = key_prefix(prefix)
        self.schedules: dict[str, Mapping[str, float]] = {}
        self.compose(composition)
        self.logprob_counts: deque[float] = deque(maxlen=JUDGED)
        self.step: int | None = None
        self.count = 0
        self.losses: deque[float] = deque(maxlen=JUDGED)
        self.schedule_steps: deque[float] = deque(maxlen=JUDGED)
        self.norm: float | None = None
        self.terms: dict[str, TermSeries] = {}

    def compose(self, composition: Mapping[str, Any] | None) -> None:
        """Take ``composition`` for what is composed from now on."""
        self.schedules = {
            term["name"]: term["weight"]["at"]
            for term in (composition or {}).get("regularizers", ())
            if isinstance(term["weight"], Mapping)
        }

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """Take in one step. Metrics of others are passed over."""
        self.step = step
        self.count += 1
        self.losses.append(metrics.get(f"{self._prefix}loss_total", math.nan))
        self.norm = metrics.get(f"{self._prefix}total_grad_norm")
        if (scheduled := metrics.get(f"{self._prefix}schedule_step")) is not None:
            self.schedule_steps.append(scheduled)
        self.logprob_counts.append(metrics.get(f"{self._prefix}logprob_count", math.nan))
        taken = self._by_term(metrics)
        for name in taken:
            if name not in self.terms:
                self.terms[name] = TermSeries()
                self.terms[name].rows.extend({} for _ in range(len(self.losses) - 1))
        for name, term in self.terms.items():
            term.rows.append(taken.get(name, {}))

    def shares(self) -> dict[str, float]:
        """Each term's part of ``Σ |contribution|``, in 0..1."""
        sizes = {
            name: abs(term.contribution) if math.isfinite(term.contribution) else 0.0
            for name, term in self.terms.items()
        }
        whole = sum(sizes.values())
        return {name: size / whole if whole else 0.0 for name, size in sizes.items()}

    def _by_term(self, metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
        terms: dict[str, dict[str, float]] = {}
        base, regularizers = f"{self._prefix}{BASE}/", f"{self._prefix}regularizers/"
        for key, value in metrics.items():
            if key.startswith(base):
                terms.setdefault(BASE, {})[key.removeprefix(base)] = value
            elif key.startswith(regularizers):
                name, _, quantity = key.removeprefix(regularizers).partition("/")
                terms.setdefault(name, {})[quantity] = value
        return terms


def key_prefix(prefix: str) -> str:
    """What keys begin with where :func:`~tinker_custom_loss.flatten` was given ``prefix``."""
    return f"{prefix.rstrip('/')}/" if prefix else ""


def sparkline(values: Sequence[float], width: int) -> str:
    """The last ``width`` values between their least and greatest; ``?`` where one is not finite."""
    last = list(values)[-width:]
    finite = [value for value in last if math.isfinite(value)]
    if not finite:
        return "?" * len(last)
    low, high = min(finite), max(finite)
    scale = (len(_LEVELS) - 1) / (high - low) if high > low else 0.0
    return "".join(
        _LEVELS[round((value - low) * scale)] if math.isfinite(value) else "?" for value in last
    )


def bar(share: float, width: int) -> str:
    """``share`` (0..1) of ``width`` columns, to an eighth of a column."""
    eighths = round(share * width * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[rest] if rest else "")


def short(value: float | None) -> str:
    """A number in at most nine columns; ``-`` for what was not computed."""
    if value is None:
        return "-"
    text = f"{value:.4g}"
    return text if len(text) <= 9 else f"{value:.2e}"
