"""Likelihood that leaves alone what the model finds unlikely."""

from __future__ import annotations

from torch import Tensor

from .pieces import p_times
from .term import term

__all__ = ["dft"]


@term(scope="token")
def dft(logprob: Tensor) -> Tensor:
    """Dynamic fine-tuning: ``-sg(e^ℓ)·ℓ``, with the gradient ``-e^ℓ·∇ℓ``.

    The likelihood, weighted by the model's own probability, which takes back the factor 1/p by
    which ``nll``, seen as a policy gradient, prefers unlikely tokens.

    Unit: nats. At ℓ = 0 the value is 0; at ℓ = -inf value and gradient are 0.
    Wu et al., "On the Generalization of SFT: A Reinforcement Learning Perspective" (2025).
    """
    return -p_times(logprob.detach(), logprob)


@dft.derivative
def _(logprob: Tensor) -> Tensor:
    return -logprob.exp()
