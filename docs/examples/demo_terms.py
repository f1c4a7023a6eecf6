"""Three regularizers of a user's own, for docs/examples/demo.exs and demo.py alike.

Elixir names them as "demo_terms:surprise", "demo_terms:smoothness" and "demo_terms:rarity"; Python
imports them.
"""

from __future__ import annotations

import asyncio
import collections

import torch

from tinker_custom_loss import term

__all__ = ["rarity", "smoothness", "surprise"]


@term(scope="token")
def surprise(logprob, *, floor: float = -6.0):
    """Tokens below a floor count, the more the lower: ``log(1 + exp(floor - logprob))``."""
    return torch.nn.functional.softplus(floor - logprob)


def smoothness(data, logprobs, *, window=1):
    """Neighbouring tokens should be about equally surprising.

    The mean over all pairs ``window`` tokens apart of ``(logprob_t - logprob_(t-window))²``.
    """
    jumps = torch.cat([x[window:] - x[:-window] for x in logprobs])
    return jumps.square().mean(), {"largest_jump": jumps.detach().abs().max().item()}


async def rarity(data, logprobs):
    """Rare bytes count for more: the mean of ``-logprob``, weighted by each byte's rarity.

    The frequencies come from a lookup that is awaited, as a reward model or a database would be;
    the async terms of a step wait together, not one after another.
    """
    tokens = torch.cat([datum.loss_fn_inputs["target_tokens"].to_torch() for datum in data])
    counts = await _look_up(tokens.tolist())
    weights = torch.tensor([1.0 / counts[token] for token in tokens.tolist()])
    loss = -(weights / weights.sum() * torch.cat(logprobs)).sum()
    return loss, {"distinct_bytes": len(counts)}


async def _look_up(tokens):
    """How often each byte occurs. Stands for a service whose answer is a moment away."""
    await asyncio.sleep(0.001)
    return collections.Counter(tokens)
