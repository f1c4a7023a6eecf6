"""Evaluate one term: call it, check what it returned, differentiate it.

This is the whole of what happens where a term runs, be that the calling thread, another thread,
another process or another machine, so it depends on nothing but its arguments.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import inspect
import numbers
import threading
import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ChangedLogprobsError, TermError
from ..regularizer import LossFn, show
from ..tensors.batch import Shape, TensorBatch

__all__ = ["Call", "Outcome", "current_term", "differentiate", "evaluate"]

current_term: ContextVar[str | None] = ContextVar("current_term", default=None)
"""Name of the term that is running, for logging."""


@dataclass(frozen=True)
class Call:
    """A function with its keyword arguments, under the name that errors use.

    A function that has an attribute ``evaluate_flat``, as built-in terms do, is called through it
    with the :class:`TensorBatch` itself in place of the list of tensors.
    """

    name: str
    fn: LossFn
    params: Mapping[str, Any]

    def __call__(self, data: Sequence[Any], logprobs: TensorBatch) -> Any:
        evaluate_flat = getattr(self.fn, "evaluate_flat", None)
        if evaluate_flat is not None:
            return evaluate_flat(data, logprobs, **self.params)
        return self.fn(data, logprobs.tensors(), **self.params)


@dataclass(frozen=True)
class Outcome:
    """What one term computed.

    ``gradient`` is ``∂value/∂logprobs`` over the flat buffer [N], unweighted; None if the loss
    does not depend on the logprobs through a graph, or if no gradient was asked for.
    """

    value: float
    metrics: dict[str, float]
    differentiable: bool
    gradient: Tensor | None
    seconds: float


def leaf_of(logprobs: TensorBatch) -> TensorBatch:
    """A leaf of a new graph over the same memory: each term has its own.

    ``.data`` rather than ``.detach()``: it counts in-place changes on its own, so that they can
    be told apart by term.
    """
    return logprobs.with_flat(logprobs.flat.data.requires_grad_(True))


def evaluate(call: Call, data: Sequence[Any], logprobs: TensorBatch, gradients: bool) -> Outcome:
    """Run a sync term (or, in an event loop of its own, an async one) and differentiate it.

    Raises:
        TermError: it raised, or returned what no term may return.
    """
    started = time.perf_counter()
    leaf = leaf_of(logprobs)
    with running(call.name), torch.enable_grad(), guarding(call.name, leaf):
        returned = call(data, leaf)
        if inspect.isawaitable(returned):
            returned = _await_here(returned)
    return differentiate(call.name, returned, leaf, gradients, started)


def differentiate(
    name: str, returned: object, leaf: TensorBatch, gradients: bool, started: float
) -> Outcome:
    """Check what a term returned and take its gradient.

    The gradient is taken on its own, with ``torch.autograd.grad``, so that no graph outlives its
    term and ``.grad`` of nothing is touched.
    """
    try:
        loss, metrics = _checked(name, returned)
        value = float(loss.detach())
        gradient = None
        differentiable = loss.requires_grad
        if differentiable and gradients:
            (gradient,) = torch.autograd.grad(loss.reshape(()), leaf.flat, allow_unused=True)
            differentiable = gradient is not None
    except TermError:
        raise
    except Exception as error:
        raise TermError.from_exception(name, error) from error
    return Outcome(value, metrics, differentiable, gradient, time.perf_counter() - started)


@contextmanager
def running(name: str) -> Iterator[None]:
    """Mark a term as running, for the log records it causes."""
    token = current_term.set(name)
    try:
        yield
    finally:
        current_term.reset(token)


@contextmanager
def guarding(
    name: str, leaf: TensorBatch | None = None, *, awaiting: bool = False
) -> Iterator[None]:
    """Whatever a term raises becomes a TermError that names it.

    ``sys.exit`` in a term ends that term, not the process. A term that changed its ``leaf`` in
    place changed everyone's logprobs. ``awaiting``: this is a task, which may be cancelled.
    """
    try:
        yield
    except BaseException as error:
        if _is_for_others(error, awaiting):
            raise
        _check_unchanged(name, leaf, error)
        raise TermError.from_exception(name, error) from error
    _check_unchanged(name, leaf, None)


def _is_for_others(error: BaseException, awaiting: bool) -> bool:
    """Ctrl-C, which only ever reaches the main thread, is the user's own; and a task that is being
    cancelled must end as cancelled."""
    if isinstance(error, KeyboardInterrupt):
        return threading.current_thread() is threading.main_thread()
    if isinstance(error, asyncio.CancelledError):
        return awaiting
    return isinstance(error, GeneratorExit)


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _check_unchanged(name: str, leaf: TensorBatch | None, error: BaseException | None) -> None:
    if leaf is not None and leaf.flat._version:
        raise ChangedLogprobsError(
            f'the term "{name}" changed the logprobs in place, which the other terms share; '
            "terms must leave their arguments as they are: clone what you change",
            term=name,
        ) from error


def _await_here(awaitable: Awaitable[Any]) -> Any:
    """Wait for an awaitable on this thread, or beside it if a loop already runs here."""

    async def awaited() -> Any:
        return await awaitable

    if not _in_event_loop():
        return asyncio.run(awaited())
    with concurrent.futures.ThreadPoolExecutor(1) as beside:
        return beside.submit(contextvars.copy_context().run, asyncio.run, awaited()).result()


def _checked(name: str, returned: object) -> tuple[Tensor, dict[str, float]]:
    if not isinstance(returned, (tuple, list)) or len(returned) != 2:
        raise TermError(
            f'the term "{name}" returned {_describe(returned)}; a term returns a pair '
            "(loss, metrics): a scalar torch.Tensor and a dict of numbers",
            term=name,
        )
    loss, metrics = returned
    if not isinstance(loss, Tensor):
        raise TermError(
            f'the term "{name}" returned {_describe(loss)} as its loss; expected a scalar '
            "torch.Tensor computed from the logprobs",
            term=name,
        )
    if loss.numel() != 1:
        raise TermError(
            f'the term "{name}" returned a loss of shape {list(loss.shape)}; expected a scalar: '
            "reduce it, for example with .sum() or .mean()",
            term=name,
        )
    if loss.is_complex():
        raise TermError(f'the term "{name}" returned a complex loss; take .real', term=name)
    if metrics is None:
        metrics = {}
    if not isinstance(metrics, Mapping):
        raise TermError(
            f'the term "{name}" returned {_describe(metrics)} as its metrics; expected a dict '
            "of numbers",
            term=name,
        )
    return loss, {_key(name, key): _number(name, key, value) for key, value in metrics.items()}


def _key(name: str, key: object) -> str:
    if isinstance(key, str):
        return key
    raise TermError(
        f'the term "{name}" returned a metric whose name is {_describe(key)}; expected a string',
        term=name,
    )


def _number(name: str, key: object, value: object) -> float:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value.detach())
    if isinstance(value, (numbers.Real, np.bool_)):
        return float(value)
    raise TermError(
        f'the metric "{key}" of the term "{name}" is {_describe(value)}; expected a number',
        term=name,
    )


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return show(value)


# --- Elsewhere -----------------------------------------------------------------------------
# What crosses a process boundary is numpy and plain values: torch would send file descriptors.


@dataclass(frozen=True)
class Parcel:
    """One term's work, ready to be pickled."""

    call: Call
    data: Sequence[Any]
    values: np.ndarray[Any, Any]
    shapes: tuple[Shape, ...]
    gradients: bool


