"""Likelihood that leaves alone what the model already knows."""

from __future__ import annotations

import torch
from torch import Tensor

from .ranges import NonNegative
from .term import term

__all__ = ["focal"]


@term(scope="token")
def focal(logprob: Tensor, *, gamma: NonNegative = 2.0) -> Tensor:
    """Focal loss: ``-(1-e^ℓ)^γ·ℓ``. ``gamma = 0`` is ``nll``.

    Unit: nats. At ℓ = 0 value and gradient are 0 (the gradient -1 if γ = 0); at ℓ = -inf the value
    is +inf and the gradient -1.
    Lin et al., "Focal Loss for Dense Object Detection" (2017).
    """
    if gamma == 0:
        return -logprob
    inner = (logprob < 0) & (logprob > -torch.inf)  # at both ends autograd would meet 0·inf
    safe = torch.where(inner, logprob, -1.0)
    return torch.where(inner, -(-torch.expm1(safe)).pow(gamma) * safe, _at_ends(logprob))


@focal.derivative
def _(logprob: Tensor, *, gamma: NonNegative = 2.0) -> Tensor:
    rest = -torch.expm1(logprob)  # 1 - p
    # p·ℓ/(1-p), which is -1 at ℓ = 0 and 0 at ℓ = -inf.
    inner = (rest > 0) & (logprob != -torch.inf)
    safe = torch.where(inner, logprob, -1.0)
    ratio = torch.where(inner, safe.exp() * safe / -torch.expm1(safe), -(1 - rest))
    return rest.pow(gamma) * (gamma * ratio - 1)


def _at_ends(logprob: Tensor) -> Tensor:
    return torch.where(logprob == -torch.inf, -logprob, 0.0)
