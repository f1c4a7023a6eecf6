"""Absolute logprobs."""

from __future__ import annotations

from torch import Tensor

from .term import term

__all__ = ["l1"]


@term(scope="token")
def l1(logprob: Tensor) -> Tensor:
    """Absolute logprobs: ``|ℓ|``, which is ``-ℓ``: it pulls every token up alike.

    Unit: nats. At ℓ = 0 value and gradient are 0; at ℓ = -inf the value is +inf and the gradient
    -1.
    """
    return logprob.abs()


@l1.derivative
def _(logprob: Tensor) -> Tensor:
    return logprob.sign()
