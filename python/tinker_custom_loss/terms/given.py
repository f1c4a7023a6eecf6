"""A term with its parameters: checked once, and sorted by who reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..regularizer import nearest
from .importance import Importance
from .reduction import Reduction

if TYPE_CHECKING:
    from .term import Term

__all__ = ["Given", "check_params"]

OF_IMPORTANCE = ("importance", "importance_cap", "importance_floor")


class Given:
    """What a term is asked to do.

    ``keys`` are those of its inputs, ``optional`` pairs of a key and of the one that it is by
    default, ``own`` the keyword arguments of its function.
    """

    def __init__(self, made: Term, params: Mapping[str, Any]) -> None:
        check_params(made, params)
        bound = made.__signature__.bind(None, None, **params)
        bound.apply_defaults()
        values = bound.arguments
        self.term = made
        self.own = {name: values[name] for name in made.own}
        self.weights: str | None = values["weights"]
        self.reduction = Reduction(values["reduction"], values["normalizer"])
        self.importance = Importance()
        if made.has_importance:
            self.importance = Importance(*(values[name] for name in OF_IMPORTANCE))
        self.keys = [values[name] for name in made.inputs]
        self.optional = [(values[name], usual) for name, usual in made.optional.items()]
        if self.importance:
            self.sampler: str = values[made.sampler]
            if made.ratio is not None:
                self.keys[made.ratio] = values["old"]
        if made.scope == "group":
            self.group: str = values["group"]
            self.chosen: str = values["chosen"]


def check_params(made: Term, params: Mapping[str, Any]) -> None:
    """Check what can be checked of parameters before there is a batch.

    Raises:
        ValueError: one has a value that it cannot have.
        TypeError: there is no such parameter.
    """
    defaults = made.defaults
    for name in params:
        if name not in defaults:
            raise TypeError(
                f'the term {made.__name__} has no parameter "{name}"; {nearest(name, [*defaults])}'
            )
    for name, allowed in made.choices.items():
        if name in params and params[name] not in allowed:
            known = ", ".join(map(str, allowed))
            raise ValueError(
                f"unknown {name} {params[name]!r} of the term {made.__name__}; expected one of "
                f"{known}"
            )
    values = {**defaults, **params}
    for name, ranged in made.ranges.items():
        expected = ranged.refusal(values[name], values)
        if expected is not None:
            raise ValueError(
                f'the parameter "{name}" of the term {made.__name__} must be {expected}, got '
                f"{values[name]!r}"
            )
    Reduction(values["reduction"], values["normalizer"])
    if made.has_importance:
        keys = ("" if made.ratio is None else values["old"], values[made.sampler])
        Importance.check(made.__name__, made.scope, params, keys)
