"""A token term over a batch, a block of it at a time: what is made on the way to the sum of its
values, and to its gradient, stays in the processor's cache."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..tensors.batch import TensorBatch
from ..tensors.blocks import Block, NotInBlocksError
from ..tensors.gradients import aligned
from .given import Given
from .on_batch import TermOnBatch, rows, values_and_metrics

__all__ = ["TermInBlocks"]


class TermInBlocks(TermOnBatch):
    """One term of scope ``token`` on one batch, whose value and gradient are known block by block.

    ``kept`` are the positions of the batch, of ``width`` entries each, that have a weight; None if
    all have. The blocks have no others, so that nothing is computed of what is masked.
    """

    def __init__(
        self,
        given: Given,
        data: Sequence[Any],
        logprobs: TensorBatch,
        totals: Mapping[str, float] | None,
    ) -> None:
        super().__init__(given, data, logprobs, totals, graph=False)
        self._alternatives = (self._reading.kind or 0) if self._term.alternatives else 0
        self.width = self._alternatives or 1
        self.kept = self._sequences.flags
        self.scale, self._factors_of = self._factors
        self._tensors = [
            logprobs.flat,
            *(None if key is None else self._reading.raw(key) for key in self._keys),
        ]
        self._sums: dict[str, float] = {}
        self._total = 0.0
        self.seconds = 0.0

    def gradient(self, block: Block) -> tuple[Tensor, float]:
        """``∂loss/∂logprob`` of what is kept of a block, but for the factor ``scale``, and the sum
        of its squares.

        It may be the memory of an input. Every block must be asked for once.

        Raises:
            NotInBlocksError: the function raised.
        """
        started = time.perf_counter()
        tensors = [x if x is None else rows(block.of(x), self._alternatives) for x in self._tensors]
        factors = None if self._factors_of is None else block.of(self._factors_of)
        assert self._term._derivative is not None
        try:
            returned = self._term.__wrapped__(*tensors, **self._params)
            gradient = self._term._derivative(*tensors, **self._params)
        except Exception as error:
            raise NotInBlocksError from error
        values, metrics = values_and_metrics(returned)
        total = _sum(values, factors)
        self._total += total
        for name, metric in metrics.items():
            added = total if metric is values else _sum(metric, factors)
            self._sums[name] = self._sums.get(name, 0.0) + added
        if factors is not None:
            gradient = gradient * (factors[:, None] if self._alternatives else factors)
        gradient = aligned(gradient.reshape(-1))
        square = float(torch.dot(gradient, gradient))
        self.seconds += time.perf_counter() - started
        return gradient, square

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


def _sum(values: Tensor, factors: Tensor | None) -> float:
    return float((values if factors is None else values * factors).sum())
