"""Likelihood that leaves some of its mass to the other alternatives."""

from __future__ import annotations

import torch
from torch import Tensor

from .pieces import at_label, check_alternatives
from .ranges import Fraction, Index
from .term import term

__all__ = ["label_smoothing"]


@term(scope="token", alternatives=True)
def label_smoothing(logprob: Tensor, *, epsilon: Fraction = 0.1, label: Index = 0) -> Tensor:
    """Label smoothing over the K alternatives of [T,K]: ``-(1-ε)·ℓ_label - ε/K·Σ_k ℓ_k``.

    One value a position. ``label`` is the column of the target; the others share ε with it.

    Unit: nats. At ℓ = 0 an alternative adds 0; where one with a share is -inf the value is +inf;
    the gradient is constant.
    Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (2016).
    """
    weights = _weights(logprob, epsilon, label)
    return -(weights * torch.where(weights != 0, logprob, 0.0)).sum(-1)


@label_smoothing.derivative
def _(logprob: Tensor, *, epsilon: Fraction = 0.1, label: Index = 0) -> Tensor:
    return -_weights(logprob, epsilon, label).expand_as(logprob)


def _weights(logprob: Tensor, epsilon: float, label: int) -> Tensor:
    check_alternatives("label_smoothing", logprob, label)
    return epsilon / logprob.shape[1] + (1 - epsilon) * at_label(logprob, label)
