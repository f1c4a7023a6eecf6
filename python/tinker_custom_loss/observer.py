"""Who may look on while a composer computes: the flight recorder is one who does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from .errors import RequestError
from .regularizer import show
from .tensors.batch import TensorBatch

if TYPE_CHECKING:
    from .composer import Composer
    from .composition import Composition

__all__ = ["ObservedStep", "StepObserver", "checked_observer"]


@dataclass
class ObservedStep:
    """What a composer was given for one step, and, once it has it, what it made of that."""

    composer: Composer
    data: Sequence[Any]
    logprobs: Sequence[Tensor] | TensorBatch
    step: int | None
    totals: Mapping[str, Any] | None
    composition: Composition | None = None


class StepObserver(Protocol):
    """Sees every step of a composer that has it as its ``recorder``."""

    def observing(self, observed: ObservedStep) -> AbstractContextManager[None]:
        """Around a step: it begins before anything is computed, and ends with the ``composition``,
        or with the exception that the step ends with, which it must let through."""
        ...


def checked_observer(recorder: StepObserver | None) -> StepObserver | None:
    """A recorder, or None.

    Raises:
        RequestError: it has no method ``observing``.
    """
    if recorder is None or callable(getattr(recorder, "observing", None)):
        return recorder
    raise RequestError(
        f"recorder must be a Recorder, or another object with a method observing, got "
        f"{show(recorder)}",
        path="recorder",
    )
