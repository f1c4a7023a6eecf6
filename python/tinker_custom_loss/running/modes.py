"""Torch's modes: grad mode, inference mode and autocast, which torch keeps by thread.

A term starts with gradients on, whatever the caller's grad mode is, and with the caller's autocast.
Tasks share a thread, so each one has modes of its own, put in place for every step it takes: a term
that awaits inside ``torch.no_grad()`` switches nothing off for the others, and a task that it
starts begins with the modes it was started in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from .context import current_term

__all__ = ["Modes", "OwnModes", "child_tasks_have_own_modes"]


def _has_autocast(device: str) -> bool:
    try:
        torch.get_autocast_dtype(device)
    except RuntimeError:  # this build of torch knows none for it
        return False
    return True


_AUTOCAST_DEVICES = tuple(filter(_has_autocast, ("cpu", "cuda", "mps", "xpu")))


@dataclass(frozen=True)
class Modes:
    """What torch does on a thread. Plain values, which travel to other processes."""

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]  # by device: whether, and to what
    autocast_cache: bool

    @classmethod
    def here(cls) -> Modes:
        """The modes of the calling thread."""
        return cls(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            tuple(
                (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
                for device in _AUTOCAST_DEVICES
            ),
            torch.is_autocast_cache_enabled(),
        )

    def for_terms(self) -> Modes:
        """The same, with gradients on."""
        return replace(self, grad=True, inference=False)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Put them in place, and whatever was there back."""
        before = Modes.here()
        with torch.inference_mode(self.inference):
            self._set()
            try:
                yield
            finally:
                before._set()

    def _set(self) -> None:
        torch.set_grad_enabled(self.grad)
        for device, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)


class OwnModes(Coroutine[Any, Any, Any], Generator[Any, Any, Any]):
    """A coroutine with modes of its own, kept while it is suspended."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], modes: Modes) -> None:
        self._coroutine = coroutine
        self._modes = modes

    def _step(self, advance: Callable[..., Any], *arguments: Any) -> Any:
        with self._modes.entered():
            try:
                return advance(*arguments)
            finally:
                self._modes = Modes.here()

    def send(self, value: Any) -> Any:
        return self._step(self._coroutine.send, value)

    def throw(self, *error: Any) -> Any:
        return self._step(self._coroutine.throw, *error)

    def close(self) -> None:
        self._step(self._coroutine.close)

    def __await__(self) -> Generator[Any, Any, Any]:
        return self  # to be sent to step by step, as asyncio itself does it

    def __getattr__(self, name: str) -> Any:
        # cr_frame, cr_await and the like, by which asyncio shows where a task stands.
        return getattr(self._coroutine, name)


class _TaskFactory:
    """Gives the tasks that terms start modes of their own; all else is as it was before."""

    def __init__(self, before: Callable[..., Any] | None) -> None:
        self.before = before
        self.users = 0

    def __call__(
        self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any
    ) -> asyncio.Future[Any]:
        if current_term.get() is not None and not isinstance(coroutine, OwnModes):
            coroutine = OwnModes(coroutine, Modes.here())
        task: asyncio.Future[Any] = (self.before or _new_task)(loop, coroutine, **options)
        return task


def _new_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
    return asyncio.Task(coroutine, loop=loop, **options)


@contextmanager
def child_tasks_have_own_modes(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """For as long as a term runs on a loop. To be called on the loop's own thread."""
    there: Any = loop.get_task_factory()
    factory = there if isinstance(there, _TaskFactory) else _TaskFactory(there)
    if factory is not there:
        loop.set_task_factory(factory)
    factory.users += 1
    try:
        yield
    finally:
        factory.users -= 1
        # Who put another one over ours meanwhile goes on calling ours.
        if not factory.users and loop.get_task_factory() is factory:
            loop.set_task_factory(factory.before)
