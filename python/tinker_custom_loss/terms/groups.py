"""Which datums belong together: pairs of a chosen and a rejected answer, and the like."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .lazy import lazy
from .reduction import Sequences

__all__ = ["Groups"]


@dataclass(frozen=True, eq=False)
class Groups:
    """What a term of scope ``group`` sees of the batch's structure.

    Attributes:
        ids: the integer ``group`` of every datum, [B].
        chosen: whether it is ``chosen``, [B].
        sequences: sums and means over each datum's tokens.
    """

    ids: Tensor
    chosen: Tensor
    sequences: Sequences

    @lazy
    def index(self) -> Tensor:
        """The groups numbered from 0, for every datum, [B]."""
        index: Tensor = torch.unique(self.ids, return_inverse=True)[1]
        return index

    def mean(self, per_datum: Tensor) -> Tensor:
        """The mean over each datum's group, for every datum: [B] -> [B]."""
        count = int(self.index.max()) + 1
        ones = torch.ones_like(per_datum)
        sums = per_datum.new_zeros(count).index_add(0, self.index, per_datum)
        return (sums / per_datum.new_zeros(count).index_add(0, self.index, ones))[self.index]

    @lazy
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Every chosen datum with every rejected one of its group: two index tensors [P].

        Raises:
            ValueError: a group has no chosen datum, or no rejected one.
        """
        chosen = self.chosen.nonzero()[:, 0]
        rejected = (~self.chosen).nonzero()[:, 0]
        count = int(self.index.max()) + 1
        self._check_whole(chosen, "chosen", count)
        self._check_whole(rejected, "rejected", count)
        rejected = rejected[self.index[rejected].argsort(stable=True)]
        a_group = torch.bincount(self.index[rejected], minlength=count)
        repeats = a_group[self.index[chosen]]
        first = torch.arange(len(chosen), device=chosen.device).repeat_interleave(repeats)
        within = torch.arange(len(first), device=first.device)
        within = within - (repeats.cumsum(0) - repeats)[first]
        starts = (a_group.cumsum(0) - a_group)[self.index[chosen]][first]
        return chosen[first], rejected[starts + within]

    def _check_whole(self, members: Tensor, kind: str, count: int) -> None:
        missing = (torch.bincount(self.index[members], minlength=count) == 0).nonzero()[:, 0]
        if len(missing):
            group = int(self.ids[self.index == missing[0]][0])
            raise ValueError(
                f"group {group} has no {kind} datum in this call; a comparison needs all datums of "
                'its group together, "chosen" 1 in one at least and 0 in one at least'
            )
