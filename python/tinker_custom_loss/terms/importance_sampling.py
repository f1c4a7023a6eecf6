"""The policy gradient, corrected for the sampler by the ratio of the two."""

from __future__ import annotations

from torch import Tensor

from .pieces import advantage_times
from .term import term

__all__ = ["importance_sampling"]


@term(scope="token", inputs=("logprobs", "advantages"), importance=True)
def importance_sampling(logprob: Tensor, sampler: Tensor, advantage: Tensor) -> Tensor:
    """Importance-weighted policy gradient: ``-ρA`` with ``ρ = exp(ℓ-μ)``, Tinker's own.

    Its gradient ``-ρA·∇ℓ`` is unbiased off-policy, token by token, and unbounded in ρ.

    Args:
        sampler: key of μ, the sampler's logprobs.
        advantage: key of A.

    Unit: that of A. Where A = 0 all is 0; at ℓ = -inf value and gradient are 0; where ρ overflows
    they are infinite.
    """
    return -advantage_times(advantage, (logprob - sampler).exp())


@importance_sampling.derivative
def _(logprob: Tensor, sampler: Tensor, advantage: Tensor) -> Tensor:
    return -advantage_times(advantage, (logprob - sampler).exp())
