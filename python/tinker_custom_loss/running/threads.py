"""Threads of this package's own, and what the interpreter has to end on any thread."""

from __future__ import annotations

import concurrent.futures
import contextvars
import ctypes
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import TermError

__all__ = ["THREADS", "interrupt", "interrupt_all", "on_this_thread", "still_running"]

logger = logging.getLogger(__name__)

MOST_LEFT_BEHIND = 32
"""Threads that may be held by terms for which nobody waits any more."""


class Threads(concurrent.futures.Executor):
    """Daemon threads, reused: as many as there is work at one time.

    A ThreadPoolExecutor joins its threads when the interpreter ends, so one term that never
    returns would keep the process alive for ever; and a bounded pool would make terms wait.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start anew, in the child of a fork: threads do not survive it."""
        self._idle: list[queue.SimpleQueue[Callable[[], None]]] = []
        self._left_behind: set[concurrent.futures.Future[Any]] = set()
        self._lock = threading.Lock()
        self.ending = False

    def submit(
        self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        context = contextvars.copy_context()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = context.run(fn, *args, **kwargs)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._lock:
            inbox = self._idle.pop() if self._idle else None
        if inbox is None:
            inbox = queue.SimpleQueue()
            threading.Thread(
                target=self._work, args=(inbox,), name="tinker-custom-loss-term", daemon=True
            ).start()
        inbox.put(job)
        return future

    def check_room(self, term: str) -> None:
        """Refuse to start one more term where too many have outlived their steps.

        Raises:
            TermError: there are as many as there may be.
        """
        if len(self._left_behind) >= MOST_LEFT_BEHIND:
            raise TermError(
                f'the term "{term}" was not started: {MOST_LEFT_BEHIND} threads are held by terms '
                "that have outlived their steps, and a thread cannot be ended; set "
                'run_in_executor to "process"',
                term=term,
            )

    def leave_behind(self, future: concurrent.futures.Future[Any], term: str) -> None:
        """Nobody waits for a term any more. It counts until it has ended by itself."""
        if future.cancel() or future.done() or self.ending:
            return
        with self._lock:
            self._left_behind.add(future)
            count = len(self._left_behind)
        logger.warning(
            'the term "%s" runs on in its thread, which cannot be ended, although its step is '
            'over: thread %d of at most %d; with run_in_executor="process" it would be ended',
            term,
            count,
            MOST_LEFT_BEHIND,
        )
        future.add_done_callback(self._ended)

    def _ended(self, future: concurrent.futures.Future[Any]) -> None:
        with self._lock:
            self._left_behind.discard(future)

    def _work(self, inbox: queue.SimpleQueue[Callable[[], None]]) -> None:
        while True:
            inbox.get()()
            with self._lock:
                self._idle.append(inbox)


THREADS = Threads()

_depths: dict[int, int] = {}  # how many computations and terms a thread is inside of


@contextmanager
def on_this_thread() -> Iterator[None]:
    """Mark the calling thread as running a term, or a computation that waits for terms."""
    thread = threading.get_ident()
    _depths[thread] = _depths.get(thread, 0) + 1
    try:
        yield
    finally:
        _depths[thread] -= 1
        if not _depths[thread]:
            del _depths[thread]


class _Exiting(SystemExit):
    """The interpreter ends. Threads end silently by a SystemExit."""


def interrupt(thread: int) -> None:
    """Raise SystemExit in a thread at its next bytecode."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Exiting))


def interrupt_all() -> None:
    """Interrupt whatever runs on other threads: the interpreter ends."""
    THREADS.ending = True
    for thread in _others():
        interrupt(thread)


def still_running(seconds: float) -> bool:
    """Whether something runs on another thread even after so long a wait."""
    expires = time.monotonic() + seconds
    while _others():
        if time.monotonic() >= expires:
            return True
        time.sleep(0.005)
    return False


def _others() -> list[int]:
    here = threading.get_ident()
    return [thread for thread in list(_depths) if thread != here]


def _forget_after_fork() -> None:
    THREADS.forget()
    for thread in _others():
        del _depths[thread]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
