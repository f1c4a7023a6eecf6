"""A term's function and params on their way to another process: pickled once, loaded once there."""

from __future__ import annotations

import hashlib
import pickle
import traceback
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import cloudpickle

from ..errors import TermError

__all__ = ["ShippedCall", "UnknownFunctionError"]

_MOST_LOADED = 64

_loaded: OrderedDict[str, tuple[Any, Mapping[str, Any]]] = OrderedDict()


class UnknownFunctionError(LookupError):
    """A function was named that this process does not have, or no longer."""


@dataclass(frozen=True)
class ShippedCall:
    """What :class:`~.evaluation.Call` is made of there; ``pickled`` is None where it is known."""

    name: str
    digest: str
    pickled: bytes | None

    @classmethod
    def of(cls, name: str, fn: object, params: Mapping[str, Any]) -> ShippedCall:
        """Pickle a function, by value where no other process could import it: from a script, a
        notebook, or as a closure."""
        pickled = cloudpickle.dumps((fn, dict(params)))
        return cls(name, hashlib.sha256(pickled).hexdigest(), pickled)

    def without_function(self) -> ShippedCall:
        """For a process that has it."""
        return replace(self, pickled=None)

    def load(self) -> tuple[Any, Mapping[str, Any]]:
        """The function and its params: the same ones every time, so that what they keep is kept.

        Raises:
            UnknownFunctionError: it was sent without them, and they are not here.
            TermError: they cannot be loaded here.
        """
        if self.digest not in _loaded:
            if self.pickled is None:
                raise UnknownFunctionError(self.digest)
            try:
                _loaded[self.digest] = pickle.loads(self.pickled)
            except Exception as error:
                raise TermError(
                    f'the process of the term "{self.name}" cannot load it: {error}; what it '
                    "imports must be importable there",
                    term=self.name,
                    error_type=type(error).__qualname__,
                    traceback="".join(traceback.format_exception(error)),
                ) from error
            if len(_loaded) > _MOST_LOADED:
                _loaded.popitem(last=False)
        _loaded.move_to_end(self.digest)
        return _loaded[self.digest]
