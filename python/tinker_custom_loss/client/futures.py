"""What a caller of the native face holds while a step is under way."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

from tinker import APIFuture

from ..running.threads import THREADS

__all__ = ["StepFuture", "concurrent_future", "settle", "withdrawable"]

T = TypeVar("T")


class StepFuture(APIFuture[T]):
    """A ``tinker.APIFuture`` over a ``concurrent.futures.Future``.

    To stop waiting, by a timeout or because the awaiting task was cancelled, leaves the step
    under way. ``future().cancel()`` withdraws it.
    """

    def __init__(self, future: concurrent.futures.Future[T]) -> None:
        self._future = future

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result, at most ``timeout`` seconds.

        Raises:
            TimeoutError: it is not there yet.
        """
        return self._future.result(timeout)

    async def result_async(self, timeout: float | None = None) -> T:
        """The same, awaited."""
        waiting = asyncio.wrap_future(self._future)
        # Unshielded, a caller who stops waiting would cancel the step.
        return await asyncio.wait_for(asyncio.shield(waiting), timeout)

    def future(self) -> concurrent.futures.Future[T]:
        """The underlying future, for ``concurrent.futures.wait`` and the like."""
        return self._future

    def __repr__(self) -> str:
        return f"<StepFuture {'done' if self._future.done() else 'pending'}>"


def concurrent_future(future: APIFuture[T]) -> concurrent.futures.Future[T]:
    """The ``concurrent.futures.Future`` of an APIFuture of any SDK version."""
    own = getattr(future, "future", None)  # before tinker 0.38 not every APIFuture has one
    if own is not None:
        return cast("concurrent.futures.Future[T]", own())
    return THREADS.submit(future.result)


def withdrawable(withdrawn: threading.Event) -> concurrent.futures.Future[Any]:
    """A future whose ``cancel()`` sets ``withdrawn``."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def tell(done: concurrent.futures.Future[Any]) -> None:
        if done.cancelled():
            withdrawn.set()

    future.add_done_callback(tell)
    return future


def settle(outer: concurrent.futures.Future[T], outcome: Callable[[], T]) -> None:
    """Give ``outer`` what ``outcome`` returns or raises, unless it was cancelled."""
    if not outer.set_running_or_notify_cancel():
        return
    try:
        outer.set_result(outcome())
    except BaseException as error:  # KeyboardInterrupt too: it belongs to whoever waits
        outer.set_exception(error)
