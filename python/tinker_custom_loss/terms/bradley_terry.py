"""The logistic model of preference, with the sequence's log-probability as its score."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from .groups import Groups
from .ranges import Positive
from .term import term

__all__ = ["bradley_terry"]


@term(scope="group")
def bradley_terry(
    logprob: Tensor, *, groups: Groups, beta: Positive = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Bradley-Terry: ``-log σ(β(S_chosen - S_rejected))`` with the score ``S = Σ_t ℓ``.

    One value for every pair of a chosen and a rejected datum of a group. Give weight to a single
    token, such as the verdict of a judge, and its logprob is the score.

    Metrics: ``margin`` is ``β(S_chosen - S_rejected)``, ``accuracy`` 1 where it is above 0; reduced
    like the values. Unit: nats. A token at ℓ = -inf makes the value infinite if its datum is
    chosen, else 0.
    Bradley & Terry, "Rank Analysis of Incomplete Block Designs" (1952).
    """
    score = groups.sequences.sum(logprob)
    chosen, rejected = groups.pairs
    x = beta * (score[chosen] - score[rejected])
    return -logsigmoid(x), {"margin": x, "accuracy": (x > 0).to(x.dtype)}
