"""Preference from single answers that were liked or not."""

from __future__ import annotations

import torch
from torch import Tensor

from .groups import Groups
from .ranges import NonNegative, Positive
from .term import term

__all__ = ["kto"]


@term(scope="group", inputs=("reference_logprobs",))
def kto(
    logprob: Tensor,
    reference: Tensor,
    *,
    groups: Groups,
    beta: Positive = 0.1,
    desirable: NonNegative = 1.0,
    undesirable: NonNegative = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Kahneman-Tversky optimization: ``λ·(1 - σ(±β(Δ - z)))``, + for a chosen datum, - for another.

    ``Δ = Σ_t (ℓ-r)``; z, the reference point, is ``max(0, mean Δ)`` over the datum's group, without
    a gradient. (The authors estimate it from mismatched prompts and answers; the datums of a group
    stand in for them here.) One value a datum; a group needs no particular mixture of both kinds.

    Args:
        reference: key of r, the reference logprobs.
        desirable: λ of chosen datums.
        undesirable: λ of the others.

    The metric ``reward`` is ``βΔ``, reduced like the values. Unit: none, between 0 and λ. A token
    at ℓ = -inf makes its datum's value λ or 0, and its gradient 0.
    Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization" (2024).
    """
    gain = groups.sequences.sum(logprob - reference)
    point = groups.mean(gain.detach()).clamp(min=0)
    sign = torch.where(groups.chosen, gain.new_tensor(1.0), gain.new_tensor(-1.0))
    weight = torch.where(groups.chosen, gain.new_tensor(desirable), gain.new_tensor(undesirable))
    return weight * torch.sigmoid(-sign * beta * (gain - point)), {"reward": beta * gain}
