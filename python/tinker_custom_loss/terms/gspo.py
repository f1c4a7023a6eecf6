"""A clipped policy gradient whose ratio is the whole sequence's."""

from __future__ import annotations

import torch
from torch import Tensor

from .pieces import advantage_times
from .ranges import Fraction, NonNegative
from .reduction import Sequences
from .term import term

__all__ = ["gspo"]


@term(scope="sequence", inputs=("logprobs", "advantages"), importance=True)
def gspo(
    logprob: Tensor,
    sampler: Tensor,
    advantage: Tensor,
    *,
    sequences: Sequences,
    clip_low: Fraction = 3e-4,
    clip_high: NonNegative = 4e-4,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Group sequence policy optimization: ``-Σ_t min(sA_t, clip(s, 1-clip_low, 1+clip_high)·A_t)``.

    ``s = exp(mean_t(ℓ-μ))`` over the tokens of the sequence with a weight, in place of the token's
    own ratio. The gradient of a token is ``-s/Σw·Σ_t' w·A_t'`` over those that are not clipped. The
    authors' objective is ``reduction="sequence_mean_token_mean"``.

    Args:
        sampler: key of μ, the sampler's logprobs.
        advantage: key of A.

    The metric ``clipped`` counts the tokens that the clip left without gradient. Unit: that of A.
    A token at ℓ = -inf makes s, and the sequence's gradient, 0.
    Zheng et al., "Group Sequence Policy Optimization" (2025).
    """
    s = sequences.spread(sequences.mean(logprob - sampler).exp())
    clipped = _clipped(s.detach(), advantage, clip_low, clip_high)
    objective = torch.minimum(
        advantage_times(advantage, s),
        advantage_times(advantage, s.clamp(1 - clip_low, 1 + clip_high)),
    )
    return -sequences.sum(objective), {"clipped": sequences.sum(clipped.to(s.dtype))}


@gspo.derivative
def _(
    logprob: Tensor,
    sampler: Tensor,
    advantage: Tensor,
    *,
    sequences: Sequences,
    clip_low: Fraction = 3e-4,
    clip_high: NonNegative = 4e-4,
) -> Tensor:
    s = sequences.mean(logprob - sampler).exp()
    clipped = _clipped(sequences.spread(s), advantage, clip_low, clip_high)
    pull = s * sequences.sum(torch.where(clipped, 0.0, advantage))
    return -sequences.shares * sequences.spread(pull)


def _clipped(s: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    return ((advantage > 0) & (s > 1 + clip_high)) | ((advantage < 0) & (s < 1 - clip_low))
