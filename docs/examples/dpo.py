"""Direct preference optimization on this machine: small letters are preferred to capitals.

    python docs/examples/dpo.py

The loss is the term "dpo" over pairs of a chosen and a rejected answer. Two regularizers keep the
model from winning by forgetting both: the likelihood of the chosen answers, and the squared log
ratio to the start. A third of the pairs is held out.

The run is recorded in runs/dpo. Exits with 1 if the margin or the accuracy of the pairs that were
held out does not rise.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from typing import Any

import numpy as np
import tinker
import torch
from tinker import types

from tinker_custom_loss import Composer, Recorder, flatten, live, with_regularizers
from tinker_custom_loss.sandbox import SandboxServer

PROMPT = b"Write: "
WORDS = [
    *("apple", "bread", "cloud", "dance", "earth", "flame", "grape", "honey", "image", "juice"),
    *("knife", "lemon", "music", "night", "ocean", "piano", "quiet", "river", "stone", "table"),
    *("uncle", "voice", "water", "youth"),
]
STEPS, PAIRS = 40, 8

DPO = {"fn": "dpo", "params": {"beta": 0.1}, "reduction": "sequence_mean_token_mean"}
REGULARIZERS = [
    {"fn": "nll", "weight": 0.002, "name": "likelihood", "params": {"weights": "liked"}},
    {
        "fn": "proximal",
        "weight": 0.0005,
        "name": "ratio",
        "params": {"sampler": "reference_logprobs"},
    },
]


def answer(text: str) -> types.Datum:
    """An answer to the prompt, as the server takes it; the prompt's tokens have weight 0."""
    tokens = list(PROMPT + text.encode())
    weights = [0.0] * (len(PROMPT) - 1) + [1.0] * len(text)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": np.array(tokens[1:]),
            "weights": np.array(weights, dtype=np.float32),
        },
    )


def logprobs_of(client: Any, answers: list[types.Datum]) -> list[torch.Tensor]:
    """Those of the model as it is; no gradient comes of it."""
    outputs = client.forward(answers, "cross_entropy").result().loss_fn_outputs
    return [output["logprobs"].to_torch() for output in outputs]


class Pairs:
    """Pairs of answers, the chosen one first, with their logprobs at the start."""

    def __init__(self, client: Any, words: list[str]) -> None:
        self.answers = [answer(text) for word in words for text in (word, word.upper())]
        self.data = []
        reference = logprobs_of(client, self.answers)
        for i, (each, logprobs) in enumerate(zip(self.answers, reference, strict=True)):
            chosen = i % 2 == 0
            more = {
                "group": types.TensorData.from_numpy(np.array([i // 2])),
                "chosen": types.TensorData.from_numpy(np.array([int(chosen)])),
                "reference_logprobs": types.TensorData.from_torch(logprobs),
                # Only the chosen one is to be likely in itself.
                "liked": types.TensorData.from_torch(
                    each.loss_fn_inputs["weights"].to_torch() * chosen
                ),
            }
            inputs = {**each.loss_fn_inputs, **more}
            self.data.append(types.Datum(model_input=each.model_input, loss_fn_inputs=inputs))

    def sample(self, rng: random.Random) -> list[types.Datum]:
        """Some pairs: both answers of each."""
        chosen = rng.sample(range(len(self.data) // 2), PAIRS)
        return [datum for i in chosen for datum in self.data[2 * i : 2 * i + 2]]

    def judged(self, client: Any) -> tuple[float, float]:
        """The mean margin, and the share of pairs whose margin is above 0."""
        record = Composer(DPO).compute(self.data, logprobs_of(client, self.answers)).record
        assert record["base_loss"] is not None
        custom = record["base_loss"]["custom"]
        return custom["margin"], custom["accuracy"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("TINKER_TELEMETRY", "0")
    torch.set_num_threads(1)
    rng = random.Random(options.seed)
    with (
        SandboxServer(seed=options.seed) as sandbox,
        Recorder("runs/dpo", overwrite=True) as recorder,
    ):
        service = tinker.ServiceClient(base_url=sandbox.url, api_key="tml-sandbox")
        client = with_regularizers(
            service.create_lora_training_client("sandbox").result(),
            base_loss=DPO,
            regularizers=REGULARIZERS,
            recorder=recorder,
        )
        training = Pairs(client, [word for i, word in enumerate(WORDS) if i % 3])
        held_out = Pairs(client, WORDS[::3])
        with live(recorder, total=options.steps):
            for step in range(options.steps):
                future = client.forward_backward_custom(training.sample(rng))
                client.optim_step(types.AdamParams(learning_rate=0.005)).result()
                recorder.log(flatten(future.result().record), step)
        margin, accuracy = held_out.judged(client)

    checks = {  # both are 0 at the start, where the model is the reference
        f"the margin of pairs that were held out rises to {margin:.3f}": margin > 0.5,
        f"the accuracy of pairs that were held out rises to {accuracy:.0%}": accuracy >= 0.9,
    }
    print()
    for sentence, held in checks.items():
        print(f"{'yes' if held else 'NO ':>5}  {sentence}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
