"""Terms in; one loss, one gradient and the record of one step out.

    loss_total = (base_loss or 0) + Σ weight_i · loss_i

Each term is differentiated on its own, with respect to the logprobs, and the weighted gradients
are added in list order. So the result does not depend on which term ended first, a term may run
in another process, and each term's own gradient is there to be measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from .base_loss import base_loss_from
from .composition import ComposedLoss, Composition, Step
from .description import describe_terms
from .errors import RequestError
from .observer import ObservedStep, StepObserver, checked_observer
from .record import metrics_of
from .regularizer import (
    LossFn,
    Regularizer,
    check_step,
    regularizers_from,
)
from .running import lifetimes, places, processes
from .running.evaluation import Call
from .running.event_loop import CallersLoop
from .running.shipping import ShippedCall
from .running.threads import THREADS, on_this_thread
from .running.together import Asked, Flag, Together, Wanted
from .tensors.batch import TensorBatch, check_out, checked_batch
from .tensors.gradients import surrogate
from .totals import denominators, shapes_of_targets, totals_of

__all__ = ["Composer"]


class Composer:
    """A base loss and any number of named, weighted regularizers, as one loss.

    It is itself a ``CustomLossFnV1`` of the tinker SDK: ``composer(data, logprobs)`` returns
    ``(loss, metrics)``, where ``loss.backward()`` gives the logprobs their composed gradient.

    Args:
        base_loss_fn: ``fn(data, logprobs) -> (loss, metrics)``, sync or async, the name of a term
            of the catalogue, such as ``"ppo"``, a dict with the keys ``fn``, ``params`` and
            ``reduction``, or None.
        regularizers: :class:`Regularizer`\\ s, or dicts with the keys ``fn``, ``weight``,
            ``name`` and any option of a Regularizer.
        base_params: keyword arguments for ``base_loss_fn``.
        recorder: who sees every step that is differentiated, such as a
            :class:`~tinker_custom_loss.Recorder` that keeps steps.
        inline_lock: held while inline terms run, for callers that compute from several threads
            but promise their users that inline functions never run concurrently.

    Raises:
        RequestError: something in it cannot work; raised here, not in the middle of a step.
    """

    def __init__(
        self,
        base_loss_fn: LossFn | str | Mapping[str, Any] | None = None,
        regularizers: Sequence[Regularizer | Mapping[str, Any]] | None = None,
        *,
        base_params: Mapping[str, Any] | None = None,
        recorder: StepObserver | None = None,
        inline_lock: contextlib.AbstractContextManager[Any] | None = None,
    ) -> None:
        _check_no_composer(base_loss_fn)
        self.regularizers = regularizers_from(regularizers)
        self._base = base_loss_from(base_loss_fn, base_params)
        enabled = [term for term in self.regularizers if term.enabled]
        self._terms = ([self._base] if self._base else []) + enabled
        if not self._terms:
            raise RequestError(
                "there is nothing to compute: give a base_loss_fn, or at least one regularizer "
                "that is enabled",
                path="regularizers",
            )
        self._shipped: dict[str, ShippedCall | None] = {}
        for index, term in enumerate(self.regularizers):
            try:
                _check_no_composer(term.fn)
                self._shipped[term.name] = places.shipped(term)
            except RequestError as error:
                where = f"regularizers[{index}]"
                raise RequestError(f"{where}: {error}", path=f"{where}.{error.path}") from error
        self._calls = [Call(term.name, term.fn, term.params) for term in self._terms]
        self._together = Together(
            self._terms, self._shipped, inline_lock or contextlib.nullcontext()
        )
        self._recorder = checked_observer(recorder)
        own_processes = sum(term.run_in_executor == "process" for term in enabled)
        if own_processes:
            processes.warm(own_processes)

    def compute(
        self,
        data: Sequence[Any],
        logprobs: Sequence[Tensor] | TensorBatch,
        *,
        step: int | None = None,
        totals: Mapping[str, Any] | None = None,
        term_gradients: bool = False,
        out: Tensor | None = None,
        cancelled: Flag | None = None,
    ) -> Composition:
        """Evaluate every term on one batch, differentiate each, and compose them.

        Where a loss has parameters of its own, such as a head, their gradient is added to their
        ``.grad``, times the term's weight, once every term has succeeded: a step that fails
        leaves them alone, and so does a term that is skipped. :meth:`__call__` leaves that to
        the caller's ``loss.backward()``.

        Args:
            data: the datums; handed to the terms as it is.
            logprobs: one float tensor a datum, [T] or [T,K]. They are not modified, and no
                graph that they belong to is used.
            step: the training step, for weight schedules.
            totals: of the whole step, where these datums are a part of it: see :meth:`totals`.
            term_gradients: True keeps each term's own gradient in the composition.
            out: memory for the gradient, [N] of the logprobs' type and device; what is used again
                costs less than what is new. It is written before it is known that no term fails.
            cancelled: set it from another thread to withdraw the computation.

        Raises:
            RequestError: data and logprobs do not fit together, a weight is a schedule and
                there is no step, ``totals`` are not those of a step with these datums, or ``out``
                cannot hold the gradient.
            TermError: a term failed, and its ``on_error`` is ``"raise"``; or no term is
                differentiable.
            CancelledError: ``cancelled`` was set.
        """
        here = places.Surroundings.here()
        composition = self._compute(
            data,
            logprobs,
            here,
            step=step,
            totals=totals,
            term_gradients=term_gradients,
            out=out,
            cancelled=cancelled,
        )
        _accumulate(composition)
        return composition

    def compute_loss(
        self,
        data: Sequence[Any],
        logprobs: Sequence[Tensor] | TensorBatch,
        *,
        step: int | None = None,
        totals: Mapping[str, Any] | None = None,
        cancelled: Flag | None = None,
    ) -> ComposedLoss:
        """:meth:`compute` without gradients: losses and metrics, for an evaluation.

        The record has the same keys; its gradient figures are None.
        """
        here = places.Surroundings.here()
        with torch.inference_mode(False), on_this_thread():
            composing = self._begin(data, logprobs, step)
            calls = self._parts(data, composing.batch, totals)
            batch = composing.batch.sharing()
            asked = Asked(calls, data, batch, False, cancelled, here)
            return composing.composed_loss(self._together.evaluate(asked).evaluations)

    async def compute_async(
        self,
        data: Sequence[Any],
        logprobs: Sequence[Tensor] | TensorBatch,
        *,
        step: int | None = None,
        totals: Mapping[str, Any] | None = None,
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
                self._compute,
                data,
                logprobs,
                here,
                step=step,
                totals=totals,
                term_gradients=term_gradients,
                cancelled=cancelled,
            )
            try:
                composition: Composition = await asyncio.wrap_future(future)
            except asyncio.CancelledError:
                cancelled.set()
                raise
        _accumulate(composition)
        return composition

    def _compute(
        self,
        data: Sequence[Any],
        logprobs: Sequence[Tensor] | TensorBatch,
        surroundings: places.Surroundings,
        *,
        step: int | None = None,
        totals: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Composition:
        """Seen by the recorder, if there is one."""
        if self._recorder is None:
            return self._composition(data, logprobs, surroundings, step, totals, **options)
        observed = ObservedStep(self, data, logprobs, step, totals)
        with self._recorder.observing(observed):
            observed.composition = self._composition(
                data, logprobs, surroundings, step, totals, **options
            )
        return observed.composition

    def _composition(
        self,
        data: Sequence[Any],
        logprobs: Sequence[Tensor] | TensorBatch,
        surroundings: places.Surroundings,
        step: int | None,
        totals: Mapping[str, Any] | None,
        term_gradients: bool = False,
        out: Tensor | None = None,
        cancelled: Flag | None = None,
    ) -> Composition:
        with torch.inference_mode(False), on_this_thread():
            composing = self._begin(data, logprobs, step, out)
            calls = self._parts(data, composing.batch, totals)
            batch = composing.batch.sharing()
            asked = Asked(calls, data, batch, True, cancelled, surroundings)
            wanted = Wanted(composing.weights, out, term_gradients)
            results = self._together.evaluate(asked, wanted)
            return composing.composition(results, term_gradients)

    def totals(self, data: Sequence[Any]) -> dict[str, dict[str, Any]]:
        """What each term divides by, for an optimizer step that is sent in several calls.

        ::

            totals = composer.totals(data)
            for part in parts:  # any partition of the data, in any order
                composer.compute(part, logprobs_of(part), totals=totals)

        gives the parts gradients that add up to those of one call with all ``data``. Plain values
        that JSON can hold, by the names of the terms (the base loss under ``"base_loss"``). They
        need no logprobs; those of parts add up with :func:`add_totals`. A term of scope ``group``
        needs its groups whole in every part; what looks at the whole batch, as every plain function
        may, has the scope ``"batch"`` and cannot be split.

        Args:
            data: all datums of the step, each with ``target_tokens`` [T] or [T,K].

        Raises:
            RequestError: a datum has no ``target_tokens``.
            TermError: a term cannot read the datums.
        """
        return totals_of(self._terms, data, shapes_of_targets(data))

    def check_totals(self, totals: Mapping[str, Any], data: Sequence[Any]) -> None:
        """Refuse a part of a step that cannot be computed with ``totals``, before anything is.

        Raises:
            RequestError: they are not those of a step with these datums, the part tears a group,
                or a term looks at the whole batch; naming the term.
        """
        denominators(self._terms, data, shapes_of_targets(data), totals)

    def check_step(self, step: int | None) -> None:
        """Refuse a step that these terms cannot be computed at, before anything is.

        Raises:
            RequestError: it is no step, or a weight is a schedule and there is none.
        """
        check_step(step)
        for term in self._terms:
            term.check_step(step)

    def describe(self) -> dict[str, Any]:
        """What is composed here, as JSON has it: ``base_loss``, ``regularizers`` and ``versions``.

        Of each term its name, ``fn`` (a name of the catalogue, ``module:name``, or None with what
        it is under ``unnamed``), scope, the ``params`` given and the ``defaults`` of the others,
        among them ``reduction`` and estimators, and its weight: a number, or of a schedule its
        name and what it gives at some steps.
        """
        return describe_terms(self._base, self.regularizers)

    @property
    def base_loss(self) -> Regularizer | None:
        """The base loss, as a regularizer of weight 1."""
        return self._base

    def recorded_by(self, recorder: StepObserver) -> Composer:
        """The same composer, whose steps ``recorder`` sees."""
        recorded = copy.copy(self)
        recorded._recorder = checked_observer(recorder)
        return recorded

    def _begin(
        self,
        data: Sequence[Any],
        logprobs: Sequence[Tensor] | TensorBatch,
        step: int | None,
        out: Tensor | None = None,
    ) -> Step:
        started = time.perf_counter()
        self.check_step(step)
        weights = [term.weight_at(step) for term in self._terms]
        batch = checked_batch(data, logprobs)
        if out is not None:
            check_out(out, batch, logprobs)
        return Step(self._terms, weights, logprobs, batch, step, started, out)

    def _parts(
        self, data: Sequence[Any], batch: TensorBatch, totals: Mapping[str, Any] | None
    ) -> Sequence[Call]:
        """The calls of the terms, each with the totals of its step if this is a part of one."""
        if totals is None:
            return self._calls
        each = denominators(self._terms, data, batch.shapes, totals)
        return [replace(call, totals=each.get(call.name)) for call in self._calls]

    def __call__(self, data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Any, Any]:
        """``(loss, metrics)``, as the tinker SDK wants it from a custom loss function.

        With regularizers, ``metrics`` is the nested record, beside the base loss's own metrics.
        With only a base loss, this *is* the base loss: same loss, same graph, same metrics.

        Raises:
            RequestError: a weight is a schedule: the SDK does not say which step this is.
        """
        if self._base is not None and not self.regularizers and not self._base.is_async:
            returned: Any = self._base.fn(data, logprobs, **self._base.params)
            loss, metrics = returned
            return loss, metrics
        here = places.Surroundings.here()
        composition = self._compute(data, logprobs, here)
        loss = surrogate(
            composition.loss_total,
            composition.gradients,
            logprobs,
            composition.parameter_gradients,
        )
        return loss, metrics_of(composition.record)

    def close(self) -> None:
        """Close the terms that are objects with ``aclose`` or ``close``, where they run.

        Processes that run no term are ended. A composer that is used again sets its terms up
        again.

        Raises:
            RequestError: a term has to be closed on the event loop that runs here: await
                :meth:`aclose`.
        """
        lifetimes.close([term.fn for term in self._terms])
        if any(term.run_in_executor == "process" for term in self._terms):
            processes.end_idle()

    async def aclose(self) -> None:
        """:meth:`close`, awaited."""
        await asyncio.wrap_future(THREADS.submit(self.close))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        names = ", ".join(term.name for term in self._terms)
        return f"Composer({names})"


def _check_no_composer(fn: object) -> None:
    if isinstance(fn, Composer):
        raise RequestError(
            "a Composer cannot be a term of another, since its metrics are no plain numbers; give "
            "its terms to one Composer",
            path="fn",
        )


def _accumulate(composition: Composition) -> None:
    for gradient in composition.parameter_gradients:
        gradient.accumulate()
