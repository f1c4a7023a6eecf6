"""An entropy bonus that trains, from the logprobs of sampled tokens or of the top K."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..tensors.batch import TensorBatch
from .columns import optional_column
from .reduction import by_rank, reduce
from .term import term

__all__ = ["entropy"]


@term
def entropy(
    data: Sequence[Any],
    logprobs: TensorBatch,
    *,
    weights: str | None = "weights",
    reduction: str = "sum",
) -> tuple[Tensor, dict[str, float]]:
    """Negative entropy ``-H``: with a positive weight, training keeps the entropy up.

    For [T] logprobs of tokens sampled from the model, ``-H = E[log p]``. Its value is estimated
    by ``Σ w_t·logprob_t``; but the gradient of that estimate has mean zero (``E[∇log p] = 0``),
    so what is differentiated is the surrogate ``Σ w_t·½·logprob_t²``, whose gradient
    ``logprob_t·∇logprob_t`` is an unbiased estimate of ``-∇H`` (the score function estimator,
    Williams 1992, applied to ``-E[log p]``).

    For [T,K] logprobs of K alternatives, the part of the entropy that they hold is exact:
    ``Σ_t Σ_k w·p·log p`` with ``p = exp(logprob)``, and so is its gradient. ``0·log 0`` is 0.

    Args:
        weights: key of ``loss_fn_inputs`` with per-token weights ([T] or [T,K]); if no datum has
            it, or it is None, every weight is 1.
        reduction: ``"sum"`` (default), ``"mean"`` or ``"sequence_mean"``.

    Unit: nats. Sampled tokens must come from the model being trained, or nearly so.
    """
    mask = optional_column(weights, data, logprobs)
    log_p = logprobs.flat
    if mask is not None:
        log_p = torch.where(mask != 0, log_p, 0.0)
    return reduce(by_rank(logprobs, [log_p], _sampled, _exact), mask, logprobs, reduction)


def _sampled(log_p: Tensor) -> Tensor:
    surrogate = log_p.square() / 2
    return log_p.detach() + (surrogate - surrogate.detach())


def _exact(log_p: Tensor) -> Tensor:
    possible = log_p != -torch.inf
    safe = torch.where(possible, log_p, 0.0)
    return torch.where(possible, safe.exp() * safe, 0.0)
