"""A term that computes in Python, and lets no other thread of its process do so meanwhile."""

from typing import Any

import torch
from torch import Tensor

STEPS = 200_000


def recursion(data: list[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """As a loop over tokens does, one after another, each depending on the last."""
    value = 0.0
    for step in range(STEPS):
        value = 0.9 * value + step
    return torch.cat(logprobs).square().sum(), {"value": value}
