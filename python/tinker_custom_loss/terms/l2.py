"""Squared logprobs: keeps the model from driving any token's probability to extremes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..tensors.batch import TensorBatch
from ..tensors.gradients import dot
from .columns import optional_column
from .reduction import reduce
from .term import term

__all__ = ["l2"]

_SMALL = 1 << 18


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
        # With no [N] intermediate.
        small = flat.numel() <= _SMALL
        total: Tensor = torch.dot(flat, flat) if small else _SumOfSquares.apply(flat)  # type: ignore[no-untyped-call]
        scale = 1.0 if reduction == "sum" else 1.0 / max(flat.numel(), 1)
        return total * scale, {"tokens": float(flat.numel())}
    safe = flat if mask is None else torch.where(mask != 0, flat, 0.0)
    return reduce(safe.square(), mask, logprobs, reduction)


class _SumOfSquares(torch.autograd.Function):
    """``Σ x²``, exact to float32 where ``torch.dot`` loses four digits of 20 million values, and
    with a third of the passes over memory in its backward."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor) -> Tensor:
        ctx.save_for_backward(flat)
        return flat.new_tensor(dot(flat, flat))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (flat,) = ctx.saved_tensors
        gradient: Tensor = flat * (2 * grad_outputs[0])
        return gradient
