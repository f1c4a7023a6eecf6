"""The order of one client's calls, and the context that each was made in.

A custom step is two requests, with the client's own work between them. The SDK (from 0.38 on)
keeps the order of calls by reserving places for both, and runs the losses of *all* clients of a
process one after another on one thread. Here each client has its own queue: while a step is
under way, later calls of the same client wait behind it, and other clients go on.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import copy
import functools
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

from tinker import APIFuture

from ..errors import RequestError
from ..running.threads import THREADS
from .futures import StepFuture, concurrent_future, settle

__all__ = ["CallQueue", "as_it_is", "computing", "refuse_within"]

T = TypeVar("T")
Kind = Callable[[APIFuture[T]], APIFuture[T]]

# The clients whose losses are being computed around this call, the outermost first.
_COMPUTING: contextvars.ContextVar[tuple[object, ...]] = contextvars.ContextVar(
    "tinker_custom_loss_computing", default=()
)


@contextlib.contextmanager
def computing(client: object) -> Iterator[None]:
    """Around the code of a user's that a step of ``client`` waits for."""
    token = _COMPUTING.set((*_COMPUTING.get(), client))
    try:
        yield
    finally:
        _COMPUTING.reset(token)


def refuse_within(client: object, call: str) -> None:
    """Refuse a call to ``client`` that one of its own terms makes.

    Raises:
        RequestError: the call would wait for the step, and the step for the term that makes it.
    """
    if any(client is outer for outer in _COMPUTING.get()):
        raise RequestError(
            f"a term called {call}() of the training client whose step it is a part of: the call "
            "would wait for the step, and the step for the term, for ever; make the call before "
            "the step, or on another client",
            path="training_client",
        )


def as_it_is(argument: Any) -> Any:
    """An argument of a call that may wait: the loop may fill its list anew for the next one."""
    return copy.copy(argument) if isinstance(argument, (list, dict)) else argument


class CallQueue:
    """Calls, made one after another in the order in which they arrived.

    Each is made in the context (``contextvars``) of its caller: trace ids and scopes stay true.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], None]] = deque()
        self._busy = False

    def enqueue(self, job: Callable[[], None]) -> None:
        """Run ``job``, which does not raise, on a thread of this package in its turn."""
        with self._lock:
            self._enqueue(job)

    def submit(self, call: Callable[[], APIFuture[T]], kind: Kind[T] | None = None) -> APIFuture[T]:
        """The future that ``call`` returns; called here and now if nobody is before it.

        Else a future of its own, which ``kind`` makes into one that can do as much as that.
        """
        with self._lock:
            if not self._busy:
                return call()
            return self._later(call, kind)

    async def submit_async(
        self, call: Callable[[], Awaitable[APIFuture[T]]], kind: Kind[T] | None = None
    ) -> APIFuture[T]:
        """:meth:`submit` for a coroutine that does not wait for anything, as the SDK's."""

        async def awaited() -> APIFuture[T]:
            return await call()

        with self._lock:
            if self._busy:
                # On a loop of its own: the caller's may be blocked by a call behind this one.
                return self._later(lambda: asyncio.run(awaited()), kind)
        return await call()

    def _later(self, call: Callable[[], APIFuture[T]], kind: Kind[T] | None) -> APIFuture[T]:
        outer: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._enqueue(functools.partial(follow, outer, call))
        future = StepFuture(outer)
        return future if kind is None else kind(future)

    def run(self, call: Callable[[], T]) -> T:
        """What ``call`` returns, once its turn has come: this waits."""
        outer: concurrent.futures.Future[T] = concurrent.futures.Future()
        with self._lock:
            if busy := self._busy:
                self._enqueue(functools.partial(settle, outer, call))
        return outer.result() if busy else call()

    async def run_async(self, call: Callable[[], Awaitable[T]]) -> T:
        """:meth:`run` for a coroutine, which is begun in its turn.

        The SDK's coroutines take their place in the order before they first wait for anything,
        so their turn ends then.
        """
        outer: concurrent.futures.Future[T] = concurrent.futures.Future()
        with self._lock:
            if busy := self._busy:
                self._enqueue(functools.partial(_begin, outer, call))
        return await (asyncio.wrap_future(outer) if busy else call())

    def _enqueue(self, job: Callable[[], None]) -> None:
        self._waiting.append(functools.partial(contextvars.copy_context().run, job))
        if not self._busy:
            self._busy = True
            THREADS.submit(self._work)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting or THREADS.ending:  # nothing is sent while Python ends
                    self._busy = False
                    return
                job = self._waiting.popleft()
            job()


def follow(outer: concurrent.futures.Future[T], call: Callable[[], APIFuture[T]]) -> None:
    """Make a call whose turn has come, and have ``outer`` end as its future does."""
    if outer.cancelled():
        outer.set_running_or_notify_cancel()  # tells those who wait with concurrent.futures.wait
        return
    try:
        inner = concurrent_future(call())
    except BaseException as error:
        settle(outer, functools.partial(_raise, error))
    else:
        inner.add_done_callback(lambda done: settle(outer, done.result))


def _begin(outer: concurrent.futures.Future[T], call: Callable[[], Awaitable[T]]) -> None:
    """Run a coroutine whose turn has come; the turn is over when it first waits for something."""
    if not outer.set_running_or_notify_cancel():
        return
    begun = threading.Event()

    async def main() -> T:
        task: asyncio.Future[T] = asyncio.ensure_future(call())
        await asyncio.sleep(0)
        begun.set()
        return await task

    def run() -> None:
        try:
            result = asyncio.run(main())
        except BaseException as error:
            outer.set_exception(error)
        else:
            outer.set_result(result)
        finally:
            begun.set()

    THREADS.submit(run)
    begun.wait()


def _raise(error: BaseException) -> Any:
    raise error
