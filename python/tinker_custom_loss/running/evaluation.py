"""Evaluate one term: call it, check what it returned, differentiate it.

This is the whole of what happens where a term runs, be that the calling thread, another thread,
another process or another machine, so it depends on nothing but its arguments.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import TermError
from ..fast_paths import fast
from ..regularizer import LossFn
from ..tensors.batch import Shape, TensorBatch
from .context import current_term, running
from .differentiation import Evaluation, check_unchanged, differentiate, leaf_of
from .event_loop import OWN_LOOP, Waiting
from .in_blocks import BlockTerm
from .lifetimes import set_up
from .modes import Modes
from .returned import checked
from .shipping import ShippedCall
from .threads import on_this_thread

_CATALOGUE = f"{__package__.removesuffix('.running')}.terms."

__all__ = ["Call", "RemoteCall", "RemoteReply", "evaluate", "in_blocks", "is_of_catalogue"]


def is_of_catalogue(fn: object) -> bool:
    """Whether a function is one of this package's own terms, which are known to be right.

    The very one that its module has: ``functools.wraps`` gives a user's function the names of the
    term that it wraps.
    """
    home = getattr(fn, "__module__", None) or ""
    return home.startswith(_CATALOGUE) and (
        getattr(sys.modules.get(home), getattr(fn, "__name__", ""), None) is fn
    )


@dataclass(frozen=True)
class Call:
    """A function with its keyword arguments, under the name that errors use.

    A function that has an attribute ``evaluate_flat``, as built-in terms do, is called through it
    with the :class:`TensorBatch` itself in place of the list of tensors, and with the ``totals``
    of the step where this is a part of one.
    """

    name: str
    fn: LossFn
    params: Mapping[str, Any]
    totals: Mapping[str, float] | None = None

    def leaf(self, logprobs: TensorBatch) -> TensorBatch:
        """What it is to be called with. The terms of the catalogue change nothing."""
        return leaf_of(logprobs, shares_memory=is_of_catalogue(self.fn))

    def __call__(self, data: Sequence[Any], logprobs: TensorBatch) -> Any:
        evaluate_flat = getattr(self.fn, "evaluate_flat", None)
        if evaluate_flat is not None:
            return evaluate_flat(data, logprobs, self.totals, **self.params)
        return self.fn(data, logprobs.tensors(), **self.params)


def evaluate(
    call: Call,
    data: Sequence[Any],
    logprobs: TensorBatch,
    gradients: bool,
    modes: Modes,
    waiting: Waiting,
) -> Evaluation:
    """Run a term and differentiate it; what it returns to be awaited, say as a lambda over an
    async function, is awaited by ``waiting``.

    Raises:
        TermError: it raised, or returned what no term may return.
    """
    started = time.perf_counter()
    if fast() and getattr(call.fn, "has_derivative", False):
        return _in_closed_form(call, data, logprobs, gradients, modes, started)
    leaf = call.leaf(logprobs)
    with on_this_thread():
        with running(call.name), modes.entered(), guarding(call.name, leaf):
            set_up(call.fn, lambda returned: waiting.wait(returned, modes))
            returned = call(data, leaf)
            if inspect.isawaitable(returned):
                returned = waiting.wait(returned, modes)
        return differentiate(call.name, returned, leaf, gradients, started)


def in_blocks(call: Call, data: Sequence[Any], logprobs: TensorBatch) -> BlockTerm | None:
    """The same of a term of the catalogue that needs no more than a block of the batch at a time.

    Raises:
        TermError: it cannot read the data.
    """
    term: Any = call.fn
    started = time.perf_counter()
    token = current_term.set(call.name)
    try:
        found: BlockTerm | None = term.in_blocks(data, logprobs, call.totals, **call.params)
    except Exception as error:
        raise TermError.from_exception(call.name, error) from error
    finally:
        current_term.reset(token)
    if found is not None:
        found.seconds += time.perf_counter() - started
    return found


def _in_closed_form(
    call: Call,
    data: Sequence[Any],
    logprobs: TensorBatch,
    gradients: bool,
    modes: Modes,
    started: float,
) -> Evaluation:
    """Without a graph. A term of the catalogue does the same in any mode, and changes nothing."""
    term: Any = call.fn
    ours = is_of_catalogue(term)
    leaf = None if ours else leaf_of(logprobs)
    with (
        on_this_thread(),
        running(call.name),
        contextlib.nullcontext() if ours else modes.entered(),
        guarding(call.name, leaf),
    ):
        loss, metrics, gradient = term.value_and_gradient(
            data, leaf or logprobs, totals=call.totals, gradient=gradients, **call.params
        )
    if not ours:
        loss, metrics = checked(call.name, (loss, metrics))
    seconds = time.perf_counter() - started
    return Evaluation(float(loss), metrics, True, gradient, seconds, borrowed=True)


@contextmanager
def guarding(
    name: str, leaf: TensorBatch | None = None, *, awaiting: bool = False
) -> Iterator[None]:
    """Whatever a term raises becomes a TermError that names it.

    ``sys.exit`` in a term ends that term, not the process. A term that changed its ``leaf`` in
    place is refused. ``awaiting``: this is a task, which may be cancelled.
    """
    try:
        yield
    except BaseException as error:
        if _is_for_others(error, awaiting):
            raise
        check_unchanged(name, leaf, error)
        raise TermError.from_exception(name, error) from error
    check_unchanged(name, leaf, None)


def _is_for_others(error: BaseException, awaiting: bool) -> bool:
    """Ctrl-C, which only ever reaches the main thread, is the user's own; and a task that is being
    cancelled must end as cancelled."""
    if isinstance(error, KeyboardInterrupt):
        return threading.current_thread() is threading.main_thread()
    if isinstance(error, asyncio.CancelledError):
        return awaiting
    return isinstance(error, GeneratorExit)


# --- Elsewhere -----------------------------------------------------------------------------
# What crosses a process boundary is numpy and plain values: torch would send file descriptors.


_IMPORT = uuid.uuid4().hex


def _this_process() -> tuple[int, str]:
    """A fork has the same import, another machine may have the same process id."""
    return os.getpid(), _IMPORT


@dataclass(frozen=True)
class RemoteCall:
    """One term's work, ready to be pickled."""

    call: Call | ShippedCall
    data: Sequence[Any]
    values: np.ndarray[Any, Any]
    shapes: tuple[Shape, ...]
    gradients: bool
    modes: Modes
    totals: Mapping[str, float] | None = None
    home: tuple[int, str] = field(default_factory=_this_process)


