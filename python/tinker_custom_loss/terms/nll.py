"""Negative log-likelihood, Tinker's ``cross_entropy`` as a term."""

from __future__ import annotations

import torch
from torch import Tensor

from .term import term

__all__ = ["nll"]


@term(scope="token")
def nll(logprob: Tensor) -> Tensor:
    """Negative log-likelihood: ``-ℓ``, Tinker's ``cross_entropy``.

    Unit: nats. At ℓ = 0 it is 0; at ℓ = -inf it is +inf, with the gradient -1 that it has
    everywhere.
    """
    return -logprob


@nll.derivative
def _(logprob: Tensor) -> Tensor:
    return torch.full_like(logprob, -1.0)
