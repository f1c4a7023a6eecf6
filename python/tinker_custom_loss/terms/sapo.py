"""A policy gradient that fades out where PPO would cut off."""

from __future__ import annotations

import torch
from torch import Tensor

from .pieces import advantage_times
from .ranges import Positive
from .term import term

__all__ = ["sapo"]


@term(scope="token", inputs=("logprobs", "advantages"), importance=True)
def sapo(
    logprob: Tensor,
    sampler: Tensor,
    advantage: Tensor,
    *,
    tau_positive: Positive = 1.0,
    tau_negative: Positive = 1.05,
) -> Tensor:
    """Soft adaptive policy gradient: ``-(4/τ)·σ(τ(ρ-1))·A``, ``ρ = exp(ℓ-μ)``.

    τ is ``tau_positive`` where A > 0, else ``tau_negative``. The gradient
    ``-4·σ(1-σ)·ρA·∇ℓ`` is that of ``importance_sampling`` at ρ = 1, and fades on both sides.

    Args:
        sampler: key of μ, the sampler's logprobs.
        advantage: key of A.

    Unit: that of A. At ℓ = -inf, and where ρ is very large, the gradient is 0.
    Gao et al., "Soft Adaptive Policy Optimization" (2025).
    """
    tau = _tau(advantage, tau_positive, tau_negative)
    gate = torch.sigmoid(tau * ((logprob - sampler).exp() - 1))
    return -advantage_times(advantage, gate * (4 / tau))


@sapo.derivative
def _(
    logprob: Tensor,
    sampler: Tensor,
    advantage: Tensor,
    *,
    tau_positive: Positive = 1.0,
    tau_negative: Positive = 1.05,
) -> Tensor:
    rho = (logprob - sampler).exp()
    gate = torch.sigmoid(_tau(advantage, tau_positive, tau_negative) * (rho - 1))
    slope = gate * (1 - gate)
    return -4 * advantage_times(advantage, slope * torch.where(slope == 0, 0.0, rho))


def _tau(advantage: Tensor, positive: float, negative: float) -> Tensor:
    return torch.where(
        advantage > 0, advantage.new_tensor(positive), advantage.new_tensor(negative)
    )
