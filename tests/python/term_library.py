"""Terms that tests use: small, with gradients known in closed form. Importable by any process."""

from __future__ import annotations

import asyncio
import os
import sys
import time

import torch

CALLS: list[str] = []


def square(data, logprobs, *, scale=1.0):
    """``scale · Σ x²``, gradient ``2·scale·x``."""
    return scale * sum(x.square().sum() for x in logprobs), {"datums": len(data)}


def total(data, logprobs):
    """``Σ x``, gradient 1."""
    return sum(x.sum() for x in logprobs), {}


async def square_async(data, logprobs):
    await asyncio.sleep(0)
    return square(data, logprobs)


def first_datum_only(data, logprobs):
    return logprobs[0].sum(), {}


def constant(data, logprobs):
    return torch.tensor(3.0), {"checked": True}


def in_float64(data, logprobs):
    return sum(x.double().square().sum() for x in logprobs), {}


def raises(data, logprobs):
    raise KeyError("no such reward")


def exits(data, logprobs):
    sys.exit("enough")


def returns_vector(data, logprobs):
    return logprobs[0], {}


def returns(data, logprobs, *, loss):
    return loss, {}


def returns_text(data, logprobs):
    return "low", {}


def returns_bare_loss(data, logprobs):
    return logprobs[0].sum()


def returns_text_metric(data, logprobs):
    return logprobs[0].sum(), {"note": "fine"}


def nan_gradient_in_datum_1(data, logprobs):
    """The loss is finite; the gradient of sqrt at 0 is not."""
    x = logprobs[1]
    return logprobs[0].sum() + (x - x.detach()).flatten()[1].sqrt(), {}


def infinite_loss(data, logprobs):
    return logprobs[0].sum() * 0 + torch.inf, {}


def changes_in_place(data, logprobs):
    logprobs[0].detach().clamp_(min=0)
    return logprobs[0].sum(), {}


def sleeps_for_ever(data, logprobs):
    while True:
        time.sleep(3600)


def kills_its_process(data, logprobs):
    os.kill(os.getpid(), 9)


def forks_and_dies(data, logprobs):
    """Leaves a child that holds every descriptor of its process open, for a while."""
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    os.kill(os.getpid(), 9)


def head_on_logprobs(data, logprobs, *, head, frozen=False):
    """A loss with parameters of its own, which are not trained if ``frozen``."""
    with torch.set_grad_enabled(not frozen):
        score = head(logprobs[0].detach() if frozen else logprobs[0]).sum()
    return score + 0 * logprobs[0].sum(), {}
