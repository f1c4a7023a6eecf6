"""Where a term runs, and how long it may take.

    False        inline: on the calling thread; an async function on an event loop
    True         a thread
    "process"    a process of its own (see processes.py)
    an Executor  whatever it is: a thread or process pool, a Dask cluster

Everything that does not run inline is started first, so that it overlaps with the inline terms
and with everything else that was started.
"""

from __future__ import annotations

import concurrent.futures
import contextvars
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import RequestError, TermError, TermTimeoutError
from ..regularizer import Regularizer
from ..tensors.batch import TensorBatch
from . import exits  # noqa: F401 - has what runs here ended when the interpreter ends
from .context import running
from .differentiation import Evaluation, differentiate
from .evaluation import (
    Call,
    RemoteCall,
    RemoteReply,
    evaluate,
    evaluate_remote,
    evaluation_from,
    guarding,
)
from .event_loop import OWN_LOOP, Loop, Waiting
from .lifetimes import set_up_async
from .modes import Modes
from .processes import ProcessRun
from .shipping import ShippedCall
from .threads import THREADS

__all__ = ["Started", "Surroundings", "run_inline", "runs_inline", "shipped", "start"]


@dataclass(frozen=True)
class Surroundings:
    """What the terms of one computation find around them: the loop that runs what is async, and
    torch's modes."""

    loop: Loop
    modes: Modes

    @classmethod
    def here(cls, loop: Loop = OWN_LOOP) -> Surroundings:
        """Those of the thread on which a computation is asked for."""
        return cls(loop, Modes.here().for_terms())


@dataclass(frozen=True)
class Started:
    """A term that is running somewhere else.

    ``finish`` turns what the future holds into an Evaluation, on the calling thread; ``abandon``
    ends the term, where that is possible.
    """

    future: concurrent.futures.Future[Any]
    finish: Callable[[Any], Evaluation]
    abandon: Callable[[], object]
    expires: float  # time.monotonic()
    _ended: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.future.add_done_callback(lambda _: self._ended.append(time.monotonic()))

    @property
    def late(self) -> bool:
        """Whether it has outlived its timeout, even if it ended while inline terms still ran."""
        return (self._ended[0] if self._ended else time.monotonic()) >= self.expires

    def evaluation(self, name: str) -> Evaluation:
        """The evaluation of a term whose future is done.

        Raises:
            TermError: whatever went wrong, under the term's name.
        """
        try:
            returned = self.future.result(timeout=0)
        except TermError:
            raise
        except (Exception, concurrent.futures.CancelledError) as error:
            raise TermError.from_exception(name, error) from error
        return self.finish(returned)

    def time_out(self, name: str, timeout: float) -> TermTimeoutError:
        """End the term and say that it was late."""
        self.abandon()
        return TermTimeoutError(
            f'the term "{name}" outlived its timeout of {timeout:g} s', term=name
        )


def runs_inline(term: Regularizer) -> bool:
    """Whether a term runs on the calling thread."""
    return term.run_in_executor is False and not term.is_async


def shipped(term: Regularizer) -> ShippedCall | None:
    """The call of a term that is sent to a process, pickled once, when a composer is built.

    Raises:
        RequestError: it cannot be sent there; naming the term, why, and what to do.
    """
    place = term.run_in_executor
    if place != "process":
        if not isinstance(place, concurrent.futures.ProcessPoolExecutor):
            return None
        _check_start_method(term, place)
    try:
        return ShippedCall.of(term.name, term.fn, term.params)
    except Exception as error:
        raise RequestError(
            f'regularizer "{term.name}" cannot run in a process, because its function or params '
            f"cannot be pickled: {error}; create there what cannot travel, in the function itself, "
            "or set run_in_executor to True",
            path="run_in_executor",
        ) from error


def _check_start_method(term: Regularizer, pool: concurrent.futures.ProcessPoolExecutor) -> None:
    context = getattr(pool, "_mp_context", None)  # which the pool keeps to itself
    if context is not None and context.get_start_method() == "fork":
        raise RequestError(
            f'the pool of regularizer "{term.name}" forks its processes, in which torch hangs at '
            "its first parallel operation; give it "
            'mp_context=multiprocessing.get_context("spawn")',
            path="run_in_executor",
        )


def run_inline(
    call: Call,
    data: Sequence[Any],
    logprobs: TensorBatch,
    gradients: bool,
    surroundings: Surroundings,
) -> Evaluation:
    """Run a term on the calling thread."""
    waiting = Waiting(surroundings.loop)
    return evaluate(call, data, logprobs, gradients, surroundings.modes, waiting)


def start(
    term: Regularizer,
    call: Call,
    shipped: ShippedCall | None,
    data: Sequence[Any],
    logprobs: TensorBatch,
    gradients: bool,
    surroundings: Surroundings,
) -> Started:
    """Start a term that does not run inline.

    Raises:
        RequestError: this is the thread of the event loop, which must not wait for others.
    """
    surroundings.loop.check_may_wait()
    place, timeout = term.run_in_executor, term.timeout
    expires = time.monotonic() + timeout if timeout is not None else float("inf")
    if place is False:
        return _start_async(call, data, logprobs, gradients, surroundings, expires)
    if place is True:
        return _start_thread(call, data, logprobs, gradients, surroundings, expires)

    values = logprobs.flat.detach().cpu().numpy()
    remote_call = RemoteCall(
        shipped or call,
        data,
        values,
        logprobs.shapes,
        gradients,
        surroundings.modes,
        call.totals,
    )

    def finish(reply: RemoteReply) -> Evaluation:
        return evaluation_from(reply, logprobs.flat)

    if place == "process":
        run = ProcessRun(remote_call, timeout)
        # The run keeps its own time, from when its process is ready.
        return Started(THREADS.submit(run.run), finish, run.kill, float("inf"))
    assert isinstance(place, concurrent.futures.Executor)
    # In this process, say in a thread pool, it is the memory of all terms: have it copied there.
    values.flags.writeable = False
    work: tuple[Any, ...] = (evaluate_remote, remote_call)
    if isinstance(place, concurrent.futures.ThreadPoolExecutor):
        work = (contextvars.copy_context().run, *work)
    with guarding(call.name):
        future = place.submit(*work)
    return Started(future, finish, future.cancel, expires)


def _start_async(
    call: Call,
    data: Sequence[Any],
    logprobs: TensorBatch,
    gradients: bool,
    surroundings: Surroundings,
    expires: float,
) -> Started:
    started = time.perf_counter()
    leaf = call.leaf(logprobs)

    async def awaited() -> Any:
        with running(call.name), guarding(call.name, leaf, awaiting=True):
            await set_up_async(call.fn)
            return await call(data, leaf)

    def finish(returned: object) -> Evaluation:
        # Differentiating here leaves the loop to the terms that are still awaiting.
        return differentiate(call.name, returned, leaf, gradients, started)

    with guarding(call.name):
        future = surroundings.loop.submit(awaited, surroundings.modes)
    return Started(future, finish, future.cancel, expires)


def _start_thread(
    call: Call,
    data: Sequence[Any],
    logprobs: TensorBatch,
    gradients: bool,
    surroundings: Surroundings,
    expires: float,
) -> Started:
    THREADS.check_room(call.name)
    waiting = Waiting(surroundings.loop)
    future = THREADS.submit(evaluate, call, data, logprobs, gradients, surroundings.modes, waiting)

    def abandon() -> None:
        if not waiting.cancel():
            THREADS.leave_behind(future, call.name)

    return Started(future, _as_is, abandon, expires)


def _as_is(evaluation: Evaluation) -> Evaluation:
    return evaluation
