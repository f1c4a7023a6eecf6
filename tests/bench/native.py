"""What the composer costs on the client, as a share of what the SDK's own custom loss costs there.

Both go from the SDK's ``ForwardBackwardOutput`` to the datums of the linear backward pass, for the
same loss on 64 datums of 4,096 tokens; the composer measures its term on the way.

    python tests/bench/native.py

prints ``NAME VALUE (target T) ok|short``, and the two medians on standard error.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from tinker import Datum, ModelInput, TensorData, TrainingClient
from tinker.types import ForwardBackwardOutput

from tinker_custom_loss import Regularizer, linearize

DATUMS, TOKENS = 64, 4096
ROUNDS, TARGET = 40, 0.10


def mean_square(
    data: list[Datum], logprobs: list[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    values = torch.cat(logprobs)
    return values.square().mean(), {"tokens": float(values.numel())}


def batch() -> tuple[list[Datum], ForwardBackwardOutput]:
    generator = np.random.default_rng(0)
    data, outputs = [], []
    for _ in range(DATUMS):
        tokens = generator.integers(0, 256, TOKENS)
        inputs = {"target_tokens": tokens, "weights": np.ones(TOKENS, np.float32)}
        data.append(Datum(ModelInput.from_ints(tokens.tolist()), inputs))
        logprobs = -generator.exponential(size=TOKENS).astype(np.float32)
        outputs.append({"logprobs": TensorData.from_numpy(logprobs)})
    return data, ForwardBackwardOutput("ArrayRecord", outputs, {})


def milliseconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    torch.set_num_threads(1)
    data, output = batch()
    regularizers = [Regularizer(mean_square, 1.0, "mean_square")]

    def composer() -> list[Datum]:
        return linearize(data, output, None, regularizers)[0]

    def sdk() -> list[Datum]:
        return TrainingClient._compute_custom_loss(data, mean_square, output).data

    for ours, theirs in zip(composer(), sdk(), strict=True):
        weights = (datum.loss_fn_inputs["weights"].to_numpy() for datum in (ours, theirs))
        np.testing.assert_allclose(*weights, rtol=1e-6)

    times: dict[Callable[[], object], list[float]] = {composer: [], sdk: []}
    for round_ in range(ROUNDS):
        # Every other round in the other order: neither is always the one with cold caches.
        for function in (composer, sdk) if round_ % 2 else (sdk, composer):
            times[function].append(milliseconds(function))
    ours, theirs = statistics.median(times[composer]), statistics.median(times[sdk])
    ratio = ours / theirs
    print(
        f"native_64x4096 {ratio:.2f} (target {TARGET:.2f}) {'ok' if ratio <= TARGET else 'short'}"
    )
    print(f"  composer {ours:.2f} ms, SDK {theirs:.2f} ms, medians of {ROUNDS}", file=sys.stderr)


if __name__ == "__main__":
    main()
