"""How a figure is measured and printed: ``NAME VALUE (target T) ok|short``, a line each."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence

__all__ = ["figure", "medians", "milliseconds"]


def figure(name: str, value: float, target: float | None = None) -> None:
    """Print one figure, which is to be at most its target."""
    if target is None:
        print(f"{name} {value:.3g} (no target)", flush=True)
        return
    verdict = "ok" if value <= target else "short"
    print(f"{name} {value:.3g} (target {target:g}) {verdict}", flush=True)


def medians(name: str, functions: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """The median milliseconds of each, taken in turn; they are shown on standard error.

    Every other round goes in the other order: none is always the one with cold caches.
    """
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    for round_ in range(rounds):
        order = range(len(functions)) if round_ % 2 else reversed(range(len(functions)))
        for index in order:
            times[index].append(milliseconds(functions[index]))
    found = [statistics.median(each) for each in times]
    listed = ", ".join(f"{value:.3f}" for value in found)
    print(f"  {name}: {listed} ms, medians of {rounds}", file=sys.stderr)
    return found


def milliseconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3
