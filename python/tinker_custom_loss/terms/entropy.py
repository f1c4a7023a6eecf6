"""An entropy bonus that trains, from the logprobs of sampled tokens or of the top K."""

from __future__ import annotations

from torch import Tensor

from .pieces import is_sampled, p_times, straight_through
from .term import term

__all__ = ["entropy"]


@term(scope="token", alternatives=True)
def entropy(logprob: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative entropy ``-H``: with a positive weight, training keeps the entropy up.

    For sampled tokens ([T], and [T,1]) ``-H = E[ℓ]`` is estimated by ``ℓ``. The gradient of that
    estimate has mean zero (``E[∇ℓ] = 0``) and would train nothing; what is differentiated is the
    surrogate ``½ℓ²``, whose gradient ``ℓ·∇ℓ`` is an unbiased estimate of ``-∇H`` on tokens that
    the model itself sampled (the score function estimator, Williams 1992, applied to ``-E[ℓ]``).
    Off-policy it is biased by the ratio ρ, which is missing.

    For [T,K] the part of the entropy that the K alternatives hold is exact: ``Σ_k p·ℓ`` with
    ``p = exp(ℓ)``, one value a position, and so is its gradient ``p·(ℓ+1)``.

    The metric ``entropy`` is +H. Unit: nats. At ℓ = 0 all is 0; at ℓ = -inf an alternative adds
    0, and a sampled token has the value -inf.
    """
    if is_sampled(logprob):
        ell = logprob.reshape(-1)
        values = straight_through(ell, lambda: ell.square() / 2)
    else:
        values = p_times(logprob, logprob).sum(-1)
    return values, {"entropy": -values}


@entropy.derivative
def _(logprob: Tensor) -> Tensor:
    return logprob if is_sampled(logprob) else p_times(logprob, logprob + 1)
