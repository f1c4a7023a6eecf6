"""A mixture of absolute and squared logprobs."""

from __future__ import annotations

from torch import Tensor

from .ranges import Fraction
from .term import term

__all__ = ["elastic_net"]


@term(scope="token")
def elastic_net(logprob: Tensor, *, l1_ratio: Fraction = 0.5) -> Tensor:
    """Absolute and squared logprobs mixed: ``α·|ℓ| + (1-α)·ℓ²`` with ``α = l1_ratio``.

    Unit: that of ℓ, loosely. At ℓ = 0 value and gradient are 0; at ℓ = -inf the value is +inf.
    Zou & Hastie, "Regularization and variable selection via the elastic net" (2005).
    """
    if l1_ratio == 1:
        return logprob.abs()
    return l1_ratio * logprob.abs() + (1 - l1_ratio) * logprob.square()


@elastic_net.derivative
def _(logprob: Tensor, *, l1_ratio: Fraction = 0.5) -> Tensor:
    if l1_ratio == 1:
        return logprob.sign()
    return l1_ratio * logprob.sign() + 2 * (1 - l1_ratio) * logprob
