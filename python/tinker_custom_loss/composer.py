"""Terms in; one loss, one gradient and one telemetry record out.

    loss_total = (base_loss or 0) + Σ weight_i · loss_i

Each term is differentiated on its own, with respect to the logprobs, and the weighted gradients
are added in list order. So the result does not depend on which term ended first, a term may run
in another process, and each term's own gradient is there to be measured.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import CancelledError, ChangedLogprobsError, NonFiniteError, RequestError, TermError
from .record import flatten, step_record
from .regularizer import BASE_LOSS, LossFn, Regularizer, regularizers_from
from .running import places, processes
from .running.differentiation import Evaluation
from .running.evaluation import Call
from .running.event_loop import CallersLoop
from .running.non_finite import CheckedEvaluation, check_finite, record_of
from .running.threads import THREADS
from .tensors import gradients as grad
from .tensors.batch import TensorBatch, checked_batch

__all__ = ["Composer", "Composition"]

_CANCEL_POLL_SECONDS = 0.02


@dataclass(frozen=True, repr=False)
class Composition:
    """What one step computed.

    Attributes:
        loss_total: the composed loss, in double precision.
        gradient: ``∂loss_total/∂logprobs`` over one buffer (not negated), in the dtype and on the
            device of the logprobs; None if none was asked for.
        telemetry: the nested record, see :mod:`tinker_custom_loss.record`.
        term_gradients: each differentiable term's own unweighted gradient by name (the base loss
            under ``"base_loss"``), if asked for; else empty.
    """

    loss_total: float
    gradient: TensorBatch | None
    telemetry: dict[str, Any]
    term_gradients: Mapping[str, TensorBatch] = field(default_factory=dict)

    @property
    def gradients(self) -> list[Tensor] | None:
        """``∂loss_total/∂logprobs``, one tensor a datum, of its shape [T] or [T,K]."""
        return None if self.gradient is None else self.gradient.tensors()

    @property
    def flat_telemetry(self) -> dict[str, float]:
        """The telemetry under flat keys such as ``regularizers/<name>/value``."""
        return flatten(self.telemetry)

    def cosines(self) -> tuple[list[str], Tensor]:
        """Names, and the [n,n] matrix of cosines between the terms' own gradients.

        A negative entry is a conflict: to first order, a step that lowers one term raises the
        other. Needs ``term_gradients=True``.
        """
        names = list(self.term_gradients)
        flats = [batch.flat for batch in self.term_gradients.values()]
        norms = [grad.norm(flat) for flat in flats]
        matrix = [
            [grad.cosine(a, b, norms[i], norms[j]) for j, b in enumerate(flats)]
            for i, a in enumerate(flats)
        ]
        return names, torch.tensor(matrix, dtype=torch.float64).reshape(len(names), len(names))

    def __repr__(self) -> str:
        terms = ", ".join(self.telemetry["regularizers"])
        return (
            f"Composition(loss_total={self.loss_total:.6g}, gradient={self.gradient!r}, "
            f"regularizers=[{terms}])"
        )


class Composer:
    """A base loss and any number of named, weighted regularizers, as one loss.

    It is itself a ``CustomLossFnV1`` of the tinker SDK: ``composer(data, logprobs)`` returns
    ``(loss, metrics)``, where ``loss.backward()`` gives the logprobs their composed gradient.

    Args:
        base_loss_fn: ``fn(data, logprobs) -> (loss, metrics)``, sync or async, or None.
        regularizers: :class:`Regularizer`\\ s, or dicts with the keys ``fn``, ``weight``,
            ``name`` and any option of a Regularizer.
        base_params: keyword arguments for ``base_loss_fn``.
        inline_lock: held while inline terms run, for callers that compute from several threads
            but promise their users that inline functions never run concurrently.

    Raises:
        RequestError: something in it cannot work; raised here, not in the middle of a step.
    """

    def __init__(
        self,
        base_loss_fn: LossFn | None = None,
        regularizers: Sequence[Regularizer | Mapping[str, Any]] | None = None,
        *,
        base_params: Mapping[str, Any] | None = None,
        inline_lock: contextlib.AbstractContextManager[Any] | None = None,
    ) -> None:
        _check_no_composer(base_loss_fn)
        if isinstance(base_loss_fn, (Mapping, list, tuple, str)):
            raise RequestError(
                f"base_loss_fn must be a function of (data, logprobs), got "
                f"{type(base_loss_fn).__name__}; regularizers are the second argument",
                path=BASE_LOSS,
            )
        self.regularizers = regularizers_from(regularizers)
        self._base = None
        if base_loss_fn is not None:
            try:
                self._base = Regularizer(base_loss_fn, 1.0, BASE_LOSS, params=base_params or {})
            except RequestError as error:
                raise RequestError(str(error), path=f"{BASE_LOSS}.{error.path}") from error
        enabled = [term for term in self.regularizers if term.enabled]
        self._terms = ([self._base] if self._base else []) + enabled
        if not self._terms:
            raise RequestError(
                "there is nothing to compute: give a base_loss_fn, or at least one regularizer "
                "that is enabled",
                path="regularizers",
            )
        for index, term in enumerate(self.regularizers):
            try:
                _check_no_composer(term.fn)
                places.check_picklable(term)
            except RequestError as error:
                where = f"regularizers[{index}]"
                raise RequestError(f"{where}: {error}", path=f"{where}.{error.path}") from error
        self._calls = [Call(term.name, term.fn, term.params) for term in self._terms]
        self._inline_lock = inline_lock or contextlib.nullcontext()
        own_processes = sum(term.run_in_executor == "process" for term in enabled)
        if own_processes:
            processes.warm(own_processes)

    def compute(
        self,
        data: Sequence[Any],
        logprobs: Sequence[Tensor] | TensorBatch,
        *,
        step: int = 0,
        gradients: bool = True,
        term_gradients: bool = False,
        cancelled: threading.Event | None = None,
    ) -> Composition:
        """Evaluate every term on one batch and compose them.

        Args:
            data: the datums; handed to the terms as it is.
            logprobs: one float tensor a datum, [T] or [T,K]. They are not modified, and no
                graph that they belong to is used.
            step: the training step, for weight schedules.
            gradients: False evaluates losses and metrics alone.
            term_gradients: True keeps each term's own gradient in the composition.
            cancelled: set it from another thread to withdraw the computation.

        Raises:
            RequestError: data and logprobs do not fit together.
            TermError: a term failed, and its ``on_error`` is ``"raise"``; also when gradients
                are wanted and no term is differentiable.
            CancelledError: ``cancelled`` was set.
        """
        here = places.Surroundings.here()
        return self._compute(data, logprobs, step, gradients, term_gradients, cancelled, here)

    async def compute_async(
        self,
        data: Sequence[Any],
        logprobs: Sequence[Tensor] | TensorBatch,
        *,
        step: int = 0,
        gradients: bool = True,
        term_gradients: bool = False,
    ) -> Composition:
        """:meth:`compute`, awaited, while the caller's event loop stays free.

        Async terms run on that loop, as tasks that end if this is cancelled; inline ones on a
        thread of this package.
        """
        cancelled = threading.Event()
        async with CallersLoop() as loop:
            here = places.Surroundings.here(loop)
            future = THREADS.submit(
                self._compute, data, logprobs, step, gradients, term_gradients, cancelled, here
            )
            try:
                composition: Composition = await asyncio.wrap_future(future)
            except asyncio.CancelledError:
                cancelled.set()
                raise
            return composition

    def _compute(
        self,
        data: Sequence[Any],
        logprobs: Sequence[Tensor] | TensorBatch,
        step: int,
        gradients: bool,
        term_gradients: bool,
        cancelled: threading.Event | None,
        surroundings: places.Surroundings,
    ) -> Composition:
        started = time.perf_counter()
        with torch.inference_mode(False):
            batch = checked_batch(data, logprobs)
            weights = [term.weight_at(step) for term in self._terms]
            results = self._evaluate(data, batch, gradients, cancelled, surroundings)
            return self._compose(
                batch, logprobs, weights, results, gradients, term_gradients, step, started
            )

    def __call__(self, data: Sequence[Any], logprobs: Sequence[Tensor]) -> tuple[Any, Any]:
        """``(loss, metrics)``, as the tinker SDK wants it from a custom loss function.

        With regularizers, ``metrics`` is the nested telemetry. With only a base loss, this *is*
        the base loss: same loss, same graph, same metrics.
        """
        if self._base is not None and not self.regularizers and not self._base.is_async:
            loss, metrics = self._base.fn(data, logprobs, **self._base.params)
            return loss, metrics
        composition = self.compute(data, logprobs)
        assert composition.gradients is not None
        loss = grad.surrogate(composition.loss_total, composition.gradients, logprobs)
        return loss, composition.telemetry

    def __repr__(self) -> str:
        names = ", ".join(term.name for term in self._terms)
        return f"Composer({names})"

    def _evaluate(
        self,
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
            for index, term in enumerate(self._terms):
                if not places.runs_inline(term):
                    with _skipping(term, index, results):
                        pending[index] = places.start(
                            term, self._calls[index], data, batch, gradients, surroundings
                        )
            inline = [i for i, term in enumerate(self._terms) if places.runs_inline(term)]
            with self._inline_lock if inline else contextlib.nullcontext():
                for index in inline:
                    _check_cancelled(cancelled)
                    with _skipping(self._terms[index], index, results):
                        results[index] = places.run_inline(
                            self._calls[index], data, batch, gradients, surroundings
                        )
            self._collect(pending, results, cancelled)
        finally:
            for started in pending.values():
                started.abandon()
        return [results[index] for index in range(len(self._terms))]

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
                term = self._terms[index]
                if started.late:
                    del pending[index]
                    with _skipping(term, index, results):
                        raise started.time_out(term.name, term.timeout or 0.0)
                elif started.future.done():
                    del pending[index]
                    with _skipping(term, index, results):
                        results[index] = started.evaluation(term.name)

    def _compose(
        self,
        batch: TensorBatch,
        given: Sequence[Tensor] | TensorBatch,
        weights: list[float],
        results: list[Evaluation | TermError],
        gradients: bool,
        keep_term_gradients: bool,
        step: int,
        started: float,
    ) -> Composition:
        finite = [
            check_finite(term, result, batch)
            for term, result in zip(self._terms, results, strict=True)
        ]
        if gradients and not any(part.gradient is not None or part.error for part in finite):
            names = ", ".join(f'"{term.name}"' for term in self._terms)
            raise TermError(
                f"no term is differentiable: {names} returned constants, without a graph back to "
                "the logprobs, so there is no gradient to train with; compute the loss from the "
                "logprobs without .item(), .detach() or numpy",
                term=self._terms[0].name,
            )
        total = total_norm = None
        if gradients:
            weighted = [
                (weight, part.gradient)
                for weight, part in zip(weights, finite, strict=True)
                if part.gradient is not None
            ]
            total = grad.weighted_sum(weighted, batch.flat)
            total_norm = self._total_norm(total, weights, finite)
        alone = sum(part.gradient is not None for part in finite) == 1
        records = {
            term.name: record_of(part, weight, total, total_norm, alone)
            for term, part, weight in zip(self._terms, finite, weights, strict=True)
        }
        loss_total = math.fsum(record.contribution for record in records.values())
        telemetry = step_record(
            loss_total=loss_total,
            base_loss=records.pop(BASE_LOSS, None),
            regularizers=records,
            total_grad_norm=total_norm,
            size=batch.flat.numel(),
            datums=len(batch),
            step=step,
            seconds=time.perf_counter() - started,
        )
        kept = {
            term.name: batch.with_flat(part.gradient)
            for term, part in zip(self._terms, finite, strict=True)
            if keep_term_gradients and part.gradient is not None
        }
        home = None if total is None else self._bring_home(batch.with_flat(total), given)
        return Composition(loss_total, home, telemetry, kept)

    def _total_norm(
        self, total: Tensor, weights: list[float], finite: list[CheckedEvaluation]
    ) -> float:
        norms = [
            abs(weight) * part.norm
            for weight, part in zip(weights, finite, strict=True)
            if part.gradient is not None
        ]
        value = norms[0] if len(norms) == 1 else grad.norm(total)
        if not value < torch.finfo(total.dtype).max:
            raise NonFiniteError(
                "the sum of the weighted gradients overflows, although each one is finite; "
                "lower the weights",
                term=", ".join(term.name for term in self._terms),
            )
        return value

    def _bring_home(
        self, gradient: TensorBatch, given: Sequence[Tensor] | TensorBatch
    ) -> TensorBatch:
        """The gradient in the dtype and on the device of the logprobs that were given."""
        like = given.flat if isinstance(given, TensorBatch) else given[0]
        home = gradient.flat.to(like.device, like.dtype)
        if like.element_size() < gradient.flat.element_size() and not home.isfinite().all():
            dtype = str(like.dtype).removeprefix("torch.")
            raise NonFiniteError(
                f"the gradient is finite, but does not fit into {dtype}, the type of the logprobs; "
                "give them as float32, or lower the weights",
                term=", ".join(term.name for term in self._terms),
            )
        return gradient.with_flat(home)


def _check_no_composer(fn: object) -> None:
    if isinstance(fn, Composer):
        raise RequestError(
            "a Composer cannot be a term of another, since its metrics are no plain numbers; give "
            "its terms to one Composer",
            path="fn",
        )


@contextlib.contextmanager
def _skipping(term: Regularizer, index: int, results: dict[int, Evaluation | TermError]) -> Any:
    try:
        yield
    except TermError as error:
        if term.on_error == "raise" or isinstance(error, ChangedLogprobsError):
            raise
        results[index] = error


def _check_cancelled(cancelled: threading.Event | None) -> None:
    if cancelled is not None and cancelled.is_set():
        raise CancelledError("the computation was cancelled by its caller")
