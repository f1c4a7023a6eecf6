"""Proximal policy optimization: the ratio earns nothing beyond its clip."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from .pieces import advantage_times
from .ranges import Fraction, NonNegative, Range
from .term import term

__all__ = ["ppo"]


@term(scope="token", inputs=("logprobs", "advantages"), importance=True)
def ppo(
    logprob: Tensor,
    sampler: Tensor,
    advantage: Tensor,
    *,
    clip_low: Fraction = 0.2,
    clip_high: NonNegative = 0.2,
    dual_clip: Annotated[float | None, Range(above=1)] = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy gradient: ``-min(ρA, clip(ρ, 1-clip_low, 1+clip_high)·A)``, ``ρ = exp(ℓ-μ)``.

    The gradient is ``-ρA·∇ℓ``, and 0 where the clip took the minimum: where ``A > 0`` and
    ``ρ > 1+clip_high``, or ``A < 0`` and ``ρ < 1-clip_low``. The defaults are those of Tinker's
    ``ppo`` (thresholds 0.8 and 1.2), to which it is equal.

    With ``dual_clip = c``, where ``A < 0`` the loss is at most ``-cA`` (Ye et al. 2020), so that a
    large ρ does not make a bad token count without bound.

    Args:
        sampler: key of μ, the sampler's logprobs.
        advantage: key of A.
        dual_clip: a number above 1, or None.

    The metric ``clipped`` counts the tokens that a clip left without gradient. Unit: that of A.
    Where A = 0 all is 0; at ℓ = -inf the value is ``-min(0, (1-clip_low)·A)`` and the gradient 0.
    Schulman et al., "Proximal Policy Optimization Algorithms" (2017).
    """
    rho = (logprob - sampler).exp()
    objective = torch.minimum(
        advantage_times(advantage, rho),
        advantage_times(advantage, rho.clamp(1 - clip_low, 1 + clip_high)),
    )
    if dual_clip is not None:
        floor = torch.where(advantage < 0, dual_clip * advantage, -torch.inf)
        objective = torch.maximum(objective, floor)
    clipped = _clipped(rho.detach(), advantage, clip_low, clip_high, dual_clip)
    return -objective, {"clipped": clipped.to(logprob.dtype)}


@ppo.derivative
def _(
    logprob: Tensor,
    sampler: Tensor,
    advantage: Tensor,
    *,
    clip_low: Fraction = 0.2,
    clip_high: NonNegative = 0.2,
    dual_clip: Annotated[float | None, Range(above=1)] = None,
) -> Tensor:
    rho = (logprob - sampler).exp()
    clipped = _clipped(rho, advantage, clip_low, clip_high, dual_clip)
    return torch.where(clipped, 0.0, -advantage_times(advantage, rho))


def _clipped(
    rho: Tensor, advantage: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> Tensor:
    clipped = ((advantage > 0) & (rho > 1 + clip_high)) | ((advantage < 0) & (rho < 1 - clip_low))
    return clipped if dual_clip is None else clipped | ((advantage < 0) & (rho > dual_clip))
