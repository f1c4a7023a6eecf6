"""A hinge: the target must be ahead of its best rival."""

from __future__ import annotations

import torch
from torch import Tensor

from .pieces import at_label, check_alternatives
from .ranges import Index, NonNegative
from .term import term

__all__ = ["margin"]


@term(scope="token", alternatives=True)
def margin(logprob: Tensor, *, margin: NonNegative = 1.0, label: Index = 0) -> Tensor:
    """Margin over the K alternatives of [T,K]: ``max(0, m - (ℓ_label - max_{k≠label} ℓ_k))``.

    One value a position. ``label`` is the column of the target. Where the margin is kept, or there
    is no rival (K = 1, or all rivals at -inf), value and gradient are 0; else the gradient is -1
    for the target and +1 for its best rival, the first of equals.

    Unit: nats. At ℓ_label = -inf the value is +inf.
    Crammer & Singer, "On the Algorithmic Implementation of Multiclass Kernel-based Vector
    Machines" (2001).
    """
    return _shortfall(logprob, margin, label)[0].relu()


@margin.derivative
def _(logprob: Tensor, *, margin: NonNegative = 1.0, label: Index = 0) -> Tensor:
    shortfall, rival = _shortfall(logprob, margin, label)
    short = (shortfall > 0).to(logprob.dtype)[:, None]
    return short * (
        torch.zeros_like(logprob).scatter(1, rival[:, None], 1) - at_label(logprob, label)
    )


def _shortfall(logprob: Tensor, margin: float, label: int) -> tuple[Tensor, Tensor]:
    check_alternatives("margin", logprob, label)
    others = logprob.masked_fill(at_label(logprob, label) == 1, -torch.inf)
    best, rival = others.max(dim=1)
    there = best != -torch.inf
    return torch.where(there, margin - logprob[:, label] + best, 0.0), rival
