"""Terms of steps that are kept and computed again: another process has them by their names."""

from __future__ import annotations

import random

import numpy as np
import torch


def likelihood(data, logprobs):
    return -torch.cat([x.flatten().double() for x in logprobs]).mean(), {}


def root(data, logprobs):
    """Its gradient is infinite where a logprob is 0."""
    return sum((-x).sqrt().sum() for x in logprobs), {}


def spread(data, logprobs):
    return sum(x.double().var(correction=0) for x in logprobs), {}


def draws(data, logprobs):
    noise = random.random() + np.random.rand()
    return sum((x.double() * torch.rand(x.shape)).sum() for x in logprobs) * noise, {}


def towards(data, logprobs, *, target, scales):
    assert isinstance(scales, tuple)
    return scales[1] * sum((x - target).square().sum() for x in logprobs), {}
