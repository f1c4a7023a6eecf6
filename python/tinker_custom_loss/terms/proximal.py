"""A quadratic tether to the sampler."""

from __future__ import annotations

from torch import Tensor

from .term import term

__all__ = ["proximal"]


@term(scope="token", inputs=("logprobs",))
def proximal(logprob: Tensor, sampler: Tensor) -> Tensor:
    """Squared distance to the sampler: ``½(ℓ-μ)²``, with the gradient ``ℓ-μ``.

    It is the trust region of ``dro``, and k2 with the sampler as reference. On the sampler's own
    tokens its gradient is, in expectation, that of ``KL(model ‖ sampler)`` where the two agree.

    Args:
        sampler: key of μ, the sampler's logprobs.

    Unit: nats². At ℓ = -inf the value is +inf and the gradient -inf.
    """
    return (logprob - sampler).square() / 2


@proximal.derivative
def _(logprob: Tensor, sampler: Tensor) -> Tensor:
    return logprob - sampler
