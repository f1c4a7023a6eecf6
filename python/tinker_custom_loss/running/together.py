"""All terms of a step: those elsewhere are started, the others run here, then all are collected."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CancelledError, ChangedLogprobsError, TermError
from ..regularizer import Regularizer
from ..tensors.batch import TensorBatch
from . import places
from .differentiation import Evaluation
from .evaluation import Call
from .shipping import ShippedCall

__all__ = ["Together"]

logger = logging.getLogger(__name__)

_CANCEL_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Together:
    """The terms of a composer.

    ``shipped`` has the calls of those that are sent to a process; ``inline_lock`` is held while
    inline ones run.
    """

    terms: Sequence[Regularizer]
    shipped: Mapping[str, ShippedCall | None]
    inline_lock: contextlib.AbstractContextManager[Any]

    def evaluate(
        self,
        calls: Sequence[Call],
        data: Sequence[Any],
        batch: TensorBatch,
        gradients: bool,
        cancelled: threading.Event | None,
        surroundings: places.Surroundings,
    ) -> list[Evaluation | TermError]:
        """Every term's evaluation, in order; an error only where the term may be skipped."""
        results: dict[int, Evaluation | TermError] = {}
        pending: dict[int, places.Started] = {}
        try:
            for index, term in enumerate(self.terms):
                if not places.runs_inline(term):
                    with _skipping(term, index, results):
                        pending[index] = places.start(
                            term,
                            calls[index],
                            self.shipped.get(term.name),
                            data,
                            batch,
                            gradients,
                            surroundings,
                        )
            inline = [i for i, term in enumerate(self.terms) if places.runs_inline(term)]
            with self.inline_lock if inline else contextlib.nullcontext():
                for index in inline:
                    _check_cancelled(cancelled)
                    with _skipping(self.terms[index], index, results):
                        results[index] = places.run_inline(
                            calls[index], data, batch, gradients, surroundings
                        )
            self._collect(pending, results, cancelled)
        finally:
            for started in pending.values():
                started.abandon()
        return [results[index] for index in range(len(self.terms))]

    def _collect(
        self,
        pending: dict[int, places.Started],
        results: dict[int, Evaluation | TermError],
        cancelled: threading.Event | None,
    ) -> None:
        """Wait for the started terms; the first one that fails ends the wait."""
        while pending:
            _check_cancelled(cancelled)
            patience = min(started.expires for started in pending.values()) - time.monotonic()
            if cancelled is not None:
                patience = min(patience, _CANCEL_POLL_SECONDS)
            concurrent.futures.wait(
                [started.future for started in pending.values()],
                timeout=max(0.0, min(patience, threading.TIMEOUT_MAX)),
                return_when=concurrent.futures.FIRST_COMPLETED,
            )
            for index, started in sorted(pending.items()):
                term = self.terms[index]
                if started.late:
                    del pending[index]
                    with _skipping(term, index, results):
                        raise started.time_out(term.name, term.timeout or 0.0)
                elif started.future.done():
                    del pending[index]
                    with _skipping(term, index, results):
                        results[index] = started.evaluation(term.name)


@contextlib.contextmanager
def _skipping(
    term: Regularizer, index: int, results: dict[int, Evaluation | TermError]
) -> Iterator[None]:
    try:
        yield
    except TermError as error:
        if term.on_error == "raise" or isinstance(error, ChangedLogprobsError):
            raise
        logger.warning("%s; it is skipped, and contributes 0 to this step", error)
        results[index] = error


def _check_cancelled(cancelled: threading.Event | None) -> None:
    if cancelled is not None and cancelled.is_set():
        raise CancelledError("the computation was cancelled by its caller")
