"""How a figure is measured and printed: ``NAME VALUE (target T) ok|short``, a line each.

What stands behind it goes to standard error. ``figures.exs`` prints the same lines, and ``run.py``
reads both.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping

__all__ = ["detail", "figure", "medians", "milliseconds"]


def figure(name: str, value: float, target: float | None = None, *, at_least: bool = False) -> None:
    """Print one figure, which is to be at most its target, or ``at_least`` that."""
    if target is None:
        print(f"{name} {digits(value)} (no target)", flush=True)
        return
    met = value >= target if at_least else value <= target
    print(f"{name} {digits(value)} (target {target:g}) {'ok' if met else 'short'}", flush=True)


def medians(name: str, ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median milliseconds of each, taken in turn.

    Every other round goes in the other order: none is always the one with cold caches.
    """
    for function in ways.values():
        function()
    times: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(rounds):
        for way in ways if round_ % 2 else reversed(ways):
            times[way].append(milliseconds(ways[way]))
    found = {way: statistics.median(each) for way, each in times.items()}
    listed = ", ".join(f"{way} {digits(value)}" for way, value in found.items())
    detail(f"{name}: {listed} ms, medians of {rounds}")
    return found


def detail(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


def milliseconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def digits(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
