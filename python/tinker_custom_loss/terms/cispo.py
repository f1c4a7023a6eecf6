"""REINFORCE whose weight is the clipped ratio, and which gives every token a gradient."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from .pieces import advantage_times
from .ranges import Positive, Range
from .term import term

__all__ = ["cispo"]


@term(scope="token", inputs=("logprobs", "advantages"), importance=True)
def cispo(
    logprob: Tensor,
    sampler: Tensor,
    advantage: Tensor,
    *,
    low: Annotated[float, Range(at_least=0, below="high")] = 0.0,
    high: Positive = 4.0,
) -> Tensor:
    """Clipped importance-sampled REINFORCE: ``-sg(clip(ρ, low, high))·A·ℓ``, ``ρ = exp(ℓ-μ)``.

    sg stops the gradient, which is therefore ``-clip(ρ)·A·∇ℓ``: a token beyond the clip keeps a
    gradient, of bounded size. The defaults are those of Tinker's ``cispo``, to which it is equal.

    Args:
        sampler: key of μ, the sampler's logprobs.
        advantage: key of A.

    Unit: that of A. Where A = 0, or the clipped ρ is 0 as at ℓ = -inf with ``low = 0``, value and
    gradient are 0.
    MiniMax, "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention" (2025).
    """
    weight = _weight(logprob, sampler, advantage, low, high)
    return -weight * torch.where(weight != 0, logprob, 0.0)


@cispo.derivative
def _(
    logprob: Tensor,
    sampler: Tensor,
    advantage: Tensor,
    *,
    low: Annotated[float, Range(at_least=0, below="high")] = 0.0,
    high: Positive = 4.0,
) -> Tensor:
    return -_weight(logprob, sampler, advantage, low, high)


def _weight(logprob: Tensor, sampler: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    return advantage_times(advantage, (logprob.detach() - sampler).exp().clamp(low, high))
