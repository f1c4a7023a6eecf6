"""A run in a directory: ``metrics.jsonl``, one flat line a step, and ``config.json``.

The layout is that of tinker-cookbook's log directories, so what reads those reads these.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import operator
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import msgspec

from ..errors import RequestError
from ..observer import ObservedStep
from ..regularizer import show
from .flight import FlightRecorder
from .run import CONFIG, METRICS, entry_of, kept_steps

if TYPE_CHECKING:
    from ..composer import Composer

__all__ = ["Recorder", "Sink"]

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Whatever takes the flat metrics of a step: a file, a table, W&B."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...


class Recorder:
    """Writes each step's metrics to ``directory/metrics.jsonl``, and passes them on.

        with Recorder("runs/first") as recorder:
            recorder.log(flatten(metrics), step)

    A line is written whole and at once, so a process that is killed at any moment leaves a run
    that :func:`read_run` reads. A directory that holds a run already is refused, unless it is said
    what is to become of that: ``overwrite``, ``resume`` or ``shared``.

    As the ``recorder`` of a :class:`Composer`, or of :func:`with_regularizers`, it also writes
    what is composed there to ``config.json``, under ``composition``, and keeps steps, from which
    ``python -m tinker_custom_loss replay`` computes them again::

        recorder = Recorder("runs/first", keep="failures")
        training_client = with_regularizers(training_client, …, recorder=recorder)

    Args:
        directory: made if it is not there.
        config: JSON values that describe the run, written to ``config.json``.
        sinks: who else is to see every step, in this order.
        overwrite: begin anew where the directory holds a run already.
        resume: go on with the run that is there, if there is one. The first step that is logged
            says where: lines of that step and later ones, which a process wrote after its last
            checkpoint, are dropped, and the log says so. Kept steps stay.
        shared: write beside other processes that record the same run: nothing is dropped.
        keep: which steps are kept in ``directory/steps``: None, ``"failures"`` (steps that
            raised, and those in which a term was skipped or had values zeroed), ``"every:N"``
            (those too, and every step whose number N divides) or ``"all"``.
        keep_bytes: how much the kept steps may take together. The oldest are deleted for a new one.

    Raises:
        RequestError: the directory holds a run already; ``config`` is not made of JSON values; or
            another option is wrong.
        OSError: the directory or its files cannot be written.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        config: Mapping[str, Any] | None = None,
        sinks: Iterable[Sink] = (),
        overwrite: bool = False,
        resume: bool = False,
        shared: bool = False,
        keep: str | None = None,
        keep_bytes: int = 256_000_000,
    ) -> None:
        self.directory = Path(directory)
        self._sinks = list(sinks)
        self._lock = threading.Lock()
        self._config = None if config is None else dict(config)
        self._parts: tuple[Any, ...] = ()
        self._described: Mapping[str, Any] | None = None
        text = None if config is None else _json_text(config)
        flight = FlightRecorder(self.directory, keep or "failures", keep_bytes)
        self._flight = flight if keep is not None else None
        if overwrite + resume + shared > 1:
            raise RequestError("give one of overwrite, resume and shared, not several")
        if not (overwrite or resume or shared):
            _refuse_used(self.directory)
        self._rewinds = resume
        self.directory.mkdir(parents=True, exist_ok=True)
        if overwrite:
            (self.directory / METRICS).unlink(missing_ok=True)
            (self.directory / CONFIG).unlink(missing_ok=True)
            flight.clear()
        if text is not None:
            _replace(self.directory / CONFIG, text)
        self._file = self._opened()
        _end_torn_line(self.directory / METRICS, self._file.fileno())

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record one step, then hand it to the sinks.

        Raises:
            RequestError: a metric is no number, or is named ``step``; or the recorder is closed.
        """
        line = _line(metrics, step)
        with self._lock:
            if self._file.closed:
                raise RequestError(f"the recorder of {self.directory} is closed", path="log")
            if self._rewinds:
                self._rewind(step)
            self._file.write(line)
            sinks = list(self._sinks)
        for sink in sinks:
            sink.log(metrics, step)

    @contextlib.contextmanager
    def observing(self, observed: ObservedStep) -> Iterator[None]:
        """Around a step of a composer that has this as its ``recorder``."""
        self._describe(observed.composer)
        with self._flight.observing(observed) if self._flight else contextlib.nullcontext():
            yield

    def _describe(self, composer: Composer) -> None:
        """Write down what is composed; again only where it is something else than before."""
        base = composer.base_loss
        parts = (base and base.fn, (base and base.params) or None, *composer.regularizers)
        with self._lock:
            if len(parts) == len(self._parts) and all(map(operator.is_, parts, self._parts)):
                return  # a client makes a composer at every step, of the same parts
            self._parts = parts
            described = composer.describe()
            if described == self._described:
                return
            self._described = described
            told = {**(self._config or self._earlier()), "composition": described}
            try:
                _replace(self.directory / CONFIG, _json_text(told))
            except OSError as error:  # it costs a file, never a step
                logger.error("%s cannot be written: %s", self.directory / CONFIG, error)

    def _earlier(self) -> dict[str, Any]:
        """What a run that is continued has in its ``config.json``."""
        try:
            told = json.loads((self.directory / CONFIG).read_text())
        except (OSError, ValueError):
            return {}
        return told if isinstance(told, dict) else {}

    @property
    def composition(self) -> Mapping[str, Any] | None:
        """What is composed, as :meth:`Composer.describe` has it, from the first step on of a
        composer that has this as its ``recorder``."""
        return self._described

    def _opened(self) -> io.FileIO:
        return open(self.directory / METRICS, "ab", buffering=0)

    def _rewind(self, step: int) -> None:
        """Drop what was recorded of ``step`` and later ones before the run was resumed."""
        self._rewinds = False
        path = self.directory / METRICS
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if not _is_from(line, step)]
        if len(kept) == len(lines):
            return
        logger.warning(
            "%s goes on at step %d: what it had of that step and later ones, %d lines, is dropped",
            self.directory,
            step,
            len(lines) - len(kept),
        )
        self._file.close()
        _replace(path, b"".join(kept))
        self._file = self._opened()

    def attach(self, sink: Sink) -> None:
        """Hand every later step to ``sink`` too."""
        with self._lock:
            self._sinks.append(sink)

    def detach(self, sink: Sink) -> None:
        """Undo :meth:`attach`."""
        with self._lock:
            self._sinks.remove(sink)

    def close(self) -> None:
        """Close the file. The sinks are whoever's gave them."""
        with self._lock:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Recorder({str(self.directory)!r})"


