"""The results of requests until their client has them, in a bounded number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future
from typing import Any

from .errors import ClosedError, UnknownError

__all__ = ["Futures"]


class Futures:
    """Futures by request id. Pending ones stay; of the finished ones, ``limit`` bytes do.

    A result is kept after it was retrieved, for a client that lost the answer, but is the first to
    go. The newest is never dropped.
    """

    def __init__(self, limit: int = 32 * 2**20) -> None:
        self._limit = limit
        self._futures: dict[str, Future[Any]] = {}
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._retrieved: OrderedDict[str, None] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, request_id: str) -> Future[Any]:
        """A new future under this id."""
        future: Future[Any] = Future()
        with self._lock:
            self._futures[request_id] = future
        future.add_done_callback(lambda done: self._done(request_id, done))
        return future

    def get(self, request_id: str) -> Future[Any]:
        """:raises UnknownError: there never was such a request, or its result was dropped."""
        with self._lock:
            future = self._futures.get(request_id)
        if future is None:
            raise UnknownError(
                f"there is no request {request_id!r} here, or its result was dropped: the sandbox "
                f"keeps {self._limit >> 20} MiB of results, those that were retrieved the shortest",
                path="request_id",
            )
        return future

    def retrieved(self, request_id: str) -> None:
        """The client has been sent this result."""
        with self._lock:
            if request_id in self._sizes:
                self._retrieved[request_id] = None

    def close(self, owner: str) -> None:
        """Fail what is pending of a model or a sampling session."""
        with self._lock:
            pending = [
                future
                for request_id, future in self._futures.items()
                if request_id.rpartition("/")[0] == owner and not future.done()
            ]
        for future in pending:
            future.set_exception(ClosedError("the sandbox was closed"))

    def _done(self, request_id: str, future: Future[Any]) -> None:
        failed = future.cancelled() or future.exception() is not None
        size = 512 + (0 if failed else getattr(future.result(), "nbytes", 0))
        with self._lock:
            self._sizes[request_id] = size
            self._bytes += size
            while self._bytes > self._limit and len(self._sizes) > 1:
                self._drop(next(iter(self._retrieved or self._sizes)))

    def _drop(self, request_id: str) -> None:
        self._bytes -= self._sizes.pop(request_id)
        self._retrieved.pop(request_id, None)
        self._futures.pop(request_id, None)
