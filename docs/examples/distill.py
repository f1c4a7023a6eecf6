"""On-policy distillation on this machine: a student writes, a teacher says how it goes on.

    python docs/examples/distill.py

First the teacher is trained on a text. Then a student that knows nothing is sampled; at every
token of what it wrote, the teacher names the tokens that it would rather have, and how likely each
is. The term "distill" is the reverse KL over these and the rest, with an entropy bonus beside it so
that the student does not settle on the first words that please.

The run is recorded in runs/distill. Exits with 1 if the reverse KL does not fall to less than half.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
from typing import Any

import numpy as np
import tinker
import torch
from tinker import types

from tinker_custom_loss import Recorder, flatten, live, with_regularizers
from tinker_custom_loss.sandbox import SandboxServer

TEXT = b"the cat sat on the mat and the dog sat on the log. " * 4
PROMPT = list(b"the ")
BEFORE = len(PROMPT) - 1  # of the targets, those that are prompt
LENGTH, GROUP, ALTERNATIVES = 12, 12, 8
STEPS = 30

BASE = {"fn": "distill", "params": {"direction": "reverse"}, "reduction": "token_mean"}
ENTROPY = {"fn": "entropy", "weight": 0.02, "reduction": "token_mean"}


def taught(client: Any, rng: random.Random) -> Any:
    """A sampler of the teacher, who has learnt the text by the server's own loss."""
    for _ in range(30):
        data = []
        for start in rng.sample(range(len(TEXT) - LENGTH), GROUP):
            tokens = list(TEXT[start : start + LENGTH + 1])
            inputs = {"target_tokens": tokens[1:], "weights": [1.0] * LENGTH}
            model_input = types.ModelInput.from_ints(tokens[:-1])
            data.append(types.Datum(model_input=model_input, loss_fn_inputs=inputs))
        client.forward_backward(data, "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=0.01)).result()
    return client.save_weights_and_get_sampling_client().result()


def written(client: Any, teacher: Any, seed: int) -> list[types.Datum]:
    """What the student writes as it is, with the teacher's alternatives to each token."""
    sampler = client.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=LENGTH, temperature=1.0, seed=seed)
    answer = sampler.sample(types.ModelInput.from_ints(PROMPT), GROUP, params).result()
    texts = [PROMPT + list(sequence.tokens) for sequence in answer.sequences]
    reads = types.SamplingParams(max_tokens=1)  # it has to write one, too
    futures = [
        teacher.sample(
            types.ModelInput.from_ints(text),
            1,
            reads,
            include_prompt_logprobs=True,
            topk_prompt_logprobs=ALTERNATIVES,
        )
        for text in texts
    ]
    data = []
    for text, future in zip(texts, futures, strict=True):
        alternatives = np.array(future.result().topk_prompt_logprobs[1:])  # [T,K,2]
        mask = [0.0] * BEFORE + [1.0] * (len(text) - len(PROMPT))
        data.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(text[:-1]),
                loss_fn_inputs={
                    "target_tokens": alternatives[..., 0].astype(np.int64),
                    "teacher_logprobs": alternatives[..., 1].astype(np.float32),
                    "mask": np.array(mask, dtype=np.float32),
                },
            )
        )
    return data


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("TINKER_TELEMETRY", "0")
    torch.set_num_threads(1)
    divergences: list[float] = []
    with (
        SandboxServer(seed=options.seed) as sandbox,
        Recorder("runs/distill", overwrite=True) as recorder,
    ):
        service = tinker.ServiceClient(base_url=sandbox.url, api_key="tml-sandbox")
        teacher = taught(
            service.create_lora_training_client("sandbox").result(), random.Random(options.seed)
        )
        client = with_regularizers(
            service.create_lora_training_client("sandbox").result(),
            base_loss=BASE,
            regularizers=[ENTROPY],
            recorder=recorder,
        )
        with live(recorder, total=options.steps):
            for step in range(options.steps):
                data = written(client, teacher, options.seed * options.steps + step)
                future = client.forward_backward_custom(data)
                client.optim_step(types.AdamParams(learning_rate=0.01)).result()
                record = future.result().record
                recorder.log(flatten(record), step)
                divergences.append(record["base_loss"]["value"])

    few = max(1, min(5, options.steps // 2))
    first, last = statistics.fmean(divergences[:few]), statistics.fmean(divergences[-few:])
    held = last < first / 2
    print(
        f"\n{'yes' if held else 'NO ':>5}  the reverse KL falls to less than half: "
        f"{first:.2f} to {last:.2f} nats a token, in the mean of {few} steps"
    )
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