def _line(metrics: Mapping[str, float], step: int) -> bytes:
    if isinstance(step, bool) or not isinstance(step, int):
        raise RequestError(f"step must be an int, got {show(step)}", path="step")
    try:
        entry = {key: float(value) for key, value in metrics.items()}
    except (TypeError, ValueError, OverflowError):
        raise _no_number(metrics) from None
    if "step" in entry:
        raise RequestError('a metric is named "step", which is the step\'s own key', path="step")
    told = {"step": step} | entry
    if all(map(math.isfinite, entry.values())):
        return msgspec.json.encode(told) + b"\n"
    return json.dumps(told).encode() + b"\n"  # which has words for nan and infinity


def _no_number(metrics: Mapping[str, Any]) -> RequestError:
    key = next(key for key, value in metrics.items() if not _is_number(value))
    return RequestError(
        f'the metric "{key}" is {show(metrics[key])}; expected a number: pass the record of a '
        "step through flatten() first",
        path=key,
    )


def _is_number(value: object) -> bool:
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _end_torn_line(path: Path, descriptor: int) -> None:
    """What a killed process left of a line must not run into the next."""
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                os.write(descriptor, b"\n")


def _is_from(line: bytes, step: int) -> bool:
    entry = entry_of(line)
    return entry is not None and entry[0] >= step


def _refuse_used(directory: Path) -> None:
    metrics = directory / METRICS
    steps = len(kept_steps(directory))
    lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    if lines or steps or (metrics.exists() and metrics.stat().st_size):
        raise RequestError(
            f"{directory} holds a run already ({lines} lines of {METRICS}, {steps} kept steps); "
            "give another directory, overwrite=True to begin anew there, or resume=True to go on "
            "with that run",
            path="directory",
        )


def _json_text(config: Mapping[str, Any]) -> str:
    try:
        return json.dumps(config, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise RequestError(f"config is not made of JSON values: {error}", path="config") from error


def _replace(path: Path, text: str | bytes) -> None:
    """Write a file so that nobody ever reads half of it."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")  # workers of a pool share a run
    beside.write_bytes(text.encode() if isinstance(text, str) else text)
    beside.replace(path)
