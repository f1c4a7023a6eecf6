"""A token term over a batch, a block of it at a time: what is made on the way to the sum of its
values, and to its gradient, stays in the processor's cache."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tensors.batch import TensorBatch
from ..tensors.gradients import aligned
from .given import Given
from .on_batch import TermOnBatch, rows, values_and_metrics
from .reading import MASKED
from .selection import Selection

__all__ = ["TermInBlocks"]


class TermInBlocks(TermOnBatch):
    """One term of scope ``token`` on one batch, whose value and gradient are known block by block.

    The masked tokens of a block first count 0 times what they give, which is 0 if it is finite.
    From the first block on where it is not, they are replaced before, as they are in a whole batch.
    """

    def __init__(
        self,
        given: Given,
        data: Sequence[Any],
        logprobs: TensorBatch,
        totals: Mapping[str, float] | None,
    ) -> None:
        super().__init__(given, data, logprobs, totals, graph=False)
        sequences, seen = self._sequences, self._reading
        alternatives = (seen.kind or 0) if self._term.alternatives else 0
        self._alternatives = alternatives
        self.width = alternatives or 1
        self._tensors = [
            logprobs.flat,
            *(None if key is None else seen.raw(key) for key in self._keys),
        ]
        self.scale, weights = self._factors
        masked = sequences.kept is not None
        self._by_token = sequences.mask if weights is None and masked else weights
        self._replaces = False
        self._may_replace = masked
        self._sums: dict[str, float] = {}
        self._total = 0.0
        self.seconds = 0.0

    def gradient(self, start: int, stop: int) -> tuple[Tensor, float]:
        """``∂loss/∂logprob`` of the entries of a block, but for the factor ``scale``, and the sum
        of its squares.

        It may be the memory of an input. The block is a multiple of ``width`` entries long. Every
        block must be asked for once.
        """
        started = time.perf_counter()
        block = self._block(start, stop)
        if not block.is_finite and self._may_replace and not self._replaces:
            self._replaces = True
            block = self._block(start, stop)
        self._total += block.total
        for name, value in block.sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self.seconds += time.perf_counter() - started
        return block.gradient, block.square

    @classmethod
    def of(
        cls,
        given: Given,
        data: Sequence[Any],
        logprobs: TensorBatch,
        totals: Mapping[str, float] | None,
    ) -> TermInBlocks | None:
        """None where more than a block must be seen at once, or the gradient be looked for."""
        made = given.term
        if made.scope != "token" or not made.has_derivative or given.importance:
            return None
        if made.alternatives and len({shape[1:] for shape in logprobs.shapes}) > 1:
            return None
        return cls(given, data, logprobs, totals)

    @property
    def value(self) -> float:
        """The loss of all blocks."""
        return self._total * self.scale

    @property
    def metrics(self) -> dict[str, float]:
        """Of all blocks."""
        own = {name: value * self.scale for name, value in self._sums.items()}
        return {"tokens": float(self._sequences.tokens), **own}

    def _block(self, start: int, stop: int) -> _Block:
        kept = self._kept(start, stop) if self._replaces else None
        tensors = [self._cut(tensor, start, stop, kept) for tensor in self._tensors]
        weights, by_entry = self._by_token, None
        if weights is not None:
            first, last = start // self.width, stop // self.width
            if last - first != weights.numel():
                weights = weights[first:last]
            by_entry = weights
            if self._alternatives:
                by_entry = weights[:, None]
        values, metrics = values_and_metrics(self._term.__wrapped__(*tensors, **self._params))
        total = _sum(values, weights)
        sums = {
            name: total if metric is values else _sum(metric, weights)
            for name, metric in metrics.items()
        }
        assert self._term._derivative is not None
        gradient = self._term._derivative(*tensors, **self._params)
        if by_entry is not None:
            gradient = gradient * by_entry
        gradient = aligned(gradient.reshape(-1))
        return _Block(gradient, float(torch.dot(gradient, gradient)), total, sums)

    def _kept(self, start: int, stop: int) -> Selection | None:
        kept = self._reading.kept
        return None if kept is None else Selection(kept.flags[start:stop])

    def _cut(
        self, tensor: Tensor | None, start: int, stop: int, kept: Selection | None
    ) -> Tensor | None:
        if tensor is None:
            return None
        block = tensor if stop - start == tensor.numel() else tensor[start:stop]
        if kept is not None:
            block = kept.of_plain(block, MASKED)
        return rows(block, self._alternatives)


class _Block(NamedTuple):
    gradient: Tensor
    square: float
    total: float
    sums: Mapping[str, float]

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.square) and math.isfinite(self.total + sum(self.sums.values()))


def _sum(values: Tensor, weights: Tensor | None) -> float:
    return float((values if weights is None else values * weights).sum())
