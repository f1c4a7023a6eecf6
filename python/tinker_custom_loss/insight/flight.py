"""The flight recorder: steps that one may want to compute again, each in a file of its own."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from ..errors import CancelledError, RequestError
from ..observer import ObservedStep
from ..record import StepRecord
from ..regularizer import show
from .kept import CannotKeepError, Outcome, outcome_of, pack_step
from .run import STEP_SUFFIX, STEPS, kept_steps
from .seeds import Seeds

__all__ = ["FlightRecorder"]

logger = logging.getLogger(__name__)

_UNFINISHED = ".new"


class FlightRecorder:
    """Writes steps to ``directory/steps``.

    Args:
        keep: ``"failures"``: steps that raised, and those in which a term was skipped or had
            values zeroed; ``"every:N"``: also every step whose number N divides; ``"all"``.
        keep_bytes: of all files together. Where one more does not fit, the oldest are deleted.

    Raises:
        RequestError: an option has a value it cannot have.
    """

    def __init__(self, directory: Path, keep: str, keep_bytes: int) -> None:
        self._every = _every(keep)
        if isinstance(keep_bytes, bool) or not isinstance(keep_bytes, int) or keep_bytes < 1:
            raise RequestError(
                f"keep_bytes must be a positive number of bytes, got {show(keep_bytes)}",
                path="keep_bytes",
            )
        self._directory = directory / STEPS
        self._bound = keep_bytes
        self._lock = threading.Lock()
        self._size = math.inf  # not known
        self._unscanned = 0
        self._observed = 0
        self._has_dropped = False

    @contextlib.contextmanager
    def observing(self, observed: ObservedStep) -> Iterator[None]:
        """See :class:`~tinker_custom_loss.observer.StepObserver`."""
        seeds = Seeds.here()
        try:
            yield
        except (CancelledError, RequestError):
            raise  # nothing was computed
        except Exception as error:
            self._keep(observed, outcome_of(observed, error), seeds)
            raise
        composition = observed.composition
        assert composition is not None
        if self._is_wanted(observed.step) or _went_wrong(composition.record):
            self._keep(observed, outcome_of(observed, None), seeds)

    def clear(self) -> None:
        """Delete the steps that were kept."""
        if self._directory.is_dir():
            for file in self._directory.iterdir():
                if file.name.endswith((STEP_SUFFIX, STEP_SUFFIX + _UNFINISHED)):
                    file.unlink(missing_ok=True)

    def _is_wanted(self, step: int | None) -> bool:
        with self._lock:
            number = self._observed if step is None else step
            self._observed += 1
        return self._every is not None and number % self._every == 0

    def _keep(self, observed: ObservedStep, outcome: Outcome, seeds: Seeds) -> None:
        """Whatever goes wrong here costs a file, never a step."""
        name = "a step without a number" if observed.step is None else f"step {observed.step}"
        try:
            packed = pack_step(observed, outcome, seeds)
            if len(packed) > self._bound:
                raise CannotKeepError(
                    f"its {len(packed)} bytes are more than keep_bytes={self._bound}"
                )
            with self._lock:
                file = self._write(packed, observed.step)
                self._drop_oldest(len(packed))
        except (CannotKeepError, OSError) as error:
            logger.error("%s cannot be kept: %s", name, error)
        except Exception as error:  # a tensor of a kind that nothing foresaw, sparse or quantized
            logger.error("%s cannot be kept: %s: %s", name, type(error).__name__, error)
        else:
            if outcome.error is not None:
                logger.error(
                    "%s failed, and is kept: python -m tinker_custom_loss replay %s", name, file
                )

    def _write(self, packed: bytes, step: int | None) -> Path:
        """Under a name that nobody has, in this or another process; never half of it."""
        self._directory.mkdir(parents=True, exist_ok=True)
        stem = "unnumbered" if step is None else f"{step:08}"
        for attempt in range(1_000_000):
            name = f"{stem}-{attempt}" if attempt else stem
            file = self._directory / f"{name}{STEP_SUFFIX}"
            beside = file.with_name(file.name + _UNFINISHED)
            try:
                descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                continue
            with open(descriptor, "wb") as opened:
                if file.exists():
                    beside.unlink()
                    continue
                try:
                    opened.write(packed)
                    opened.flush()
                except OSError:  # a full disk is to hold no half of a step
                    beside.unlink()
                    raise
            beside.replace(file)
            return file
        raise CannotKeepError(f"there are a million files of {stem} in {self._directory}")

    def _drop_oldest(self, written: int) -> None:
        self._size += written
        self._unscanned += written
        # Other processes may write there too.
        if self._size <= self._bound and self._unscanned < self._bound // 16:
            return
        files = [(file, file.stat().st_size) for file in kept_steps(self._directory.parent)]
        self._size, self._unscanned = sum(size for _, size in files), 0
        for file, size in files:
            if self._size <= self._bound:
                break
            file.unlink(missing_ok=True)
            self._size -= size
            if not self._has_dropped:
                logger.warning(
                    "the kept steps in %s have reached keep_bytes=%d; from now on the oldest are "
                    "deleted, the first of them %s",
                    self._directory,
                    self._bound,
                    file.name,
                )
            self._has_dropped = True


def _every(keep: str) -> int | None:
    if keep == "failures":
        return None
    if keep == "all":
        return 1
    match = re.fullmatch(r"every:([1-9]\d*)", keep) if isinstance(keep, str) else None
    if match is None:
        raise RequestError(
            f'keep must be "failures", "all" or "every:N", as "every:100", got {show(keep)}',
            path="keep",
        )
    return int(match[1])


def _went_wrong(record: StepRecord) -> bool:
    terms = [*record["regularizers"].values(), *filter(None, [record["base_loss"]])]
    return any(term.get("skipped") or term["non_finite_zeroed"] for term in terms)
