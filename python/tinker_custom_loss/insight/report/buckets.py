"""Long series, made short without hiding anything: every bucket keeps its least and greatest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Bucketed", "Range", "Steps", "bucket", "edges", "edges_by_step"]

Range = tuple[int, int]
"""Indexes of steps, ``[start, end)``."""
Steps = Sequence[tuple[int, int]]
"""The first and the last step of each bucket."""


@dataclass(frozen=True)
class Bucketed:
    """One series over buckets of steps; nan where a bucket holds no finite value.

    ``lost`` counts what was left out of each bucket because it was nan or infinite; ``passed`` are
    the buckets in which no step was recorded, as where another run has steps between.
    """

    mean: list[float]
    low: list[float]
    high: list[float]
    lost: list[int]
    passed: frozenset[int] = frozenset()

    @property
    def non_finite(self) -> int:
        """How many values are not drawn because they are nan or infinite."""
        return sum(self.lost)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return all(math.isnan(value) for value in self.mean)


def edges(steps: Sequence[int], buckets: int) -> list[Range]:
    """Ranges over ``steps``, of nearly equally many, at most ``buckets`` of them."""
    count = min(len(steps), buckets)
    bounds = [index * len(steps) // count for index in range(count + 1)] if count else [0]
    return list(itertools.pairwise(bounds))


def edges_by_step(steps: Sequence[int], buckets: int) -> list[Range]:
    """Ranges over ``steps`` that are equally long in steps; those that hold none are left out."""
    if len(steps) <= buckets:
        return edges(steps, buckets)
    width = (steps[-1] + 1 - steps[0]) / buckets
    found, start = [], 0
    for _, group in itertools.groupby(steps, lambda step: int((step - steps[0]) / width)):
        end = start + sum(1 for _ in group)
        found.append((start, end))
        start = end
    return found


def bucket(values: Sequence[float | None], ranges: Sequence[Range]) -> Bucketed:
    """``values``, one a step, over ``ranges``; None is a value that is absent."""
    mean, low, high, lost = [], [], [], []
    for start, end in ranges:
        given = [value for value in values[start:end] if value is not None]
        finite = [value for value in given if math.isfinite(value)]
        lost.append(len(given) - len(finite))
        mean.append(_mean(finite) if finite else math.nan)
        low.append(min(finite, default=math.nan))
        high.append(max(finite, default=math.nan))
    return Bucketed(mean, low, high, lost)


def _mean(values: Sequence[float]) -> float:
    try:
        return math.fsum(values) / len(values)
    except OverflowError:
        return math.fsum(value / len(values) for value in values)
