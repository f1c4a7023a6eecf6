"""Importance weights for what was sampled by one program and trained by another.

The sampler's kernels are not the trainer's, so its logprobs μ of its own tokens differ from those
that the trainer gives the same tokens with the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .reduction import Sequences

__all__ = ["Importance", "ImportanceKind", "Weighing"]

ImportanceKind = Literal[
    "none", "token_truncated", "token_masked", "sequence_truncated", "sequence_masked"
]


@dataclass(frozen=True)
class Importance:
    """The parameters ``importance``, ``importance_cap`` and ``importance_floor`` of a term.

    Each summand is multiplied by a weight, through which nothing is differentiated: that of its
    token, ``exp(old-μ)``, or of its whole sequence, ``exp(Σ_t(old-μ))`` over the tokens with a
    weight. ``old`` are the trainer's logprobs at the time of sampling. A truncated weight is at
    most ``cap`` (TIS); a masked one counts as it is from ``floor`` to ``cap``, and 0 elsewhere
    (MIS). The denominators of reductions stay what they are.
    """

    kind: ImportanceKind = "none"
    cap: float = 2.0
    floor: float = 0.0

    def __bool__(self) -> bool:
        return self.kind != "none"

    @property
    def of_sequences(self) -> bool:
        return self.kind.startswith("sequence")

    @property
    def masks(self) -> bool:
        return self.kind.endswith("masked")

    def weigh(self, log_ratio: Tensor, sequences: Sequences, per_datum: bool) -> Weighing:
        """The weights: of the tokens, [N], or per datum, [B], where the summands are datums."""
        if self.of_sequences:
            log_ratio = sequences.total(log_ratio)
            if not per_datum:
                log_ratio = sequences.spread(log_ratio)
        weight = log_ratio.exp()
        cut = weight > self.cap
        if not self.masks:
            return Weighing(weight.clamp(max=self.cap), cut)
        cut = cut | (weight < self.floor)
        return Weighing(torch.where(cut, 0.0, weight), cut)  # nan stays nan

    @staticmethod
    def check(name: str, scope: str, given: Mapping[str, Any], keys: tuple[str, str]) -> None:
        """Refuse parameters that would do nothing, or not what they say.

        ``given`` are those that were given, ``keys`` that of the trainer's logprobs (or "", where
        they are those of now) and that of the sampler's.
        """
        kind = given.get("importance", "none")
        options = [
            option for option in ("importance_cap", "importance_floor", "old") if option in given
        ]
        if kind == "none":
            if options:
                raise ValueError(
                    f"the parameter {options[0]} of the term {name} has no meaning without "
                    'importance weights; give importance too, say "token_truncated"'
                )
            return
        if scope == "sequence" and kind.startswith("token"):
            raise ValueError(
                f"importance {kind!r} weighs single tokens, but a summand of the term {name} is a "
                f'whole sequence; use "{kind.replace("token", "sequence")}"'
            )
        if kind.endswith("truncated") and given.get("importance_floor"):
            raise ValueError(
                f"importance_floor of the term {name} is for masked weights: {kind!r} ones are "
                f'truncated from above only; use "{kind.replace("truncated", "masked")}"'
            )
        old, sampler = keys
        if old == sampler:
            raise ValueError(
                f'the importance weights of the term {name} compare the key "{old}" with itself, '
                "so that each is 1; name the trainer's logprobs at the time of sampling by the "
                "parameter old, and the sampler's by the parameter sampler"
            )


@dataclass(frozen=True)
class Weighing:
    """The weight of every summand, and whether it was truncated or masked."""

    weight: Tensor
    cut: Tensor
