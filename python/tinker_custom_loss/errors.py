"""One exception per who-is-at-fault.

    CustomLossError
    ├── RequestError      the caller's request: an option, a shape, a name (also a ValueError)
    ├── TermError         the user's term: it raised, or returned what no term may return
    │   ├── NonFiniteError    its loss or gradient is nan or infinite
    │   ├── ChangedLogprobsError  it changed the logprobs in place
    │   ├── StaleGraphError   its loss leads back to the logprobs of another step
    │   └── TermTimeoutError  it outlived its own timeout
    ├── CancelledError    the caller withdrew the request
    ├── StoppedError      a step failed before, and the training client was told to stop then
    └── ProtocolError     bytes that are not a frame, or a frame that is not a message

``kind`` is the word that travels over the port (see docs/protocol.md, "Errors").
"""

from __future__ import annotations

import traceback as _traceback
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

__all__ = [
    "CancelledError",
    "ChangedLogprobsError",
    "CustomLossError",
    "NonFiniteError",
    "ProtocolError",
    "RequestError",
    "StaleGraphError",
    "StoppedError",
    "TermError",
    "TermTimeoutError",
]


class CustomLossError(Exception):
    """Base of everything this package raises on purpose."""

    kind: ClassVar[str] = "internal"

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle as cls(*args), which lacks the keyword arguments; one that cannot be
        # read again breaks the process pool that carries it.
        return _rebuilt, (type(self), self.args), self.__dict__


def _rebuilt(cls: type[CustomLossError], args: tuple[Any, ...]) -> CustomLossError:
    return cls.__new__(cls, *args)


class RequestError(CustomLossError, ValueError):
    """The request cannot be carried out as written; the message says where and what is allowed."""

    kind: ClassVar[str] = "request"

    def __init__(self, message: str, *, path: str | None = None) -> None:
        super().__init__(message)
        self.path = path


class TermError(CustomLossError):
    """A base loss or regularizer raised, or returned something that is not a loss.

    ``term`` is the regularizer's name (``"base_loss"`` for the base loss), ``error_type`` the
    Python type of what it raised, ``traceback`` its traceback as text, from the term's own frames.
    """

    kind: ClassVar[str] = "term"

    def __init__(
        self,
        message: str,
        *,
        term: str,
        error_type: str | None = None,
        traceback: str | None = None,
    ) -> None:
        super().__init__(message)
        self.term = term
        self.error_type = error_type
        self.traceback = traceback

    @classmethod
    def from_exception(cls, term: str, error: BaseException) -> TermError:
        """Wrap what a term raised. Use as ``raise TermError.from_exception(...) from error``."""
        kind = type(error)
        name = kind.__qualname__
        if kind.__module__ not in ("builtins", "__main__"):
            name = f"{kind.__module__}.{name}"
        text = "".join(_traceback.format_exception(kind, error, _own_frames(error)))
        return cls(
            f'the term "{term}" raised {name}: {said(error)}',
            term=term,
            error_type=name,
            traceback=text,
        )


def said(error: BaseException) -> str:
    """``str(error)``, or why there is none: an exception's ``__str__`` is anybody's code."""
    try:
        return str(error)
    except Exception as failure:
        return f"(its __str__ raised {type(failure).__name__})"


def _own_frames(error: BaseException) -> TracebackType | None:
    """The traceback from the first frame that is not of this package's machinery."""
    package = Path(__file__).parent
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        file = Path(frame.tb_frame.f_code.co_filename)
        if package not in file.parents or file.parent == package / "terms":
            break
        frame = frame.tb_next
    return frame


class NonFiniteError(TermError):
    """A loss or gradient is nan or infinite.

    ``datum`` and ``token`` locate the first such entry of the gradient, or else of the logprobs
    (``token`` is a tuple of indices into that datum's [T] or [T,K] logprobs); both are None where
    only the loss is not finite, or a sum.
    """

    def __init__(
        self,
        message: str,
        *,
        term: str,
        datum: int | None = None,
        token: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(message, term=term)
        self.datum = datum
        self.token = token


class ChangedLogprobsError(TermError):
    """A term changed the logprobs in place. Never skipped: that is a bug, not a step's bad luck."""


class StaleGraphError(TermError):
    """A loss depends on the logprobs of another step, through something that was kept."""


class TermTimeoutError(TermError):
    """A term outlived the ``timeout`` it was given."""

    kind: ClassVar[str] = "deadline"


class CancelledError(CustomLossError):
    """The caller withdrew the request before it was answered."""

    kind: ClassVar[str] = "cancelled"


class StoppedError(CustomLossError):
    """A training client with ``on_failure="stop"`` refused a call: a step before it failed.

    The failure is its ``__cause__``. ``acknowledge_failure()`` of the client lets later calls
    through.
    """


class ProtocolError(CustomLossError):
    """What came over the wire is not a frame, not MessagePack, or not a message of the protocol.

    ``path`` points into the message, for example ``regularizers[1].weight``.
    """

    kind: ClassVar[str] = "protocol"

    def __init__(self, message: str, *, path: str | None = None) -> None:
        super().__init__(message)
        self.path = path
