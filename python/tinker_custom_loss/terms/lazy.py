"""A property that is computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, overload

__all__ = ["lazy"]

T = TypeVar("T")


class lazy(Generic[T]):  # it reads as the decorator that it is
    """``functools.cached_property`` without the lock that all instances share before Python 3.12.

    With it a term would wait for whichever other one is computing, in any thread; and for ever,
    where that one waits for what this one holds. Two threads may compute the same value here.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object | None, owner: type) -> T | Self:
        if instance is None:
            return self
        value: T = self._compute(instance)
        instance.__dict__[self._name] = value  # where it is found before this
        return value