@dataclass(frozen=True)
class RemoteReply:
    """What came back: an evaluation and its gradient, or the failure as text."""

    evaluation: Evaluation | None  # without its gradient
    gradient: np.ndarray[Any, Any] | None
    failure: dict[str, Any] | None


def evaluate_remote(remote: RemoteCall) -> RemoteReply:
    """Evaluate a term where it was sent to. Errors travel as text: the original may not pickle.

    Raises:
        UnknownFunctionError: its function was sent before, but is not here.
    """
    try:
        values = remote.values if remote.values.flags.writeable else remote.values.copy()
        batch = TensorBatch(torch.from_numpy(values), remote.shapes)
        call = remote.call
        if isinstance(call, ShippedCall):
            call = Call(call.name, *call.load(), remote.totals)
        done = evaluate(call, remote.data, batch, remote.gradients, remote.modes, Waiting(OWN_LOOP))
        if done.parameter_gradients and remote.home != _this_process():
            shapes = [list(part.parameter.shape) for part in done.parameter_gradients]
            raise TermError(
                f'the loss of the term "{remote.call.name}" depends on parameters of its own (of '
                f"shapes {shapes}), but it runs in another process, on copies of them that nobody "
                "trains; run it inline or in a thread (run_in_executor=True), or detach them",
                term=remote.call.name,
            )
    except TermError as error:
        failure = {"message": str(error), "term": error.term, "error_type": error.error_type}
        # Its class decides whether it may be skipped.
        return RemoteReply(
            None, None, {**failure, "traceback": error.traceback, "class": type(error)}
        )
    gradient = None if done.gradient is None else done.gradient.contiguous().numpy()
    return RemoteReply(done._replace(gradient=None), gradient, None)


def evaluation_from(reply: RemoteReply, like: Tensor) -> Evaluation:
    """The evaluation of a term that ran elsewhere, with its gradient on the device of ``like``."""
    if reply.failure is not None:
        failure = dict(reply.failure)
        raise failure.pop("class")(failure.pop("message"), **failure)
    assert reply.evaluation is not None
    gradient = reply.gradient
    if gradient is None:
        return reply.evaluation
    tensor = torch.from_numpy(gradient if gradient.flags.writeable else gradient.copy())
    return reply.evaluation._replace(gradient=tensor.to(like.device, like.dtype))
