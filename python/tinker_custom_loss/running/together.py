"""All terms of a step: those elsewhere are started, the others run here, then all are collected."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import CancelledError, ChangedLogprobsError, TermError
from ..fast_paths import fast
from ..regularizer import Regularizer
from ..tensors.batch import TensorBatch
from ..tensors.blocks import NotInBlocksError
from ..tensors.gradients import aligned, begins_aligned
from . import places
from .differentiation import Evaluation
from .evaluation import Call, in_blocks, is_of_catalogue
from .event_loop import CTRL_C_POLL_SECONDS
from .in_blocks import BlockTerm, measured_in_blocks
from .measured import Measured
from .shipping import ShippedCall

__all__ = ["Asked", "Flag", "Results", "Together", "Wanted"]

logger = logging.getLogger(__name__)

_CANCEL_POLL_SECONDS = 0.02


class Results(NamedTuple):
    """Every term's evaluation, in order, or the error of one that may be skipped.

    ``measured``: their gradients were measured as they were made.
    """

    evaluations: list[Evaluation | TermError]
    measured: Measured | None = None


class Flag(Protocol):
    """Whether a computation was withdrawn: a ``threading.Event``, or what has as much of one."""

    def is_set(self) -> bool: ...


class Asked(NamedTuple):
    """What the terms of a step are to be evaluated on: one call a term.

    ``data`` and ``batch`` fit together; ``gradients``: each is to be differentiated too.
    """

    calls: Sequence[Call]
    data: Sequence[Any]
    batch: TensorBatch
    gradients: bool
    cancelled: Flag | None
    surroundings: places.Surroundings

    def check_cancelled(self) -> None:
        if self.cancelled is not None and self.cancelled.is_set():
            raise CancelledError("the computation was cancelled by its caller")


class Wanted(NamedTuple):
    """What becomes of the gradients: they are added with the terms' ``weights``, in ``out`` if that
    is memory of the batch's type and aligned, and ``kept`` beside that or not."""

    weights: Sequence[float]
    out: Tensor | None = None
    kept: bool = False


class Together:
    """The terms of a composer.

    ``shipped`` has the calls of those that are sent to a process; ``inline_lock`` is held while
    inline functions run, unless all are of the catalogue.
    """

    def __init__(
        self,
        terms: Sequence[Regularizer],
        shipped: Mapping[str, ShippedCall | None],
        inline_lock: contextlib.AbstractContextManager[Any],
    ) -> None:
        self._terms, self._shipped = terms, shipped
        self._inline = [i for i, term in enumerate(terms) if places.runs_inline(term)]
        self._elsewhere = [i for i in range(len(terms)) if i not in self._inline]
        self._known = {i for i in self._inline if is_of_catalogue(terms[i].fn)}
        alone = len(self._known) == len(self._inline)
        self._lock = contextlib.nullcontext() if alone else inline_lock

    def evaluate(self, asked: Asked, wanted: Wanted | None = None) -> Results:
        """Every term, each where it runs.

        Where it is known what is ``wanted``, and all terms run here, those of which a block of the
        batch tells enough make their gradients block by block, all at the same time, and each block
        is measured at once. A batch on which that cannot be done is evaluated without: nothing but
        terms of the catalogue is called twice.
        """
        results: dict[int, Evaluation | TermError] = {}
        pending: dict[int, places.Started] = {}
        blocks: dict[int, BlockTerm] = {}
        by_blocks = self._known if wanted and not self._elsewhere and _may_use_blocks(asked) else ()
        measured = None
        try:
            for index in self._elsewhere:
                self._start(index, asked, pending, results)
            with self._lock:
                for index in self._inline:
                    asked.check_cancelled()
                    if index in by_blocks:
                        try:
                            term = in_blocks(asked.calls[index], asked.data, asked.batch)
                        except TermError as error:
                            results[index] = _skipped(self._terms[index], error)
                        else:
                            if term is not None:
                                blocks[index] = term
                    if index not in blocks and index not in results:
                        self._run_inline(index, asked, results)
            if blocks and wanted:
                measured = _measured(asked, wanted, blocks, results)
            if blocks and measured is None:
                for index in blocks:
                    self._run_inline(index, asked, results)
            self._collect(pending, results, asked)
        finally:
            for started in pending.values():
                started.abandon()
        return Results([results[index] for index in range(len(self._terms))], measured)

    def _start(
        self,
        index: int,
        asked: Asked,
        pending: dict[int, places.Started],
        results: dict[int, Evaluation | TermError],
    ) -> None:
        term = self._terms[index]
        with _skipping(term, index, results):
            pending[index] = places.start(
                term,
                asked.calls[index],
                self._shipped.get(term.name),
                asked.data,
                asked.batch,
                asked.gradients,
                asked.surroundings,
            )

    def _run_inline(
        self, index: int, asked: Asked, results: dict[int, Evaluation | TermError]
    ) -> None:
        with _skipping(self._terms[index], index, results):
            results[index] = places.run_inline(
                asked.calls[index], asked.data, asked.batch, asked.gradients, asked.surroundings
            )

    def _collect(
        self,
        pending: dict[int, places.Started],
        results: dict[int, Evaluation | TermError],
        asked: Asked,
    ) -> None:
        """Wait for the started terms; the first one that fails ends the wait."""
        while pending:
            asked.check_cancelled()
            patience = min(started.expires for started in pending.values()) - time.monotonic()
            poll = CTRL_C_POLL_SECONDS if asked.cancelled is None else _CANCEL_POLL_SECONDS
            patience = min(patience, poll)
            concurrent.futures.wait(
                [started.future for started in pending.values()],
                timeout=max(0.0, patience),
                return_when=concurrent.futures.FIRST_COMPLETED,
            )
            for index, started in sorted(pending.items()):
                term = self._terms[index]
                if started.late:
                    del pending[index]
                    with _skipping(term, index, results):
                        raise started.time_out(term.name, term.timeout or 0.0)
                elif started.future.done():
                    del pending[index]
                    with _skipping(term, index, results):
                        results[index] = started.evaluation(term.name)


