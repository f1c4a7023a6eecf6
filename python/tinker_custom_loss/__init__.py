"""Structured regularizers for Tinker custom losses.

A base loss and many named, weighted terms, composed into one loss, one gradient and a record of
what each term did. See :class:`Composer` and :class:`Regularizer`.
"""

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

__version__ = "0.1.0"

__all__ = [
    "CancelledError",
    "ChangedLogprobsError",
    "Composer",
    "Composition",
    "CustomLossError",
    "NonFiniteError",
    "ProtocolError",
    "Regularizer",
    "RequestError",
    "TensorBatch",
    "TermError",
    "TermTimeoutError",
    "flatten",
]
