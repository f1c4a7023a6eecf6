"""Preference without a reference, by the mean logprob."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from .groups import Groups
from .ranges import NonNegative, Positive
from .term import term

__all__ = ["simpo"]


@term(scope="group")
def simpo(
    logprob: Tensor, *, groups: Groups, beta: Positive = 2.0, gamma: NonNegative = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Simple preference optimization: ``-log σ(β·(s_chosen - s_rejected) - γ)``, ``s = mean_t ℓ``.

    One value for every pair of a chosen and a rejected datum of a group; no reference is needed.

    Args:
        gamma: how far ahead the chosen one should be.

    Metrics: ``margin`` is ``β·(s_chosen - s_rejected)``, ``accuracy`` 1 where it is above 0;
    reduced like the values. Unit: nats. A token at ℓ = -inf makes the value infinite if its datum
    is chosen, else 0.
    Meng et al., "SimPO: Simple Preference Optimization with a Reference-Free Reward" (2024).
    """
    score = groups.sequences.mean(logprob)
    chosen, rejected = groups.pairs
    x = beta * (score[chosen] - score[rejected])
    return -logsigmoid(x - gamma), {"margin": x, "accuracy": (x > 0).to(x.dtype)}
