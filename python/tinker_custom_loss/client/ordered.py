"""A training client whose calls wait for the steps before them."""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tinker import TrainingClient

from . import sdk
from .call_queue import CallQueue, as_it_is, refuse_within
from .failures import Failures
from .proxy import Proxy

__all__ = ["OrderedClient"]

# A proxy has every method of whatever client it is given, also of a later SDK. Type checkers,
# and the editors that ask them, are told the class.
if TYPE_CHECKING:

    class _Proxy(Proxy, TrainingClient): ...

else:
    _Proxy = Proxy


_queues: weakref.WeakKeyDictionary[TrainingClient, CallQueue] = weakref.WeakKeyDictionary()
_queues_lock = threading.Lock()


def _queue_of(training_client: TrainingClient) -> CallQueue:
    """The one of all wrappers of a client: a notebook wraps it anew while steps are under way."""
    with _queues_lock:
        return _queues.setdefault(training_client, CallQueue())


class OrderedClient(_Proxy):
    """Every method of a ``tinker.TrainingClient``, in the order of one queue."""

    def __init__(self, training_client: TrainingClient, failures: Failures) -> None:
        self._client = training_client
        self._failures = failures
        self._queue = _queue_of(training_client)

    if not TYPE_CHECKING:  # a type checker would let every name pass

        def __getattr__(self, name: str) -> Any:
            attribute = self._of_client(name)
            if name.startswith("_") or sdk.takes_no_place(name) or not inspect.ismethod(attribute):
                return attribute
            return self._in_turn(name, attribute)

    def _in_turn(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """``method``, behind the steps that are under way."""

        def bound(args: Any, kwargs: Any) -> Callable[[], Any]:
            refuse_within(self._client, name)
            era = self._failures.era
            args = tuple(map(as_it_is, args))
            kwargs = {key: as_it_is(value) for key, value in kwargs.items()}

            def call() -> Any:
                self._failures.refuse(era)
                return method(*args, **kwargs)

            return call

        kind = sdk.submits(method)
        if name.endswith("_async") or inspect.iscoroutinefunction(method):

            @functools.wraps(method)
            async def in_turn_async(*args: Any, **kwargs: Any) -> Any:
                call = bound(args, kwargs)
                if kind is None:
                    return await self._queue.run_async(call)
                return await self._queue.submit_async(call, kind)

            return in_turn_async

        @functools.wraps(method)
        def in_turn(*args: Any, **kwargs: Any) -> Any:
            call = bound(args, kwargs)
            return self._queue.run(call) if kind is None else self._queue.submit(call, kind)

        return in_turn
