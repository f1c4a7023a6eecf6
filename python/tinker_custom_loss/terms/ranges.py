"""Which numbers a parameter may be: declared beside its type, checked when it is given."""

from __future__ import annotations

import numbers
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

__all__ = ["Fraction", "Index", "NonNegative", "Positive", "Range", "Ranged", "range_of"]


@dataclass(frozen=True)
class Range:
    """The numbers that a parameter may be, as a part of its annotation.

        @term(scope="token")
        def drift(logprob, *, power: Annotated[float, Range(above=0)] = 2.0): ...

    Each bound is a number, or the name of another parameter. None has a place only where the
    annotated type has it. What is no real number is refused, and so is nan.
    """

    at_least: float | str | None = None
    above: float | str | None = None
    at_most: float | str | None = None
    below: float | str | None = None

    def __str__(self) -> str:
        low = self.at_least if self.above is None else self.above
        high = self.at_most if self.below is None else self.below
        if high is None:
            return f"{'>=' if self.above is None else '>'} {_bound(low)}"
        if low is None:
            return f"{'<=' if self.below is None else '<'} {_bound(high)}"
        left, right = "[" if self.above is None else "(", "]" if self.below is None else ")"
        return f"in {left}{_bound(low)}, {_bound(high)}{right}"

    def holds(self, value: Any, others: Mapping[str, Any]) -> bool:
        """Whether a number is in it, given the other parameters."""

        def number(bound: float | str) -> Any:
            return others[bound] if isinstance(bound, str) else bound

        return bool(
            (self.at_least is None or value >= number(self.at_least))
            and (self.above is None or value > number(self.above))
            and (self.at_most is None or value <= number(self.at_most))
            and (self.below is None or value < number(self.below))
            and value == value
        )


Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(at_least=0)]
Fraction = Annotated[float, Range(at_least=0, at_most=1)]
Index = Annotated[int, Range(at_least=0)]


@dataclass(frozen=True)
class Ranged:
    """A parameter's range with what else its type says."""

    range: Range
    integer: bool
    optional: bool

    def __str__(self) -> str:
        text = f"{'int' if self.integer else 'float'} {self.range}"
        return f"{text} | None" if self.optional else text

    def refusal(self, value: object, others: Mapping[str, Any]) -> str | None:
        """What is expected instead of a value; None if it is good."""
        if value is None and self.optional:
            return None
        kind = numbers.Integral if self.integer else numbers.Real
        if isinstance(value, kind) and not isinstance(value, bool):
            bounds = {
                name: other for name, other in others.items() if isinstance(other, numbers.Real)
            }
            named = [bound for bound in vars(self.range).values() if isinstance(bound, str)]
            if any(name not in bounds for name in named):  # which is refused on its own
                return None
            if self.range.holds(value, bounds):
                return None
        what = "an integer" if self.integer else "a number"
        return f"{what} {self.range}{', or None' if self.optional else ''}"


def range_of(hint: object) -> Ranged | None:
    """The range in a resolved annotation, if it has one."""
    if get_origin(hint) is not Annotated:
        return None
    kind, *extras = get_args(hint)
    found = next((extra for extra in extras if isinstance(extra, Range)), None)
    if found is None:
        return None
    kinds = get_args(kind) if typing.get_args(kind) else (kind,)
    return Ranged(found, int in kinds and float not in kinds, NoneType in kinds)


def _bound(bound: float | str | None) -> str:
    return bound if isinstance(bound, str) else f"{bound:g}"
