"""Pushes down tokens that should not have been written."""

from __future__ import annotations

import torch
from torch import Tensor

from .pieces import log1mexp
from .term import term

__all__ = ["unlikelihood"]


@term(scope="token")
def unlikelihood(logprob: Tensor) -> Tensor:
    """Unlikelihood: ``-log(1-e^ℓ)``, with the gradient ``e^ℓ/(1-e^ℓ)``.

    Weights choose the tokens that are unwanted. Unit: nats. At ℓ = -inf value and gradient are 0;
    at ℓ = 0, a token that the model is certain of, both are +inf.
    Welleck et al., "Neural Text Generation With Unlikelihood Training" (2020).
    """
    return -log1mexp(logprob)


@unlikelihood.derivative
def _(logprob: Tensor) -> Tensor:
    return 1 / torch.expm1(-logprob)
