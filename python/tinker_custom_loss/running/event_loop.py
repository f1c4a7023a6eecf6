"""Where async terms run: an event loop of this package's own, or the one of the caller.

``compute`` runs them on one loop that is kept, in a thread of its own: the tinker SDK calls custom
losses from inside its own running loop, where nothing can be awaited synchronously; and what a term
keeps, such as an ``httpx.AsyncClient``, belongs to the loop on which it was first used.
``compute_async`` runs them on the caller's loop, to which the caller's semaphores belong.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

from ..errors import RequestError
from .context import current_term
from .modes import Modes, OwnModes, child_tasks_have_own_modes
from .threads import THREADS, interrupt, on_this_thread

__all__ = ["CTRL_C_POLL_SECONDS", "OWN_LOOP", "CallersLoop", "Loop", "Waiting"]

CTRL_C_POLL_SECONDS = 1.0
"""A thread that waits for a lock hears of Ctrl-C only between two waits, if the signal was given to
another thread, or to this one just before it waited."""

logger = logging.getLogger(__name__)

# Not a coroutine: one whose task is cancelled before its first step would never be awaited.
AsyncCall = Callable[[], Coroutine[Any, Any, Any]]


class Loop(Protocol):
    """What runs coroutines for threads that wait for them."""

    def submit(self, call: AsyncCall, modes: Modes) -> concurrent.futures.Future[Any]:
        """Make a call and await it, in the context of this one and with these modes."""

    def check_may_wait(self) -> None:
        """Refuse to wait for it on its own thread, which would wait for ever.

        Raises:
            RequestError: that is where this is called.
        """


class _OwnThreads(concurrent.futures.ThreadPoolExecutor):
    """For ``asyncio.to_thread`` in a term: Python would wait for a pool of its own at exit."""

    def submit(
        self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> concurrent.futures.Future[Any]:
        return THREADS.submit(on_this_thread()(fn), *args, **kwargs)


class OwnLoop:
    """One event loop, started when it is first needed and kept."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start anew, in the child of a fork: threads do not survive it."""
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closing = False

    def submit(self, call: AsyncCall, modes: Modes) -> concurrent.futures.Future[Any]:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._loop.set_default_executor(_OwnThreads())
                self._thread = threading.Thread(
                    target=self._run,
                    args=(self._loop,),
                    name="tinker-custom-loss-async",
                    daemon=True,
                )
                self._thread.start()
        return _start(call, modes, self._loop)

    @property
    def stuck(self) -> bool:
        """Whether it is closed but a term goes on holding its thread."""
        return self._closing and self._thread is not None and self._thread.is_alive()

    def close(self, seconds: float) -> None:
        """End the tasks that still run, background tasks of terms among them, and the thread."""
        with self._lock:
            self._closing = True
            loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return
        ending = asyncio.run_coroutine_threadsafe(_end_tasks(seconds / 2), loop)
        with contextlib.suppress(concurrent.futures.TimeoutError):
            ending.result(seconds)
        loop.call_soon_threadsafe(loop.stop)
        if not ending.done() and thread.ident is not None:
            interrupt(thread.ident)  # a term that does not await
        thread.join(seconds / 2)
        if not thread.is_alive():
            loop.close()

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            try:
                loop.run_forever()
                return
            except BaseException:  # SystemExit in a task that a term started ends run_forever
                if self._closing:
                    return
                logger.exception("a task of an async term tried to end the event loop")

    def check_may_wait(self) -> None:
        if threading.current_thread() is self._thread:
            raise RequestError(
                f'the async term "{current_term.get()}" computes a composition inside itself and '
                "would hold the event loop that its terms run on, for ever; await compute_async() "
                "there, or give all terms to one Composer"
            )


OWN_LOOP = OwnLoop()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=OWN_LOOP.forget)


class CallersLoop:
    """The running loop, for the length of one ``compute_async``::

        async with CallersLoop() as loop: ...

    If that is left by an exception, say because the caller is cancelled, then the tasks of its
    terms are cancelled and have ended before it goes on.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def submit(self, call: AsyncCall, modes: Modes) -> concurrent.futures.Future[Any]:
        return _start(functools.partial(self._tracked, call), modes, self._loop)

    def check_may_wait(self) -> None:
        """The thread that waits was started by ``compute_async``: it is not the loop's."""

    async def __aenter__(self) -> CallersLoop:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._closed = True
        if kind is not None and self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)

    async def _tracked(self, call: AsyncCall) -> Any:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if self._closed:
                raise asyncio.CancelledError
            return await call()
        finally:
            self._tasks.discard(task)


class Waiting:
    """What one term awaits although its function is not async: its thread waits meanwhile."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._cancelled = False
        self._future: concurrent.futures.Future[Any] | None = None

    def wait(self, awaitable: Awaitable[Any], modes: Modes) -> Any:
        """Await it on the loop.

        Raises:
            RequestError: this is the thread of the loop.
            CancelledError: :meth:`cancel` was called.
        """
        begun = False

        async def awaited() -> Any:
            nonlocal begun
            with self._lock:
                if self._cancelled:
                    raise asyncio.CancelledError
                begun = True
            return await awaitable

        try:
            self._loop.check_may_wait()
            with self._lock:
                self._future = self._loop.submit(awaited, modes)
            while not concurrent.futures.wait([self._future], CTRL_C_POLL_SECONDS).done:
                pass
            return self._future.result()
        except BaseException:  # Ctrl-C among them
            self.cancel()
            raise
        finally:
            if not begun and isinstance(awaitable, Coroutine):
                awaitable.close()

    def cancel(self) -> bool:
        """End it; whether there was something to end."""
        with self._lock:
            self._cancelled = True
            return self._future is not None and self._future.cancel()


def _start(
    call: AsyncCall, modes: Modes, loop: asyncio.AbstractEventLoop
) -> concurrent.futures.Future[Any]:
    async def called() -> Any:
        with child_tasks_have_own_modes(loop):
            return await call()

    coroutine = OwnModes(called(), modes)
    try:
        return asyncio.run_coroutine_threadsafe(coroutine, loop)
    except RuntimeError:  # the caller's loop is closed
        coroutine.close()
        raise


async def _end_tasks(seconds: float) -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=seconds)
    await asyncio.get_running_loop().shutdown_asyncgens()
