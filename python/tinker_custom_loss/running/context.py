"""Which term is running, and for whose step: what logs, torch's modes and clients ask.

Both are context variables, so they follow a term into threads, tasks and the tasks that it starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["computing_for", "current_term", "running", "term_computing_for"]

current_term: ContextVar[str | None] = ContextVar("current_term", default=None)
"""Name of the term that is running, for logging."""


class _Step:
    """A step that somebody owns. A task may outlive it, and is then no longer part of it."""

    def __init__(self, owner: object) -> None:
        self.owner: object | None = owner


_steps: ContextVar[tuple[_Step, ...]] = ContextVar("steps", default=())


@contextmanager
def running(name: str) -> Iterator[None]:
    """Mark a term as running."""
    token = current_term.set(name)
    try:
        yield
    finally:
        current_term.reset(token)


@contextmanager
def computing_for(owner: object) -> Iterator[None]:
    """Mark what is computed here, wherever its terms run in this process, as a step of ``owner``.

    A client whose calls wait for its own step can then refuse one that a term of it makes, which
    would wait for ever.
    """
    step = _Step(owner)
    token = _steps.set((*_steps.get(), step))
    try:
        yield
    finally:
        _steps.reset(token)
        step.owner = None


def term_computing_for(owner: object) -> str | None:
    """The name of the term that calls this, if it runs for a step of ``owner`` that goes on."""
    if any(step.owner is owner for step in _steps.get()):
        return current_term.get()
    return None
