"""Structured regularizers for Tinker custom losses.

A base loss and many named, weighted terms, composed into one loss, one gradient and a record of
what each term did. See :class:`Composer` and :class:`Regularizer`.
"""

from typing import TYPE_CHECKING, Any

from .batch import TensorBatch
from .composer import Composer, Composition
from .errors import (
    CancelledError,
    ChangedLogprobsError,
    CustomLossError,
    NonFiniteError,
    ProtocolError,
    RequestError,
    TermError,
    TermTimeoutError,
)
from .regularizer import Regularizer
from .telemetry import flatten

if TYPE_CHECKING:
    from .sdk import (
        RegularizedTrainingClient,
        forward_backward_custom,
        forward_backward_custom_async,
        linearize,
        with_regularizers,
    )

__version__ = "0.1.0"

__all__ = [
    "CancelledError",
    "ChangedLogprobsError",
    "Composer",
    "Composition",
    "CustomLossError",
    "NonFiniteError",
    "ProtocolError",
    "RegularizedTrainingClient",
    "Regularizer",
    "RequestError",
    "TensorBatch",
    "TermError",
    "TermTimeoutError",
    "flatten",
    "forward_backward_custom",
    "forward_backward_custom_async",
    "linearize",
    "with_regularizers",
]

# Importing the tinker client takes half a second that a worker of the port does not have.
_SDK = frozenset(
    {
        "RegularizedTrainingClient",
        "forward_backward_custom",
        "forward_backward_custom_async",
        "linearize",
        "with_regularizers",
    }
)


def __getattr__(name: str) -> Any:
    if name in _SDK:
        from . import sdk

        return getattr(sdk, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
