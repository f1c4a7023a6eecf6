"""Likelihood of the chosen answer, and its odds against the rejected one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .groups import Groups
from .pieces import log1mexp
from .ranges import NonNegative
from .term import term

__all__ = ["orpo"]


@term(scope="group")
def orpo(
    logprob: Tensor, *, groups: Groups, beta: NonNegative = 0.1
) -> tuple[Tensor, dict[str, Tensor]]:
    """Odds ratio preference optimization: ``-s_chosen - β·log σ(o_chosen - o_rejected)``.

    ``s = mean_t ℓ``, and ``o = s - log(1-e^s)`` are the log odds. One value for every pair of a
    chosen and a rejected datum of a group; no reference is needed.

    Args:
        beta: the weight of the odds ratio (λ in the paper).

    Metrics: ``margin`` is ``o_chosen - o_rejected``, ``accuracy`` 1 where it is above 0; reduced
    like the values. Unit: nats. Where s = 0, an answer that is certain, its odds are infinite.
    Hong et al., "ORPO: Monolithic Preference Optimization without Reference Model" (2024).
    """
    score = groups.sequences.mean(logprob)
    score = score.masked_fill(groups.sequences.lengths == 0, -math.log(2))  # even odds
    chosen, rejected = groups.pairs
    c, r = score[chosen], score[rejected]
    # σ(o_c - o_r) = p_c·(1-p_r) / (p_c·(1-p_r) + p_r·(1-p_c)), in which no odds are infinite
    top = torch.maximum(c, r).detach()
    less = (c - top).exp() * torch.expm1(r) + (r - top).exp() * torch.expm1(c)
    values = -c - beta * (c + log1mexp(r) - top - torch.log(-less))
    margin = (c - log1mexp(c)) - (r - log1mexp(r))
    return values, {"margin": margin, "accuracy": (c > r).to(c.dtype)}
