"""Terms that are objects with a life: ``setup`` before the first call, ``aclose`` or ``close``.

Either may be async. They are called where the term runs: on its loop, on its thread or in its
process. An object that several composers use is set up once, and closed with the first of them;
whoever calls it after that finds it set up again.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import logging
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..errors import RequestError
from .event_loop import OWN_LOOP
from .modes import Modes
from .threads import THREADS

__all__ = ["close", "close_all", "set_up", "set_up_async"]

logger = logging.getLogger(__name__)


@dataclass
class _Life:
    term: Any
    loop: asyncio.AbstractEventLoop | None
    ready: concurrent.futures.Future[None] = field(default_factory=concurrent.futures.Future)


_lives: dict[int, _Life] = {}  # by id; each holds its term, so that no other can get the id
_lock = threading.Lock()


def set_up(term: Any, wait: Callable[[Any], Any]) -> None:
    """Set a term up, if nobody has; ``wait`` waits for what its ``setup`` returns to be awaited."""
    life, mine = _claim(term)
    if life is None:
        return
    if not mine:
        life.ready.result()
        return
    with _settling(life):
        returned = life.term.setup() if hasattr(life.term, "setup") else None
        if inspect.isawaitable(returned):
            wait(returned)


async def set_up_async(term: Any) -> None:
    """:func:`set_up` on a loop."""
    life, mine = _claim(term)
    if life is None:
        return
    if not mine:
        await asyncio.shield(asyncio.wrap_future(life.ready))
        return
    with _settling(life):
        returned = life.term.setup() if hasattr(life.term, "setup") else None
        if inspect.isawaitable(returned):
            await returned


def _claim(term: Any) -> tuple[_Life | None, bool]:
    """The life of a term, None if it is a mere function; and whether the caller begins it."""
    if not any(callable(getattr(term, name, None)) for name in ("setup", "aclose", "close")):
        return None, False
    with _lock:
        life = _lives.get(id(term))
        if life is not None and not (life.loop is not None and life.loop.is_closed()):
            return life, False
        life = _lives[id(term)] = _Life(term, _running_loop())
        return life, True


@contextmanager
def _settling(life: _Life) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        with _lock:
            _lives.pop(id(life.term), None)
        life.ready.set_exception(error)
        raise
    life.ready.set_result(None)


def close(terms: list[Any]) -> None:
    """Close those of ``terms`` that were set up here.

    Raises:
        RequestError: this is the thread of the loop on which one of them has to be closed.
    """
    with _lock:
        lives = [_lives[id(term)] for term in terms if id(term) in _lives]
    for life in lives:
        if life.loop is not None and life.loop is _running_loop():
            raise RequestError(
                "close() would wait for its own event loop, for ever; await aclose() there"
            )
    for life in lives:
        with _lock:
            _lives.pop(id(life.term), None)
        closer = getattr(life.term, "aclose", None) or getattr(life.term, "close", None)
        returned = closer() if callable(closer) else None
        if inspect.isawaitable(returned):
            _await(returned, life.loop)


def close_all(seconds: float) -> None:
    """Close whatever was set up, as the interpreter ends; what takes longer is left."""
    with _lock:
        terms = [life.term for life in _lives.values()]
    closings = [THREADS.submit(close, [term]) for term in terms]
    concurrent.futures.wait(closings, seconds)
    for closing in closings:
        error = closing.exception() if closing.done() else None
        if error is not None:
            logger.error("a term could not be closed: %s: %s", type(error).__name__, error)


def _await(awaitable: Any, loop: asyncio.AbstractEventLoop | None) -> None:
    async def awaited() -> Any:
        return await awaitable

    if loop is not None and loop.is_running():
        asyncio.run_coroutine_threadsafe(awaited(), loop).result()
    elif loop is None:
        OWN_LOOP.check_may_wait()
        OWN_LOOP.submit(awaited, Modes.here()).result()
    elif isinstance(awaitable, Coroutine):  # its loop has ended, and with it all that was open
        awaitable.close()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
