"""Which term is running: what logs and torch's modes ask.

A context variable, so it follows a term into threads, tasks and the tasks that it starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["current_term", "running"]

current_term: ContextVar[str | None] = ContextVar("current_term", default=None)
"""Name of the term that is running, for logging."""


@contextmanager
def running(name: str) -> Iterator[None]:
    """Mark a term as running."""
    token = current_term.set(name)
    try:
        yield
    finally:
        current_term.reset(token)