def _may_use_blocks(asked: Asked) -> bool:
    return fast() and asked.gradients and asked.batch.flat.device.type == "cpu"


def _measured(
    asked: Asked,
    wanted: Wanted,
    blocks: Mapping[int, BlockTerm],
    results: dict[int, Evaluation | TermError],
) -> Measured | None:
    """The gradients of all terms, of which ``blocks`` have yet to make theirs, and what these
    computed, added to ``results``. None if a whole gradient must be looked at, or if one fails,
    of which its own evaluation will tell."""
    there = {i: result for i, result in results.items() if isinstance(result, Evaluation)}
    gradients: list[BlockTerm | Tensor | None] = []
    for index in range(len(asked.calls)):
        gradient = _gradient_of(there.get(index))
        gradients.append(blocks.get(index, None if gradient is None else aligned(gradient)))
    like, out = asked.batch.flat, wanted.out
    fits = out is not None and out.dtype == like.dtype and begins_aligned(out)
    total = out if out is not None and fits else torch.empty_like(like)
    kept = {index: torch.empty_like(like) for index in blocks if wanted.kept}
    try:
        with torch.inference_mode():
            found = measured_in_blocks(
                wanted.weights, gradients, total, asked.check_cancelled, kept
            )
    except NotInBlocksError:
        return None
    made = {
        index: Evaluation(term.value, {**term.metrics}, True, kept.get(index), term.seconds)
        for index, term in blocks.items()
    }
    if found is None or not all(map(_is_finite, [*there.values(), *made.values()])):
        return None
    results.update(made)
    return found


def _gradient_of(result: Evaluation | TermError | None) -> Tensor | None:
    return result.gradient if isinstance(result, Evaluation) else None


def _is_finite(evaluation: Evaluation) -> bool:
    return math.isfinite(evaluation.value) and all(
        part.is_finite() for part in evaluation.parameter_gradients
    )


@contextlib.contextmanager
def _skipping(
    term: Regularizer, index: int, results: dict[int, Evaluation | TermError]
) -> Iterator[None]:
    try:
        yield
    except TermError as error:
        results[index] = _skipped(term, error)


def _skipped(term: Regularizer, error: TermError) -> TermError:
    """The error, if the term may be skipped."""
    if term.on_error == "raise" or isinstance(error, ChangedLogprobsError):
        raise error
    logger.warning("%s; it is skipped, and contributes 0 to this step", error)
    return error
