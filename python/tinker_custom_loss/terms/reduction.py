"""From many numbers to one: always by name, never by habit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..tensors.blocks import Flags
from ..tensors.flags import are_not, count
from .lazy import lazy
from .selection import Selection

__all__ = ["REDUCTIONS", "Reduction", "ReductionName", "Sequences"]

ReductionName = Literal[
    "token_sum", "token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum"
]
REDUCTIONS: tuple[str, ...] = get_args(ReductionName)


@dataclass(frozen=True, eq=False)
class Sequences:
    """Which entries of a flat buffer [N] belong to which datum, and how much each one weighs.

    What a term of scope ``sequence`` uses to look at a whole datum, with no loop over datums.
    """

    sizes: Sequence[int]
    mask: Tensor | None
    like: Tensor

    @property
    def weights(self) -> Tensor:
        """The weight of every token, [N]."""
        return self.like.new_ones(sum(self.sizes)) if self.mask is None else self.mask

    @lazy
    def kept(self) -> Tensor | None:
        """Whether every token has a weight, [N]; None if all have."""
        if self.mask is None:
            return None
        kept = are_not(self.mask, 0.0)
        return None if count(kept) == kept.numel() else kept

    @lazy
    def flags(self) -> Flags | None:
        """:attr:`kept` as numpy has it."""
        return None if self.kept is None else self.kept.numpy()

    @lazy
    def selection(self) -> Selection | None:
        """The tokens with a weight; None if all have."""
        return None if self.kept is None else Selection(self.kept)

    @lazy
    def factors(self) -> Tensor | None:
        """The weights of the tokens that are kept, [N]; None if all of these are 1."""
        if self.mask is None:
            return None
        ones = self.mask.numel() - count(are_not(self.mask, 1.0))
        return None if ones == self.tokens else self.mask

    @lazy
    def tokens(self) -> int:
        """How many tokens have a weight."""
        return sum(self.sizes) if self.kept is None else count(self.kept)

    @lazy
    def weight(self) -> float:
        """``Σ w`` over all tokens: their number, if the weights are 0 and 1."""
        if self.factors is None:
            return float(self.tokens)
        return float(self.factors.sum(dtype=torch.float64))

    @lazy
    def has_mean(self) -> bool:
        """Whether no weight is negative."""
        return self.factors is None or not self.factors.numel() or bool(self.factors.min() >= 0)

    @lazy
    def lengths(self) -> Tensor:
        """Σ of the weights of every datum's tokens, [B]: their number, if they are 0 and 1."""
        return self._sums(self.weights.detach())

    @lazy
    def shares(self) -> Tensor:
        """``w_t / Σ w`` of every token, [N]: what it counts in its datum's mean."""
        return self.weights * self.spread(1 / _never_zero(self.lengths))

    def sum(self, values: Tensor) -> Tensor:
        """``Σ_t w_t·values_t`` of every datum: [N] -> [B]."""
        return self._sums(self._weighted(values))

    def mean(self, values: Tensor) -> Tensor:
        """``Σ_t w_t·values_t / Σ_t w_t`` of every datum: [N] -> [B]. 0 where no token counts."""
        return self.sum(values) / _never_zero(self.lengths)

    def total(self, values: Tensor) -> Tensor:
        """``Σ_t values_t`` over every datum's tokens with a weight, whatever it is: [N] -> [B]."""
        return self._sums(values if self.kept is None else torch.where(self.kept, values, 0.0))

    def spread(self, per_datum: Tensor) -> Tensor:
        """Each datum's number for each of its tokens: [B] -> [N]."""
        if self._regular:
            return per_datum.repeat_interleave(self.sizes[0])
        return torch.repeat_interleave(per_datum, self._sizes, output_size=sum(self.sizes))

    def _weighted(self, values: Tensor) -> Tensor:
        if self.kept is not None:
            values = torch.where(self.kept, values, 0.0)
        return values if self.factors is None else values * self.factors

    def _sums(self, values: Tensor) -> Tensor:
        if self._regular:
            return values.view(len(self.sizes), self.sizes[0]).sum(1)
        return torch.segment_reduce(values, "sum", lengths=self._sizes, unsafe=True, initial=0.0)

    @lazy
    def _regular(self) -> bool:
        return len(set(self.sizes)) == 1

    @lazy
    def _sizes(self) -> Tensor:
        return torch.tensor(self.sizes, dtype=torch.int64, device=self.like.device)


@dataclass(frozen=True)
class Reduction:
    """How values become one number. With w_t the weights of the tokens, and B datums:

    - ``"token_sum"``: ``Σ w·v``, as Tinker's own losses do: a longer batch weighs more.
    - ``"token_mean"``: ``Σ w·v / Σ w``: every token of the batch weighs the same.
    - ``"sequence_mean_token_mean"``: the mean over datums of each one's mean over its tokens:
      every datum weighs the same. A datum whose weights are all zero counts as 0.
    - ``"sequence_mean_token_sum"``: the mean over datums of each one's sum.

    Each divided by the constant ``normalizer``, if there is one.

    The value of a datum (scope ``sequence``) is taken for the sum over its tokens. A value of
    scope ``group`` already looks at several datums: ``token_sum`` is the sum of such values,
    ``sequence_mean_…`` their mean.
    """

    name: str
    normalizer: float | None = None

    def __post_init__(self) -> None:
        if self.name not in REDUCTIONS:
            raise ValueError(
                f"unknown reduction {self.name!r}; expected one of {', '.join(REDUCTIONS)}"
            )
        number = self.normalizer
        if number is None:
            return
        real = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not real or not math.isfinite(number) or number <= 0:
            raise ValueError(f"normalizer must be a positive number or None, got {number!r}")

    @property
    def has_mean_over_tokens(self) -> bool:
        return self.name in ("token_mean", "sequence_mean_token_mean")

    def of_tokens(self, sequences: Sequences, totals: Any) -> tuple[float, Tensor | None]:
        """A factor for all tokens, and one for each that is kept [N] (None: all 1), with its
        weight."""
        if self.name != "sequence_mean_token_mean":
            return self._scale(totals), sequences.factors
        return self._scale(totals), sequences.shares

    def of_sequences(self, sequences: Sequences, totals: Any) -> tuple[float, Tensor | None]:
        """A factor for all datums, and one for each [B] (None: all 1)."""
        if self.name != "sequence_mean_token_mean":
            return self._scale(totals), None
        return self._scale(totals), 1 / _never_zero(sequences.lengths)

    def of_groups(self, totals: Any) -> float:
        """A factor for all values of groups."""
        if self.name.startswith("sequence_mean"):
            return 1 / self._divisor(totals["values"])
        return self._scale(totals)

    def _scale(self, totals: Any) -> float:
        if self.name == "token_sum":
            return 1 / self._divisor(1.0)
        return 1 / self._divisor(totals["tokens" if self.name == "token_mean" else "sequences"])

    def _divisor(self, total: float) -> float:
        return (total or 1.0) * (self.normalizer or 1.0)


def _never_zero(lengths: Tensor) -> Tensor:
    return lengths.masked_fill(lengths == 0, 1.0)
