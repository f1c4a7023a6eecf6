"""The gradients of a step made, measured and added up a block of the batch at a time.

Each is then as large as the processor's cache, and only their sum as large as the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..tensors import gradients as grad
from ..tensors.blocks import Block, Flags, blocks
from .measured import MOST_CANCELLED, Measured

__all__ = ["BlockTerm", "measured_in_blocks"]

_LEAST, _MOST = 1e-30, 1e300
"""Of a sum of squares: beyond, single products are lost."""
_NOTHING = torch.zeros(0, device="cpu"), 0.0


class BlockTerm(Protocol):
    """A term that gives its gradient, but for the factor ``scale``, one block after another.

    ``kept`` are the positions, of ``width`` entries each, that its gradient is not 0 at; None: all.
    ``gradient(block)`` is that of a block's kept positions, and the sum of its squares; ``value``
    and ``metrics`` are known when every block was asked for.
    """

    width: int
    kept: Flags | None
    scale: float
    seconds: float

    @property
    def value(self) -> float: ...
    @property
    def metrics(self) -> dict[str, float]: ...
    def gradient(self, block: Block) -> tuple[Tensor, float]: ...


def measured_in_blocks(
    weights: Sequence[float],
    gradients: Sequence[BlockTerm | Tensor | None],
    total: Tensor,
    check: Callable[[], None],
    kept: Mapping[int, Tensor] | None = None,
) -> Measured | None:
    """Of terms that make their gradients now, and of gradients [N] that are there.

    None where the terms do not look at the same positions, and where something is not finite, or
    too small or too large to be told from sums of products: then each must be looked at as a whole.
    Their sum is written to ``total`` [N], and those of terms to ``kept`` [N], by their positions;
    ``check`` is called before every block, and may raise.
    """
    terms = [each for each in gradients if not isinstance(each, Tensor | None)]
    width = max(term.width for term in terms)
    widest = next(term for term in terms if term.width == width)
    scales = [1.0 if isinstance(each, Tensor | None) else each.scale for each in gradients]
    factors = [
        0.0 if gradient is None else weight * scale
        for gradient, weight, scale in zip(gradients, weights, scales, strict=True)
    ]
    if (
        not total.numel()
        or (widest.kept is not None and not widest.kept.any())
        or not all(_keep_alike(term, widest) for term in terms)
        or not max(map(abs, factors)) <= torch.finfo(total.dtype).max
    ):
        return None
    sums = _Sums(factors)
    # A gradient that is there may point to what the terms do not look at.
    everywhere = len(terms) < sum(each is not None for each in gradients)
    for block in blocks(total.numel() // width, width, widest.kept):
        check()
        here = block.all_of(total)
        if not block.count and not everywhere:
            for each in (total, *(kept or {}).values()):
                block.all_of(each).zero_()
            continue
        to_spread = None
        if not block.is_whole and not everywhere:
            to_spread = here.new_empty(block.count * width)
        parts = [_part(each, block, total, everywhere) for each in gradients]
        if not sums.add(parts, here if to_spread is None else to_spread):
            return None
        if to_spread is not None:
            block.spread(to_spread, here)
        for index, whole in (kept or {}).items():
            own = parts[index][0] * scales[index]
            if to_spread is None:
                block.all_of(whole).copy_(own)
            else:
                block.spread(own, block.all_of(whole))
    return sums.measured(scales, total)


def _part(
    gradient: BlockTerm | Tensor | None, block: Block, like: Tensor, everywhere: bool
) -> tuple[Tensor, float]:
    """Of a gradient what is kept of a block, or all that lies in it, and the sum of its squares."""
    if gradient is None:
        return _NOTHING
    if isinstance(gradient, Tensor):
        part = block.all_of(gradient)
        return part, _dot(part, part)
    if block.is_whole or not everywhere:
        return gradient.gradient(block)
    part, square = gradient.gradient(block) if block.count else _NOTHING
    whole = torch.empty_like(block.all_of(like))
    block.spread(part, whole)
    return whole, square


def _keep_alike(term: BlockTerm, widest: BlockTerm) -> bool:
    """Whether two terms look at the same positions, one of them perhaps entry by entry."""
    if term.kept is widest.kept or term.kept is None or widest.kept is None:
        return term.kept is widest.kept
    return bool((term.kept.reshape(len(widest.kept), -1) == widest.kept[:, None]).all())


class _Sums:
    """Of all blocks: each gradient's square, the products of two, and the total's square.

    ``factors`` are those with which the gradients are added; with 0 one points nowhere. The total's
    product with each is the weighted sum of those of two, but where the gradients cancel each
    other, as those of the first block tell: there it is taken too.
    """

    def __init__(self, factors: Sequence[float]) -> None:
        self._factors = factors
        self._pointing = [index for index, factor in enumerate(factors) if factor]
        self._squares = [0.0] * len(factors)
        self._pairs = {(i, j): 0.0 for i in self._pointing for j in self._pointing if i < j}
        self._total_square = 0.0
        self._with_total: dict[int, float] | None = None

    def add(self, parts: Sequence[tuple[Tensor, float]], total: Tensor) -> bool:
        """Add a block, and write its ``total``; False if products do not tell all of it."""
        is_first = not any(self._squares)
        for index, (gradient, square) in enumerate(parts):
            if not _is_told(gradient, square):
                return False
            self._squares[index] += square
        grad.weighted_sum([(self._factors[i], parts[i][0]) for i in self._pointing], total, total)
        if not self._pairs:  # what is alone is the total
            return True
        for i, j in self._pairs:
            self._pairs[i, j] += _dot(parts[i][0], parts[j][0])
        square = _dot(total, total)
        self._total_square += square
        if is_first and self._cancelled > MOST_CANCELLED / 2:
            self._with_total = dict.fromkeys(self._pointing, 0.0)
        if self._with_total is not None:
            for i in self._pointing:
                self._with_total[i] += _dot(parts[i][0], total)
        return _is_told(total, square)

    @property
    def _cancelled(self) -> float:
        """How much longer than their sum the gradients are, added up."""
        lengths = (abs(self._factors[i]) * math.sqrt(self._squares[i]) for i in self._pointing)
        length, total = sum(lengths), math.sqrt(self._total_square)
        return length / total if total else math.inf if length else 0.0

    def measured(self, scales: Sequence[float], total: Tensor) -> Measured | None:
        squares = [*self._squares, self._total_square]
        if not all(_LEAST < square < _MOST for square in squares if square):
            return None
        if self._with_total is None and self._pairs and self._cancelled > MOST_CANCELLED:
            return None
        *norms, total_norm = map(math.sqrt, squares)
        if not self._pairs:
            total_norm = math.fsum(abs(self._factors[i]) * norms[i] for i in self._pointing)
        signs = [math.copysign(1.0, factor) for factor in self._factors]
        n = len(norms)
        pairs = {(i, j): 0.0 for i in range(n) for j in range(i + 1, n)}
        for (i, j), product in self._pairs.items():
            pairs[i, j] = signs[i] * signs[j] * _cosine(product, norms[i], norms[j])
        with_total = [0.0] * n
        pointing = [i for i in self._pointing if norms[i]]
        for i in pointing:
            product = self._product_with_total(i)
            with_total[i] = signs[i] * _cosine(product, norms[i], total_norm)
        if len(pointing) == 1:
            with_total[pointing[0]] = 1.0
        scaled = [norm * scale for norm, scale in zip(norms, scales, strict=True)]
        if not max(*scaled, total_norm) < torch.finfo(total.dtype).max:
            return None  # which whose gradient is too large is to be told, and what is done then
        return Measured(total, total_norm, scaled, pairs, with_total)

    def _product(self, i: int, j: int) -> float:
        return self._squares[i] if i == j else self._pairs.get((min(i, j), max(i, j)), 0.0)

    def _product_with_total(self, i: int) -> float:
        if self._with_total is not None:
            return self._with_total[i]
        return math.fsum(self._factors[j] * self._product(i, j) for j in self._pointing)


def _is_told(block: Tensor, square: float) -> bool:
    """Whether a block is finite, and 0 only if every entry is."""
    return math.isfinite(square) and (square != 0.0 or not bool(block.any()))


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a, b))


def _cosine(product: float, norm: float, other: float) -> float:
    return max(-1.0, min(1.0, product / (norm * other))) if norm and other else 0.0
