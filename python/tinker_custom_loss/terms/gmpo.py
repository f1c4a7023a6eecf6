"""A clipped policy gradient whose ratio is the geometric mean of the tokens' own."""

from __future__ import annotations

import torch
from torch import Tensor

from .ranges import NonNegative
from .reduction import Sequences
from .term import term

__all__ = ["gmpo"]


@term(scope="sequence", inputs=("logprobs", "advantages"), importance=True)
def gmpo(
    logprob: Tensor,
    sampler: Tensor,
    advantage: Tensor,
    *,
    sequences: Sequences,
    clip_low: NonNegative = 0.4,
    clip_high: NonNegative = 0.4,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Geometric-mean policy optimization: ``-g·Σ_t A_t``, ``g = exp(mean_t x_t)``.

    ``x_t`` is the token's log ratio ``ℓ-μ``, at most ``clip_high`` where ``A >= 0`` and at least
    ``-clip_low`` where ``A < 0``: the clips are in log space, token by token. The gradient of a
    token that is not clipped is ``-g/Σw·Σ_t' w·A_t'``. The authors' objective is
    ``reduction="sequence_mean_token_mean"``.

    Args:
        sampler: key of μ, the sampler's logprobs.
        advantage: key of A.

    The metric ``clipped`` counts the tokens that a clip left without gradient. Unit: that of A. A
    token at ℓ = -inf with A >= 0 makes g, and the sequence's gradient, 0.
    Zhao et al., "Geometric-Mean Policy Optimization" (2025).
    """
    x, clipped = _clip(logprob - sampler, advantage, clip_low, clip_high)
    value = -sequences.mean(x).exp() * sequences.sum(advantage)
    return value, {"clipped": sequences.sum(clipped.to(x.dtype))}


@gmpo.derivative
def _(
    logprob: Tensor,
    sampler: Tensor,
    advantage: Tensor,
    *,
    sequences: Sequences,
    clip_low: NonNegative = 0.4,
    clip_high: NonNegative = 0.4,
) -> Tensor:
    x, clipped = _clip(logprob - sampler, advantage, clip_low, clip_high)
    pull = sequences.mean(x).exp() * sequences.sum(advantage)
    return torch.where(clipped, 0.0, -sequences.shares * sequences.spread(pull))


def _clip(
    log_ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    good = advantage >= 0
    clipped = (good & (log_ratio > clip_high)) | (~good & (log_ratio < -clip_low))
    bound = torch.where(good, log_ratio.new_tensor(clip_high), log_ratio.new_tensor(-clip_low))
    return torch.where(clipped, bound, log_ratio), clipped
