"""A run, read from its directory. Nothing here needs torch: a report is made without it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..errors import RequestError

__all__ = ["CONFIG", "METRICS", "STEPS", "STEP_SUFFIX", "Run", "entry_of", "kept_steps", "read_run"]

METRICS = "metrics.jsonl"
CONFIG = "config.json"
STEPS = "steps"
STEP_SUFFIX = ".safetensors"

_DECODER = msgspec.json.Decoder(dict[str, float])


@dataclass(frozen=True, repr=False)
class Run:
    """A recorded run.

    ``steps`` holds each step's metrics by its number, in ascending order; ``torn`` is how many
    lines were cut short by the end of a process.
    """

    directory: Path
    config: Mapping[str, Any]
    steps: Mapping[int, Mapping[str, float]]
    torn: int

    @property
    def title(self) -> str:
        """The name of its directory."""
        return self.directory.resolve().name

    @property
    def composition(self) -> Mapping[str, Any] | None:
        """What was composed, as ``Composer.describe()`` has it; None if ``config`` does not say."""
        described = self.config.get("composition")
        terms = described.get("regularizers") if isinstance(described, Mapping) else None
        if not isinstance(terms, list) or not all(
            isinstance(term, Mapping) and {"name", "weight"} <= term.keys() for term in terms
        ):
            return None
        return described

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r}, {len(self.steps)} steps)"


def read_run(directory: str | os.PathLike[str]) -> Run:
    """Read what a :class:`Recorder`, or tinker-cookbook's ``JsonLogger``, wrote.

    Raises:
        RequestError: the directory holds no ``metrics.jsonl``.
    """
    root = Path(directory)
    try:
        lines = (root / METRICS).read_bytes().split(b"\n")
    except FileNotFoundError:
        raise RequestError(f"{root} holds no run: it has no {METRICS}") from None
    steps: dict[int, dict[str, float]] = {}
    torn = 0
    for line in filter(None, lines):
        entry = entry_of(line)
        if entry is None:
            torn += 1
            continue
        step, metrics = entry
        earlier = steps.setdefault(step, metrics)
        if earlier is metrics:
            continue
        if any(key.endswith("loss_total") and key in earlier for key in metrics):
            steps[step] = metrics  # the step was computed again, perhaps of other terms
        else:
            earlier.update(metrics)  # others write one step in several lines
    return Run(root, _read_config(root / CONFIG), dict(sorted(steps.items())), torn)


def entry_of(line: bytes) -> tuple[int, dict[str, float]] | None:
    """The step and the numbers of a line; None if it is not the whole of one."""
    try:
        entry = _numbers(line)
        step = entry.pop("step")
        return (int(step), entry) if int(step) == step else None
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError):
        return None


def _numbers(line: bytes) -> dict[str, float]:
    try:
        return _DECODER.decode(line)
    except ValueError:  # there is a nan, which is no JSON but what json writes, or a text
        entry = json.loads(line)
    return {
        key: float(value)
        for key, value in entry.items()
        if isinstance(value, (int, float)) and (key != "step" or not isinstance(value, bool))
    }


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise RequestError(f"{path} is not JSON: {error}; mend it, or take it away") from None
    if not isinstance(config, dict):
        raise RequestError(f"{path} holds no JSON object; mend it, or take it away")
    return config


def kept_steps(directory: str | os.PathLike[str]) -> list[Path]:
    """The files of the steps that a run kept, the oldest first."""
    try:
        with os.scandir(Path(directory) / STEPS) as entries:
            files = [
                (e.stat().st_mtime_ns, e.path) for e in entries if e.name.endswith(STEP_SUFFIX)
            ]
    except FileNotFoundError:
        return []
    return [Path(path) for _, path in sorted(files)]
