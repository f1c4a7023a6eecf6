"""Requests in flight, and how one of them is stopped.

A request that waits is told by an event. One whose Python code runs inline is interrupted: an
exception is raised in its thread, at the next bytecode. That is done only while the thread is
inside the user's function, so it can neither hit this package's code, nor the next request.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from ..errors import CancelledError
from ..regularizer import is_coroutine_function
from .process import end_if_forked

__all__ = [
    "InlineTurn",
    "Interrupted",
    "Request",
    "current_request",
    "ending_if_forked",
    "interruptible",
]

_POLL_SECONDS = 0.02


class Interrupted(BaseException):
    """The request of the function in which this is raised was cancelled."""


class Request:
    """A request in flight, which may be withdrawn."""

    def __init__(self, request_id: int) -> None:
        self.id = request_id
        self._cancelled = False  # an Event takes longer to make than the rest of this class
        self._lock = threading.Lock()
        self._thread: int | None = None  # that runs a function of the user for this request
        self._interrupted = False

    def is_set(self) -> bool:
        """Whether it has been withdrawn."""
        return self._cancelled

    def cancel(self) -> None:
        """Withdraw it."""
        self._cancelled = True
        with self._lock:
            if self._thread is not None and not self._interrupted:
                self._interrupted = True
                _set_async_exception(self._thread, Interrupted)

    def enter(self) -> None:
        """The calling thread is about to run a function of the user.

        Raises:
            CancelledError: too late, the request is cancelled.
        """
        with self._lock:
            if self._cancelled:
                raise CancelledError("the computation was cancelled by its caller")
            self._thread = threading.get_ident()

    def leave(self) -> None:
        """It has done so. An interruption that has not arrived is taken back."""
        with self._lock:
            thread, self._thread = self._thread, None
            if self._interrupted and thread is not None:
                _set_async_exception(thread, None)


current_request: ContextVar[Request | None] = ContextVar("current_request", default=None)
"""The request that is running, for logging and cancellation."""


def interruptible(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn``, interrupted when the request it runs for is cancelled."""

    @functools.wraps(fn)
    def inline(*args: Any, **kwargs: Any) -> Any:
        request = current_request.get()
        if request is None:
            return fn(*args, **kwargs)
        request.enter()
        try:
            return fn(*args, **kwargs)
        finally:
            request.leave()

    return inline


def ending_if_forked(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn``, after which a process that it forked ends, in a thread that does not answer itself.

    Such a process would stay there for ever, and share the event loop of the worker's async terms.
    """

    @functools.wraps(fn)
    def called(*args: Any, **kwargs: Any) -> Any:
        worker = os.getpid()
        try:
            return fn(*args, **kwargs)
        finally:
            end_if_forked(worker)

    @functools.wraps(fn)
    async def awaited(*args: Any, **kwargs: Any) -> Any:
        worker = os.getpid()
        try:
            return await fn(*args, **kwargs)
        finally:
            end_if_forked(worker)

    return awaited if is_coroutine_function(fn) else called


class InlineTurn:
    """A lock around inline code that a cancelled request stops waiting for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        request = current_request.get()
        while not self._lock.acquire(timeout=_POLL_SECONDS):
            if request is not None and request.is_set():
                raise CancelledError("the computation was cancelled by its caller")

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _set_async_exception(thread: int, kind: type[BaseException] | None) -> None:
    """Raise ``kind`` in a thread at its next bytecode; None: take back one that is to be raised."""
    argument = None if kind is None else ctypes.py_object(kind)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), argument)