@dataclass(frozen=True)
class ParcelReply:
    """What came back: an outcome with a numpy gradient, or the failure as text."""

    outcome: tuple[float, dict[str, float], bool, np.ndarray[Any, Any] | None, float] | None
    failure: dict[str, Any] | None


def evaluate_parcel(parcel: Parcel) -> ParcelReply:
    """Evaluate a term where it was sent to. Errors travel as text: the original may not pickle."""
    try:
        values = parcel.values if parcel.values.flags.writeable else parcel.values.copy()
        batch = TensorBatch(torch.from_numpy(values), parcel.shapes)
        outcome = evaluate(parcel.call, parcel.data, batch, parcel.gradients)
    except TermError as error:
        failure = {"message": str(error), "term": error.term, "error_type": error.error_type}
        return ParcelReply(None, {**failure, "traceback": error.traceback})
    gradient = None if outcome.gradient is None else outcome.gradient.contiguous().numpy()
    return ParcelReply(
        (outcome.value, outcome.metrics, outcome.differentiable, gradient, outcome.seconds), None
    )


def open_reply(reply: ParcelReply, like: Tensor) -> Outcome:
    """The outcome of a term that ran elsewhere, with its gradient on the device of ``like``."""
    if reply.failure is not None:
        failure = dict(reply.failure)
        raise TermError(failure.pop("message"), **failure)
    assert reply.outcome is not None
    value, metrics, differentiable, gradient, seconds = reply.outcome
    tensor = None
    if gradient is not None:
        tensor = torch.from_numpy(gradient if gradient.flags.writeable else gradient.copy())
        tensor = tensor.to(like.device, like.dtype)
    return Outcome(value, metrics, differentiable, tensor, seconds)
