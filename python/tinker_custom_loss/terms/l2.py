"""Squared logprobs: keeps the model from driving any token's probability to extremes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch import TensorBatch
from .columns import optional_column
from .reduction import reduce
from .term import term

__all__ = ["l2"]


@term
def l2(
    data: Sequence[Any],
    logprobs: TensorBatch,
    *,
    weights: str | None = None,
    reduction: str = "sum",
) -> tuple[Tensor, dict[str, float]]:
    """Squared logprobs: ``Σ w_t · logprob_t²``.

    Args:
        weights: key of ``loss_fn_inputs`` with per-token weights w ([T] or [T,K]); None: all 1.
        reduction: ``"sum"`` (default), ``"mean"`` or ``"sequence_mean"``.

    Unit: nats². The gradient is ``2·w_t·logprob_t``; a token of weight 0 gets exactly 0, also
    where its logprob is -inf.
    """
    mask = optional_column(weights, data, logprobs)
    flat = logprobs.flat
    if mask is None and reduction in ("sum", "mean"):
        # One pass forward and one backward, with no [N] intermediate.
        total = torch.dot(flat, flat)
        scale = 1.0 if reduction == "sum" else 1.0 / max(flat.numel(), 1)
        return total * scale, {"tokens": float(flat.numel())}
    safe = flat if mask is None else torch.where(mask != 0, flat, 0.0)
    return reduce(safe.square(), mask, logprobs, reduction)
