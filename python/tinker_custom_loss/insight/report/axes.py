"""Where numbers lie on the paper."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from .buckets import Steps

__all__ = [
    "BOTTOM",
    "HEIGHT",
    "LEFT",
    "RIGHT",
    "TOP",
    "WIDTH",
    "Axes",
    "axes_over",
    "span",
    "usual_distance",
]

WIDTH, HEIGHT = 480, 190
LEFT, RIGHT, TOP, BOTTOM = 50, 8, 8, 20

_BELOW = 14  # units of height for what a logarithm cannot show
_DECADES = 9


@dataclass(frozen=True)
class Axes:
    """``steps`` on x, to scale; a linear or logarithmic range on y.

    On a logarithmic one, what is less than ``low`` lies on the floor, which is set apart and named
    ``floor``: ``"0"``, or ``"<"`` and the least that is shown.
    """

    steps: Steps
    low: float
    high: float
    log: bool = False
    floor: str | None = None

    def x(self, index: int) -> float:
        first, last = span(self.steps)
        middle = (self.steps[index][0] + self.steps[index][1]) / 2
        return LEFT + (WIDTH - LEFT - RIGHT) * (middle - first) / max(1, last - first)

    def y(self, value: float) -> float:
        bottom = HEIGHT - BOTTOM
        if self.log:
            if value < self.low:
                return bottom
            bottom -= _BELOW if self.floor else 0
            low, high, at = (math.log10(x) for x in (self.low, self.high, value))
        else:  # halves, since the difference of two floats may be none
            low, high, at = self.low / 2, self.high / 2, value / 2
        return bottom - (bottom - TOP) * ((at - low) / (high - low))

    def ticks(self) -> list[tuple[float, str]]:
        """Heights, and what is written beside them."""
        if self.log:
            marks = _decades(self.low, self.high)
        else:
            step = _nice(self.high / 5 - self.low / 5)
            first, last = math.ceil(self.low / step), math.floor(self.high / step + 1e-9)
            marks = [n * step for n in range(first, last + 1)]
        rules = [(self.y(mark), f"{mark:.4g}") for mark in marks]
        return rules + ([(self.y(-math.inf), self.floor)] if self.floor else [])


def axes_over(
    values: Iterable[float], steps: Steps, *, log: bool = False, zero: bool = False
) -> Axes:
    """Axes that hold all finite ``values``; logarithmic only where that shows more."""
    finite = [value for value in values if math.isfinite(value)]
    positive = [value for value in finite if value > 0]
    if log and positive and min(finite) >= 0 and max(positive) / 100 > min(positive):
        high = max(positive)
        least = min(positive)
        low = max(least, high * 10.0**-_DECADES)
        small = low > least
        floor = f"<{low:.0e}" if small else "0" if len(positive) < len(finite) else None
        return Axes(steps, low if floor else low / 1.2, _at_most(high * 1.2), log=True, floor=floor)
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    margin = (high / 2 - low / 2) * 0.08
    if not margin > abs(high) * 1e-13:  # all the same, but for rounding
        margin = abs(high) * 0.1 or 1.0
        return Axes(steps, _at_most(low - margin), _at_most(high + margin))
    # The line at 0 is the frame where nothing is beyond it.
    low = low if low == 0.0 else _at_most(low - margin)
    high = high if high == 0.0 else _at_most(high + margin)
    return Axes(steps, low, high)


def span(steps: Steps) -> tuple[int, int]:
    """The first and the last step."""
    return (steps[0][0], steps[-1][1]) if steps else (0, 0)


def usual_distance(steps: Steps) -> float:
    """From the end of a bucket to the beginning of the next, most often."""
    apart = [after[0] - before[1] for before, after in itertools.pairwise(steps)]
    return statistics.median(apart) if apart else 1


def _at_most(value: float) -> float:
    return max(-1.7e308, min(1.7e308, value))


def _decades(low: float, high: float) -> list[float]:
    exponents = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    if len(exponents) < 3:  # 1, 2, 5 of each
        scales = [
            m * 10.0**e for e in range(exponents.start - 1, exponents.stop + 1) for m in (1, 2, 5)
        ]
        return [mark for mark in scales if low <= mark <= high][:: 1 if len(exponents) < 2 else 2]
    return [10.0**e for e in exponents][:: max(1, len(exponents) // 5)]


def _nice(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next((n * power for n in (1, 2, 5) if n * power >= step * 0.999), 10 * power)
