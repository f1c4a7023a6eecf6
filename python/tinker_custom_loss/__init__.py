"""Structured regularizers for Tinker custom losses.

A base loss and many named, weighted terms, composed into one loss, one gradient and a record of
what each term did. See :class:`Composer` and :class:`Regularizer`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import (
        RegularizedServiceClient,
        RegularizedTrainingClient,
        StepOutput,
        forward_backward_custom,
        forward_backward_custom_async,
        linearize,
        regularized,
        with_regularizers,
    )
    from .composer import Composer
    from .composition import ComposedLoss, Composition
    from .errors import (
        CancelledError,
        ChangedLogprobsError,
        CustomLossError,
        NonFiniteError,
        ProtocolError,
        RequestError,
        StaleGraphError,
        StoppedError,
        TermError,
        TermTimeoutError,
    )
    from .insight import Recorder, diagnose, live, replay, watch
    from .record import BaseLossRecord, RegularizerRecord, StepRecord, flatten, merge
    from .regularizer import LossFn, Regularizer
    from .tensors.batch import TensorBatch
    from .terms.term import term
    from .totals import add_totals

__version__ = "0.1.0"

__all__ = [
    "BaseLossRecord",
    "CancelledError",
    "ChangedLogprobsError",
    "ComposedLoss",
    "Composer",
    "Composition",
    "CustomLossError",
    "LossFn",
    "NonFiniteError",
    "ProtocolError",
    "Recorder",
    "RegularizedServiceClient",
    "RegularizedTrainingClient",
    "Regularizer",
    "RegularizerRecord",
    "RequestError",
    "StaleGraphError",
    "StepOutput",
    "StepRecord",
    "StoppedError",
    "TensorBatch",
    "TermError",
    "TermTimeoutError",
    "add_totals",
    "diagnose",
    "flatten",
    "forward_backward_custom",
    "forward_backward_custom_async",
    "linearize",
    "live",
    "merge",
    "regularized",
    "replay",
    "term",
    "watch",
    "with_regularizers",
]

# Importing torch takes a second, which the report of a run does not need; the tinker client half
# of one, which a worker of the port does not have; and rich a tenth.
_ROOMS = {
    "client": (
        "RegularizedServiceClient",
        "RegularizedTrainingClient",
        "StepOutput",
        "forward_backward_custom",
        "forward_backward_custom_async",
        "linearize",
        "regularized",
        "with_regularizers",
    ),
    "composer": ("Composer",),
    "composition": ("ComposedLoss", "Composition"),
    "errors": (
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
    ),
    "insight": ("Recorder", "diagnose", "live", "replay", "watch"),
    "record": ("BaseLossRecord", "RegularizerRecord", "StepRecord", "flatten", "merge"),
    "regularizer": ("LossFn", "Regularizer"),
    "tensors.batch": ("TensorBatch",),
    "terms.term": ("term",),
    "totals": ("add_totals",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_ROOM_OF[name]}", __name__), name)
