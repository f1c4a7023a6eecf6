"""Long series, made short without hiding anything: every bucket keeps its least and greatest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Bucketed", "bucket", "edges"]


@dataclass(frozen=True)
class Bucketed:
    """One series over buckets of steps; nan where a bucket holds no finite value.

    ``non_finite`` counts what was left out of each bucket because it was nan or infinite.
    """

    mean: list[float]
    low: list[float]
    high: list[float]
    non_finite: int


def edges(steps: Sequence[int], buckets: int) -> list[tuple[int, int]]:
    """Index ranges ``[start, end)`` over ``steps``, nearly equal, at most ``buckets`` of them."""
    count = min(len(steps), buckets)
    bounds = [index * len(steps) // count for index in range(count + 1)] if count else [0]
    return list(itertools.pairwise(bounds))


def bucket(values: Sequence[float | None], ranges: Sequence[tuple[int, int]]) -> Bucketed:
    """``values``, one a step, over the ranges of :func:`edges`; None is a value that is absent."""
    mean, low, high, lost = [], [], [], 0
    for start, end in ranges:
        given = [value for value in values[start:end] if value is not None]
        finite = [value for value in given if math.isfinite(value)]
        lost += len(given) - len(finite)
        mean.append(math.fsum(finite) / len(finite) if finite else math.nan)
        low.append(min(finite, default=math.nan))
        high.append(max(finite, default=math.nan))
    return Bucketed(mean, low, high, lost)
