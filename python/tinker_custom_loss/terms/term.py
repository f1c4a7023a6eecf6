"""What a built-in term is: a function over the whole batch as one flat buffer.

Written once for the flat form, it is callable like any user's ``fn(data, logprobs, **params)``
too, so that a built-in term works wherever a function of that shape does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..tensors.batch import TensorBatch

__all__ = ["FlatFn", "Term", "term"]

FlatFn = Callable[..., tuple[Tensor, dict[str, float]]]
"""``fn(data, logprobs: TensorBatch, **params) -> (loss, metrics)``"""


class Term:
    """A loss function over a :class:`TensorBatch`, callable with a list of tensors as well."""

    __name__: str
    __qualname__: str
    __wrapped__: FlatFn

    def __init__(self, fn: FlatFn) -> None:
        functools.update_wrapper(self, fn)

    def __call__(
        self, data: Sequence[Any], logprobs: Sequence[Tensor], **params: Any
    ) -> tuple[Tensor, dict[str, float]]:
        return self.evaluate_flat(data, TensorBatch.from_tensors(logprobs), **params)

    def evaluate_flat(
        self, data: Sequence[Any], logprobs: TensorBatch, **params: Any
    ) -> tuple[Tensor, dict[str, float]]:
        """The term itself. The composer calls this form."""
        return self.__wrapped__(data, logprobs, **params)

    def __reduce__(self) -> str:
        return self.__qualname__  # pickled by name, like a function

    def __repr__(self) -> str:
        return f"<term {self.__name__}>"


def term(fn: FlatFn) -> Term:
    """Make a :class:`Term` of a function over the flat form. Use as a decorator."""
    return Term(fn)
