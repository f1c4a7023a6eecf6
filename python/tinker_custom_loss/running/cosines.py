"""Cosines of the terms' weighted gradients: of each pair, and of each with their sum."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..fast_paths import fast
from ..tensors import gradients as grad
from .non_finite import CheckedEvaluation

__all__ = ["Cosines"]

_MOST_CANCELLED = 8.0
"""How much longer than their sum the gradients may be, added up, where its cosines are taken from
those of pairs: beyond, their rounding would show."""


class Cosines:
    """Over the terms of a step, in their order; 0 where a gradient is zero, or not there.

    The sum's dot product with a term is that of the pairs, weighted, so a step with n terms passes
    over its gradients n·(n-1)/2 times, not n·(n+1)/2.
    """

    def __init__(
        self,
        weights: Sequence[float],
        parts: Sequence[CheckedEvaluation],
        total: Tensor,
        total_norm: float,
    ) -> None:
        self._parts = parts
        self._total, self._total_norm = total, total_norm
        self._weights = [
            weight if part.gradient is not None and part.norm != 0.0 else 0.0
            for weight, part in zip(weights, parts, strict=True)
        ]
        lengths = [abs(w) * part.norm for w, part in zip(self._weights, parts, strict=True)]
        self._by_pairs = fast() and sum(lengths) <= _MOST_CANCELLED * total_norm
        n = range(len(parts))
        self._pairs = {(i, j): self._cosine(i, j) for i in n for j in n if i < j}

    def of_pair(self, i: int, j: int) -> float:
        return self._pairs[min(i, j), max(i, j)]

    def with_total(self, i: int) -> float:
        gradient, norm = self._parts[i].gradient, self._parts[i].norm
        if not self._weights[i] or gradient is None:
            return 0.0
        others = [j for j, weight in enumerate(self._weights) if weight and j != i]
        if not others:
            return 1.0
        if not self._by_pairs:
            return self._sign(i) * grad.cosine(gradient, self._total, norm, self._total_norm)
        # In the direction of i, each is as long as its norm times its cosine with i.
        along = [abs(self._weights[j]) * self._parts[j].norm * self.of_pair(i, j) for j in others]
        value = math.fsum([abs(self._weights[i]) * norm, *along]) / self._total_norm
        return max(-1.0, min(1.0, value))

    def _cosine(self, i: int, j: int) -> float:
        a, b = self._parts[i], self._parts[j]
        if not self._weights[i] or not self._weights[j]:
            return 0.0
        assert a.gradient is not None
        assert b.gradient is not None
        return self._sign(i) * self._sign(j) * grad.cosine(a.gradient, b.gradient, a.norm, b.norm)

    def _sign(self, i: int) -> float:
        return math.copysign(1.0, self._weights[i])
