"""Negative log-likelihood, Tinker's ``cross_entropy`` as a term."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..tensors.batch import TensorBatch
from .columns import optional_column
from .reduction import reduce
from .term import term

__all__ = ["nll"]


@term
def nll(
    data: Sequence[Any],
    logprobs: TensorBatch,
    *,
    weights: str | None = "weights",
    reduction: str = "sum",
) -> tuple[Tensor, dict[str, float]]:
    """Negative log-likelihood: ``Σ -w_t · logprob_t``.

    Args:
        weights: key of ``loss_fn_inputs`` with the weights w ([T] or [T,K]); if no datum has it,
            or it is None, every weight is 1.
        reduction: ``"sum"`` (default, as in Tinker's cross_entropy), ``"mean"`` (over Σ w), or
            ``"sequence_mean"``.

    Unit: nats. A token of weight 0 gets a gradient of exactly 0, also where its logprob is -inf.
    """
    mask = optional_column(weights, data, logprobs)
    return reduce(-logprobs.flat, mask, logprobs, reduction)
