"""From one number per token to one number: always by name, never by habit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..tensors.batch import TensorBatch

__all__ = ["by_rank", "reduce"]

REDUCTIONS = ("sum", "mean", "sequence_mean")


def reduce(
    values: Tensor, mask: Tensor | None, logprobs: TensorBatch, reduction: str
) -> tuple[Tensor, dict[str, float]]:
    """Reduce per-token values [N] to a scalar, weighted by ``mask`` [N] (1 everywhere if None).

    - ``"sum"``: ``Σ m·v``, as Tinker's own losses do: a longer batch weighs more.
    - ``"mean"``: ``Σ m·v / Σ m``: every token of the batch weighs the same.
    - ``"sequence_mean"``: the mean over sequences of each one's mean over its tokens: every
      sequence weighs the same. A sequence whose mask is all zero counts as 0.

    Entries with mask 0 have no part in the result: they get a gradient of exactly 0, even where
    the value is infinite. The metrics hold ``tokens``, the number of entries with a nonzero mask.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"unknown reduction {reduction!r}; expected one of {', '.join(REDUCTIONS)}"
        )
    if mask is None:
        tokens = values.numel()
        weighted = values
    else:
        kept = mask != 0
        tokens = int(kept.sum())
        weighted = torch.where(kept, values, 0.0) * mask
    metrics = {"tokens": float(tokens)}
    if reduction == "sum":
        return weighted.sum(), metrics
    if reduction == "mean":
        total = float(tokens) if mask is None else mask.sum()
        return weighted.sum() / (total if total != 0 else 1.0), metrics
    sums = torch.stack([part.sum() for part in torch.split(weighted, list(logprobs.sizes))])
    if mask is None:
        totals = sums.new_tensor(logprobs.sizes)
    else:
        totals = torch.stack([part.sum() for part in torch.split(mask, list(logprobs.sizes))])
    return (sums / totals.masked_fill(totals == 0, 1.0)).mean(), metrics


def by_rank(
    logprobs: TensorBatch,
    tensors: Sequence[Tensor],
    sampled: Callable[..., Tensor],
    alternatives: Callable[..., Tensor],
) -> Tensor:
    """Per-token values [N] of a batch in which [T] and [T,K] may be mixed.

    ``sampled`` computes the values of datums that are [T], ``alternatives`` of those that are
    [T,K]; each is called with its part of the flat ``tensors`` and never sees the other's.
    """
    ranks = {len(shape) for shape in logprobs.shapes}
    if ranks == {1}:
        return sampled(*tensors)
    if ranks == {2}:
        return alternatives(*tensors)
    is_sampled = torch.tensor([len(shape) == 1 for shape in logprobs.shapes])
    mask = is_sampled.repeat_interleave(torch.tensor(logprobs.sizes)).to(logprobs.flat.device)
    parts = [sampled(*(t[mask] for t in tensors)), alternatives(*(t[~mask] for t in tensors))]
    order = torch.cat([mask.nonzero(), (~mask).nonzero()]).reshape(-1)
    values = torch.cat(parts)
    return torch.empty_like(values).index_copy(0, order, values)
