"""Structured regularizers for Tinker custom losses.

A base loss and many named, weighted terms, composed into one loss, one gradient and a record of
what each term did. See :class:`Composer` and :class:`Regularizer`.
"""

from typing import TYPE_CHECKING, Any

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
from .record import BaseLossRecord, RegularizerRecord, StepRecord, flatten, merge
from .regularizer import LossFn, Regularizer
from .tensors.batch import TensorBatch
from .totals import add_totals

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
    from .insight import Recorder, diagnose, replay, watch
    from .insight.live import live
    from .terms.term import term

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

# Importing the tinker client takes half a second that a worker of the port does not have.
_SDK = frozenset(
    {
        "RegularizedServiceClient",
        "RegularizedTrainingClient",
        "StepOutput",
        "forward_backward_custom",
        "forward_backward_custom_async",
        "linearize",
        "regularized",
        "with_regularizers",
    }
)
# And rich a tenth of one.
_INSIGHT = frozenset({"Recorder", "diagnose", "live", "replay", "watch"})


def __getattr__(name: str) -> Any:
    if name in _SDK:
        from . import client

        return getattr(client, name)
    if name in _INSIGHT:
        from . import insight

        return getattr(insight, name)
    if name == "term":  # the catalogue comes along, which not everyone needs
        from .terms.term import term

        return term
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
