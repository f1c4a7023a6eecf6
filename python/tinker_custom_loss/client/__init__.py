"""The tinker SDK: the wrapped client, and what is made of parts of it."""

from .failures import OnFailure
from .function import forward_backward_custom, forward_backward_custom_async
from .linear import linearize
from .service import RegularizedServiceClient, regularized
from .step import StepOutput
from .training_client import RegularizedTrainingClient, with_regularizers

__all__ = [
    "OnFailure",
    "RegularizedServiceClient",
    "RegularizedTrainingClient",
    "StepOutput",
    "forward_backward_custom",
    "forward_backward_custom_async",
    "linearize",
    "regularized",
    "with_regularizers",
]
