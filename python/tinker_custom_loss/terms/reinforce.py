"""The plain policy gradient."""

from __future__ import annotations

from torch import Tensor

from .pieces import advantage_times
from .term import term

__all__ = ["reinforce"]


@term(scope="token", inputs=("advantages",), importance=True)
def reinforce(logprob: Tensor, advantage: Tensor) -> Tensor:
    """Policy gradient: ``-A·ℓ``, with the gradient ``-A·∇ℓ``: unbiased on-policy only.

    Args:
        advantage: key of A.

    Unit: that of A. Where A = 0 all is 0; at ℓ = -inf the value is infinite and the gradient -A.
    Williams, "Simple Statistical Gradient-Following Algorithms" (1992).
    """
    return -advantage_times(advantage, logprob)


@reinforce.derivative
def _(logprob: Tensor, advantage: Tensor) -> Tensor:
    return -advantage
