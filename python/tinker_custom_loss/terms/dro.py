"""Direct reward optimization: a policy gradient that is tethered instead of clipped."""

from __future__ import annotations

from torch import Tensor

from .pieces import advantage_times
from .ranges import NonNegative
from .term import term

__all__ = ["dro"]


@term(scope="token", inputs=("logprobs", "advantages"), importance=True)
def dro(logprob: Tensor, sampler: Tensor, advantage: Tensor, *, beta: NonNegative = 0.05) -> Tensor:
    """Policy gradient with a quadratic tether to the sampler: ``-(ℓA - ½β(ℓ-μ)²)``.

    Its gradient is ``-(A - β(ℓ-μ))·∇ℓ``. The default of ``beta`` is that of Tinker's ``dro``, to
    which it is equal with ``weights=None``: the server's has no mask, and tethers the prompt too.

    Args:
        sampler: key of μ, the sampler's logprobs.
        advantage: key of A.
        beta: how strong the tether is.

    Unit: that of A. At ℓ = -inf the value is +inf and the gradient -inf, unless ``beta = 0``.
    Richemond et al., "Offline Regularised Reinforcement Learning for LLMs Alignment" (2024).
    """
    if beta == 0:
        return -advantage_times(advantage, logprob)
    d = logprob - sampler
    return d * (beta / 2 * d - advantage) - advantage * sampler  # +inf at ℓ = -inf, not inf - inf


@dro.derivative
def _(logprob: Tensor, sampler: Tensor, advantage: Tensor, *, beta: NonNegative = 0.05) -> Tensor:
    return -advantage if beta == 0 else beta * (logprob - sampler) - advantage
