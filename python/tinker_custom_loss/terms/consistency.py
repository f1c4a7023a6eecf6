"""The same tokens should be as likely in another setting."""

from __future__ import annotations

import torch
from torch import Tensor

from .groups import Groups
from .term import term

__all__ = ["consistency"]


@term(scope="group")
def consistency(logprob: Tensor, *, groups: Groups, anchored: bool = False) -> Tensor:
    """Consistency of paired datums: ``mean_t ½(ℓ_t - ℓ'_t)²``.

    The datums of a group hold the same target tokens in different settings: another prompt, noise,
    an adversary. One value for every pair of a ``chosen`` datum and another of its group, over the
    tokens that have a weight in both.

    Args:
        anchored: True lets the chosen datum be the anchor, which the others are drawn to and which
            has itself no gradient.

    Unit: nats². A token at ℓ = -inf in one of the two makes the value infinite.
    """
    tokens, partners, pair = _aligned(groups)
    anchor = logprob.detach() if anchored else logprob
    weights = groups.sequences.weights
    both = weights[tokens] * weights[partners]
    squares = (anchor[tokens] - logprob[partners]).square() / 2
    count = len(groups.pairs[0])
    sums = squares.new_zeros(count).index_add(0, pair, torch.where(both != 0, squares, 0.0) * both)
    lengths = squares.new_zeros(count).index_add(0, pair, both)
    return sums / lengths.masked_fill(lengths == 0, 1.0)


def _aligned(groups: Groups) -> tuple[Tensor, Tensor, Tensor]:
    """Where each pair's tokens stand, in the one datum and in the other, and whose they are."""
    chosen, others = groups.pairs
    sizes = torch.tensor(groups.sequences.sizes, device=chosen.device)
    if bool((sizes[chosen] != sizes[others]).any()):
        first = int((sizes[chosen] != sizes[others]).nonzero()[0, 0])
        one, other = int(chosen[first]), int(others[first])
        raise ValueError(
            f"datums {one} and {other} are a pair, but have {int(sizes[one])} and "
            f"{int(sizes[other])} logprobs; consistency compares them token by token"
        )
    starts = sizes.cumsum(0) - sizes
    lengths = sizes[chosen]
    pair = torch.arange(len(chosen), device=chosen.device).repeat_interleave(lengths)
    within = torch.arange(len(pair), device=chosen.device) - (lengths.cumsum(0) - lengths)[pair]
    return starts[chosen][pair] + within, starts[others][pair] + within, pair
