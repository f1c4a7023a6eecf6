"""A mixture of absolute and squared logprobs."""

from __future__ import annotations

from torch import Tensor

from .term import term

__all__ = ["elastic_net"]


@term(scope="token")
def elastic_net(logprob: Tensor, *, l1_ratio: float = 0.5) -> Tensor:
    """Absolute and squared logprobs mixed: ``α·|ℓ| + (1-α)·ℓ²`` with ``α = l1_ratio``.

    Unit: that of ℓ, loosely. At ℓ = 0 value and gradient are 0; at ℓ = -inf the value is +inf.
    Zou & Hastie, "Regularization and variable selection via the elastic net" (2005).
    """
    _check(l1_ratio)
    if l1_ratio == 1:
        return logprob.abs()
    return l1_ratio * logprob.abs() + (1 - l1_ratio) * logprob.square()


@elastic_net.derivative
def _(logprob: Tensor, *, l1_ratio: float = 0.5) -> Tensor:
    _check(l1_ratio)
    if l1_ratio == 1:
        return logprob.sign()
    return l1_ratio * logprob.sign() + 2 * (1 - l1_ratio) * logprob


def _check(l1_ratio: float) -> None:
    if not 0 <= l1_ratio <= 1:
        raise ValueError(f"l1_ratio must be between 0 and 1, got {l1_ratio!r}")
