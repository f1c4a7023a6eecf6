"""What the composer costs on the client, beside the SDK's own custom loss and one plain callback.

From the SDK's ForwardBackwardOutput to the datums of the linear backward pass, over the same by
the SDK, for the same loss:

    native_builtin_SHAPE   l2, a term of the catalogue
    native_user_SHAPE      l2, a function of the user's
    native_work_SHAPE      nll + l2 + kl + entropy of the catalogue, over one callback of their sum

From logprobs to loss and gradient:

    structure_SHAPE        l2, kl and entropy as three terms, with their norms and the record, over
                           one function that computes their sum and is differentiated as a whole

    python tests/bench/native.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from figures import figure, medians
from tinker import Datum, ModelInput, TensorData, TrainingClient
from tinker.types import ForwardBackwardOutput

from tinker_custom_loss import Composer, Regularizer, linearize

# Datums, the shape of their logprobs, rounds.
BATCHES = ((64, (4096,), 40), (512, (1024,), 20), (32, (2560, 20), 10))
BUILTIN, USER, STRUCTURE = 0.06, 0.12, 0.70
TERMS = [
    {"fn": "l2", "weight": 0.1},
    {"fn": "kl", "weight": 0.1},
    {"fn": "entropy", "weight": 0.01},
]


def terms_by_hand(data: Sequence[Any], logprobs: Sequence[torch.Tensor]) -> torch.Tensor:
    flat = torch.cat([part.reshape(-1) for part in logprobs])
    inputs = [datum.loss_fn_inputs["reference_logprobs"].to_torch() for datum in data]
    drift = flat - torch.cat([part.reshape(-1) for part in inputs])
    squares = flat.square().sum()
    if logprobs[0].ndim == 1:  # estimated from the sampled tokens
        return 0.1 * squares + 0.05 * drift.square().sum() + 0.005 * squares
    p = flat.exp()
    return 0.1 * squares + 0.1 * (p * drift).sum() + 0.01 * (p * flat).sum()


def all_by_hand(
    data: Sequence[Any], logprobs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    return terms_by_hand(data, logprobs) - sum(part.sum() for part in logprobs), {}


def l2_by_hand(
    data: Sequence[Any], logprobs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    return torch.cat([part.reshape(-1) for part in logprobs]).square().sum(), {}


def batch(datums: int, shape: tuple[int, ...]) -> tuple[list[Datum], ForwardBackwardOutput]:
    generator = np.random.default_rng(0)
    data, outputs = [], []
    for _ in range(datums):
        logprobs = -generator.exponential(size=shape).astype(np.float32)
        drift = 0.1 * generator.normal(size=shape).astype(np.float32)
        inputs = {
            "target_tokens": generator.integers(0, 256, shape),
            "weights": np.ones(shape, np.float32),
            "reference_logprobs": logprobs + drift,
        }
        tokens = generator.integers(0, 256, shape[0]).tolist()
        data.append(Datum(ModelInput.from_ints(tokens), inputs))
        outputs.append({"logprobs": TensorData.from_numpy(logprobs)})
    return data, ForwardBackwardOutput("ArrayRecord", outputs, {})


def check(ours: Sequence[Datum], theirs: Sequence[Datum]) -> None:
    for pair in zip(ours, theirs, strict=True):
        weights = (datum.loss_fn_inputs["weights"].to_numpy() for datum in pair)
        np.testing.assert_allclose(*weights, rtol=1e-4, atol=1e-5)


def native(datums: int, shape: tuple[int, ...], rounds: int) -> None:
    data, output = batch(datums, shape)
    name = "x".join(map(str, (datums, *shape)))

    def ours(base_loss: str | None, terms: Sequence[Any]) -> Callable[[], list[Datum]]:
        return lambda: linearize(data, output, base_loss, terms)[0]

    def sdk(fn: Callable[..., Any]) -> Callable[[], list[Datum]]:
        return lambda: TrainingClient._compute_custom_loss(data, fn, output).data

    ways = {
        "builtin": ours(None, [{"fn": "l2", "weight": 1.0}]),
        "user": ours(None, [Regularizer(l2_by_hand, 1.0, "l2")]),
        "by_sdk": sdk(l2_by_hand),
        "work": ours("nll", TERMS),
        "work_by_sdk": sdk(all_by_hand),
    }
    for one, other in (("builtin", "by_sdk"), ("user", "by_sdk"), ("work", "work_by_sdk")):
        check(ways[one](), ways[other]())
    ms = medians(f"native_{name}", ways, rounds)
    figure(f"native_builtin_{name}", ms["builtin"] / ms["by_sdk"], BUILTIN)
    figure(f"native_user_{name}", ms["user"] / ms["by_sdk"], USER)
    figure(f"native_work_{name}", ms["work"] / ms["work_by_sdk"])


def structure(datums: int, shape: tuple[int, ...], rounds: int) -> None:
    data, output = batch(datums, shape)
    name = "x".join(map(str, (datums, *shape)))
    logprobs = [torch.tensor(out["logprobs"].to_numpy()) for out in output.loss_fn_outputs]
    composer = Composer(None, TERMS)

    def by_hand() -> tuple[float, Sequence[torch.Tensor]]:
        leaves = [part.detach().requires_grad_() for part in logprobs]
        loss = terms_by_hand(data, leaves)
        return float(loss.detach()), torch.autograd.grad(loss, leaves)

    for pair in zip(composer.compute(data, logprobs).gradients, by_hand()[1], strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)
    ways = {"ours": lambda: composer.compute(data, logprobs), "by_hand": by_hand}
    ms = medians(f"structure_{name}", ways, rounds)
    figure(f"structure_{name}", ms["ours"] / ms["by_hand"], STRUCTURE)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for datums, shape, rounds in BATCHES:
        native(datums, shape, rounds)
    structure(*BATCHES[0])
