"""One switch: whether a step takes the fast paths, or only the general one that they must equal.

A fast path is a second way to the same number: a gradient in closed form where autograd would find
it, arithmetic on the bits of a mask where ``torch.where`` would choose, numpy over the datums'
arrays where torch would join them one by one. With ``TINKER_CUSTOM_LOSS_FAST=0`` in the environment
there are none, in this process and those that it starts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["fast", "without_fast_paths"]

_fast = ContextVar("fast", default=os.environ.get("TINKER_CUSTOM_LOSS_FAST", "1") != "0")

fast = _fast.get
"""Whether fast paths are taken here."""


@contextmanager
def without_fast_paths() -> Iterator[None]:
    """Take the general path only, in this context and the threads that terms are run on from it."""
    token = _fast.set(False)
    try:
        yield
    finally:
        _fast.reset(token)
