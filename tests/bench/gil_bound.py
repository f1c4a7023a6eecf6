"""A term that computes in Python, and lets no other thread of its process do so meanwhile.

    python tests/bench/gil_bound.py

calls it as often as each line of the standard input says, and answers with a line: what a process
takes for it that has nothing else to do.
"""

import sys
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


def main() -> None:
    logprobs = [torch.full((125,), -1.0)] * 8
    for line in sys.stdin:
        for _ in range(int(line)):
            recursion([], logprobs)
        print("done", flush=True)


if __name__ == "__main__":
    main()
