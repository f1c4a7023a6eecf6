"""Words of sentences."""

from __future__ import annotations

__all__ = ["counted"]


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """``1 datum``, ``2 datums``; a ``plural`` is given where it is not an s more."""
    return f"{count} {noun if count == 1 else plural or f'{noun}s'}"
