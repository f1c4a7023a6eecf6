"""The gradients of a step's terms, measured: their norms, their angles and their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..fast_paths import fast
from ..tensors import gradients as grad

__all__ = ["MOST_CANCELLED", "Measured", "measured"]

MOST_CANCELLED = 8.0
"""How much longer than their sum the gradients may be, added up, where its cosines are taken from
those of pairs: beyond, their rounding would show."""


@dataclass(frozen=True)
class Measured:
    """By the terms' positions in the step.

    ``norms`` are of their own gradients, not weighted, and 0 where there is none. ``pairs`` has the
    cosine of every two weighted gradients, the lower position first, and ``with_total`` that of
    each with their sum; 0 where one of both is zero, or not there. ``total`` is the sum, in memory
    of its own.
    """

    total: Tensor
    total_norm: float
    norms: Sequence[float]
    pairs: Mapping[tuple[int, int], float]
    with_total: Sequence[float]


def measured(
    weights: Sequence[float],
    gradients: Sequence[Tensor | None],
    norms: Sequence[float],
    like: Tensor,
    *,
    own: bool,
) -> Measured:
    """Of gradients [N] that are there as a whole, each finite.

    ``own``: they are in memory that nobody else has, so that the only one may be the sum itself.

    The sum's dot product with a term is that of the pairs, weighted, so a step with n terms passes
    over its gradients n·(n-1)/2 times, not n·(n+1)/2.
    """
    lengths = [abs(weight) * norm for weight, norm in zip(weights, norms, strict=True)]
    there = [(w, g) for w, g in zip(weights, gradients, strict=True) if g is not None]
    if len(there) == 1 and there[0][0] == 1.0 and own:
        total = there[0][1]
    else:
        total = grad.weighted_sum(there, like)
    total_norm = sum(lengths) if len(there) == 1 else grad.norm(total)
    if not math.isfinite(total_norm):
        return Measured(total, total_norm, norms, {}, [])
    pointing = [
        (gradient, norm, math.copysign(1.0, weight))
        if gradient is not None and weight and norm
        else None
        for gradient, norm, weight in zip(gradients, norms, weights, strict=True)
    ]

    def cosine(i: int, j: int) -> float:
        one, other = pointing[i], pointing[j]
        if one is None or other is None:
            return 0.0
        return one[2] * other[2] * grad.cosine(one[0], other[0], one[1], other[1])

    positions = range(len(gradients))
    pairs = {(i, j): cosine(i, j) for i in positions for j in positions if i < j}
    by_pairs = fast() and sum(lengths) <= MOST_CANCELLED * total_norm

    def with_total(i: int) -> float:
        one = pointing[i]
        if one is None:
            return 0.0
        others = [j for j in positions if pointing[j] is not None and j != i]
        if not others:
            return 1.0
        if not by_pairs:
            return one[2] * grad.cosine(one[0], total, one[1], total_norm)
        # In the direction of i, each is as long as its norm times its cosine with i.
        along = [lengths[j] * pairs[min(i, j), max(i, j)] for j in others]
        value = math.fsum([lengths[i], *along]) / total_norm
        return max(-1.0, min(1.0, value))

    return Measured(total, total_norm, norms, pairs, [with_total(i) for i in positions])
