"""The event loop on which async terms run, in a thread of this package's own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import Coroutine, Generator, Iterator
from typing import Any

import torch

__all__ = ["EventLoop"]

logger = logging.getLogger(__name__)


class EventLoop:
    """One event loop for async terms.

    The tinker SDK calls custom losses from inside its own running loop, where nothing can be
    awaited synchronously.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        """Run a coroutine there, beside the others."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(
                    target=_run, args=(self._loop,), name="tinker-custom-loss-async", daemon=True
                ).start()
        return asyncio.run_coroutine_threadsafe(_OwnGradMode(coroutine), self._loop)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    while True:
        try:
            loop.run_forever()
        except BaseException:  # SystemExit in a task that a term started ends run_forever
            logger.exception("a task of an async term tried to end the event loop")


class _OwnGradMode(Coroutine[Any, Any, Any]):
    """A coroutine with grad and inference modes of its own.

    Torch keeps them by thread. A term that awaits inside ``torch.no_grad()`` would switch them off
    for every other term on the loop, whose losses would then have no graph.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._coroutine = coroutine
        self._grad = True
        self._inference = False

    @contextlib.contextmanager
    def _modes(self) -> Iterator[None]:
        with torch.inference_mode(self._inference), torch.set_grad_enabled(self._grad):
            try:
                yield
            finally:
                self._grad = torch.is_grad_enabled()
                self._inference = torch.is_inference_mode_enabled()

    def send(self, value: Any) -> Any:
        with self._modes():
            return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        with self._modes():
            return self._coroutine.throw(*error)

    def close(self) -> None:
        with self._modes():
            self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._coroutine.__await__()
