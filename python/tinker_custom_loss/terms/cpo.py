"""Preference and likelihood, without a reference."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from .groups import Groups
from .ranges import NonNegative, Positive
from .term import term

__all__ = ["cpo"]


@term(scope="group")
def cpo(
    logprob: Tensor, *, groups: Groups, beta: Positive = 0.1, alpha: NonNegative = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Contrastive preference optimization: ``-log σ(β(S_chosen - S_rejected)) - α·s_chosen``.

    ``S = Σ_t ℓ`` and ``s = mean_t ℓ``. One value for every pair of a chosen and a rejected datum of
    a group; no reference is needed.

    Args:
        alpha: the weight of the chosen answer's likelihood.

    Metrics: ``margin`` is ``β(S_chosen - S_rejected)``, ``accuracy`` 1 where it is above 0; reduced
    like the values. Unit: nats. A chosen datum with a token at ℓ = -inf makes the value infinite.
    Xu et al., "Contrastive Preference Optimization" (2024).
    """
    total = groups.sequences.sum(logprob)
    chosen, rejected = groups.pairs
    x = beta * (total[chosen] - total[rejected])
    values = -logsigmoid(x) - alpha * groups.sequences.mean(logprob)[chosen]
    return values, {"margin": x, "accuracy": (x > 0).to(x.dtype)}
