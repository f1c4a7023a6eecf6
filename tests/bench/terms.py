"""What each term of the catalogue costs on large batches, beside a loop over the datums.

    python tests/bench/terms.py [NAME ...]

prints a table of milliseconds: the loss, its gradient and the record of one term by a Composer, and
the sum of the same term called once a datum (once a pair, for comparisons) and differentiated by
autograd. The best of three and of one, after a first call; torch has one thread.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tinker import Datum, ModelInput, TensorData

from tinker_custom_loss import Composer
from tinker_custom_loss.terms import CATALOGUE

BATCHES = ((512, (8192,)), (128, (2560, 20)))
KEYS = ("logprobs", "old_logprobs", "reference_logprobs", "teacher_logprobs")


def batch(datums: int, shape: tuple[int, ...]) -> tuple[list[Datum], list[torch.Tensor]]:
    """A third of the positions is prompt, with weight 0."""
    generator = np.random.default_rng(0)
    prompt = shape[0] // 3

    def logprobs() -> np.ndarray[Any, Any]:
        logits = generator.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            return -np.abs(logits) - np.float32(0.1)
        mass = np.log(np.exp(logits).sum(-1, keepdims=True)) + np.float32(0.05)
        return logits - mass

    data, batch_logprobs = [], []
    for index in range(datums):
        weights = np.ones(shape, np.float32)
        weights[:prompt] = 0.0
        inputs = {key: TensorData.from_numpy(logprobs()) for key in KEYS}
        inputs |= {
            "weights": TensorData.from_numpy(weights),
            "advantages": TensorData.from_numpy(generator.normal(size=shape).astype(np.float32)),
            "group": TensorData.from_numpy(np.array([index // 2])),
            "chosen": TensorData.from_numpy(np.array([index % 2])),
        }
        data.append(Datum(ModelInput.from_ints([0]), inputs))
        batch_logprobs.append(torch.from_numpy(logprobs()))
    return data, batch_logprobs


def looped(
    term: Any, data: Sequence[Datum], logprobs: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor]:
    """The gradient of the term's sum over the datums, or the pairs of them, one after another."""
    leaves = [part.detach().requires_grad_() for part in logprobs]
    size = 2 if term.scope == "group" else 1
    losses = [
        term(data[start : start + size], leaves[start : start + size])[0]
        for start in range(0, len(data), size)
    ]
    return torch.autograd.grad(torch.stack(losses).sum(), leaves)


def best(function: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def row(term: Any, data: list[Datum], logprobs: list[torch.Tensor]) -> tuple[str, str]:
    composer = Composer(term)
    try:
        composed = composer.compute(data, logprobs).gradients
    except Exception as error:
        if "shape [T]" in str(error) or "[T,K]" in str(error):  # it is for the other batch
            return "", ""
        raise
    if term.__name__ != "kto":  # whose comparisons look at the whole batch
        for pair in zip(composed, looped(term, data, logprobs), strict=True):
            torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-5)
    loop = best(lambda: looped(term, data, logprobs), 1)
    return f"{best(lambda: composer.compute(data, logprobs), 3):.0f}", f"{loop:.0f}"


def main(names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    batches = [batch(*each) for each in BATCHES]
    heads = [f"{datums} of {list(shape)}" for datums, shape in BATCHES]
    print("| term | " + " | ".join(f"{head} | loop" for head in heads) + " |")
    print("|---|" + "--:|--:|" * len(heads))
    for name in names or CATALOGUE:
        term = CATALOGUE[name]
        cells = [cell for each in batches for cell in row(term, *each)]
        print(f"| `{name}` | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
