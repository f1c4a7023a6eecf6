"""GRPO from end to end on this machine: the server's own loss, with regularizers added to it.

    python docs/examples/grpo.py

The model that is trained is sampled; a reward that a program can check asks for small letters.
Tinker's importance_sampling is the loss, by name. Three regularizers ride along: the KL to the
start, an entropy bonus that fades, and a reward model behind HTTP. Half-way the run is saved,
resumed by a second client, and must go on to the very same parameters.

The run is recorded in runs/grpo. Exits with 1 if the reward does not rise, the KL leaves its
bounds, or the resumed run differs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import tinker
import torch
from tinker import types

from tinker_custom_loss import Recorder, flatten, live, with_regularizers
from tinker_custom_loss.sandbox import SandboxServer

PROMPT = list(b"Sing: ")
BEFORE = len(PROMPT) - 1  # of the targets, those that are prompt
LENGTH = 12
GROUP = 32
STEPS = 60
LETTERS, READABLE = frozenset(b"abcdefghijklmnopqrstuvwxyz"), range(32, 127)
RISE = 0.1  # of the reward, in STEPS, from 0.05 of chance; five seeds rose by 0.19 to 0.37
KL_BOUND = 40.0  # nats a sequence, by k2; five seeds came to at most 31


def reward(tokens: list[int]) -> float:
    """Small letters, of the LENGTH that there may be: anyone can check it."""
    return sum(token in LETTERS for token in tokens) / LENGTH


class RewardModel(BaseHTTPRequestHandler):
    """A model of what people like, which is far away: here, what they can read."""

    def do_POST(self) -> None:
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        scores = [sum(token in READABLE for token in text) / len(text) for text in texts]
        body = json.dumps(scores).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def liked(url: str) -> Any:
    """An async term: what the reward model likes becomes more likely."""

    async def liked(
        data: list[types.Datum], logprobs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        texts = [datum.loss_fn_inputs["target_tokens"].tolist()[BEFORE:] for datum in data]
        request = urllib.request.Request(url, json.dumps(texts).encode())

        def ask() -> list[float]:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return json.load(answer)  # type: ignore[no-any-return]

        scores = torch.tensor(await asyncio.to_thread(ask))
        advantages = scores - scores.mean()
        sums = torch.stack([each[BEFORE:].sum() for each in logprobs])
        return -(advantages * sums).sum(), {"score": float(scores.mean())}

    return liked


def rollouts(client: Any, start: Any, seed: int) -> tuple[list[types.Datum], list[float]]:
    """A group of samples of the model as it is, with group-relative advantages."""
    sampler = client.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=LENGTH, temperature=1.0, seed=seed)
    prompt = types.ModelInput.from_ints(PROMPT)
    sequences = sampler.sample(prompt, GROUP, params).result().sequences
    rewards = [reward(list(sequence.tokens)) for sequence in sequences]
    scale = max(float(np.std(rewards)), 1e-3)
    futures = [
        start.compute_logprobs(types.ModelInput.from_ints(PROMPT + list(sequence.tokens)))
        for sequence in sequences
    ]
    data = []
    for sequence, future, value in zip(sequences, futures, rewards, strict=True):
        tokens = PROMPT + list(sequence.tokens)
        advantage = (value - float(np.mean(rewards))) / scale / LENGTH

        def column(values: Any) -> np.ndarray[Any, Any]:
            return np.concatenate([np.zeros(BEFORE), np.asarray(values)]).astype(np.float32)

        data.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(tokens[:-1]),
                loss_fn_inputs={
                    "target_tokens": np.array(tokens[1:]),
                    "logprobs": column(sequence.logprobs),
                    "advantages": column([advantage] * len(sequence.tokens)),
                    "mask": column([1.0] * len(sequence.tokens)),
                    "reference_logprobs": column(future.result()[BEFORE + 1 :]),
                },
            )
        )
    return data, rewards


def train(client: Any, start: Any, seeds: range, log: Any) -> None:
    """The loop. ``mask`` and ``reference_logprobs`` are for the terms and stay here."""
    for seed in seeds:
        data, rewards = rollouts(client, start, seed)
        future = client.forward_backward(data, "importance_sampling")
        client.optim_step(types.AdamParams(learning_rate=0.01)).result()
        record = future.result().record
        kl = record["regularizers"]["kl"]["value"] / len(data)
        log({**flatten(record), "reward": statistics.fmean(rewards), "kl": kl})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    steps, half, seed = options.steps, options.steps // 2, options.seed
    os.environ.setdefault("TINKER_TELEMETRY", "0")
    torch.set_num_threads(1)
    model = ThreadingHTTPServer(("127.0.0.1", 0), RewardModel)
    threading.Thread(target=model.serve_forever, daemon=True).start()
    regularizers = [
        {"fn": "kl", "weight": 0.02},
        {"fn": "entropy", "weight": lambda step: 0.002 * max(0.0, 1 - step / steps)},
        {"fn": liked(f"http://127.0.0.1:{model.server_port}"), "weight": 0.05},
    ]
    seeds = range(seed * steps, (seed + 1) * steps)
    history: list[dict[str, float]] = []
    with (
        SandboxServer(seed=seed) as sandbox,
        Recorder("runs/grpo", overwrite=True) as recorder,
        live(recorder, total=steps),
    ):

        def log(metrics: dict[str, float]) -> None:
            recorder.log(metrics, len(history))
            history.append(metrics)

        service = tinker.ServiceClient(base_url=sandbox.url, api_key="tml-sandbox")
        bare = service.create_lora_training_client("sandbox").result()
        client = with_regularizers(bare, regularizers=regularizers, recorder=recorder)
        start = client.save_weights_and_get_sampling_client().result()
        train(client, start, seeds[:half], log)
        checkpoint = client.save_state("half-way").result().path
        train(client, start, seeds[half:], log)

        # The second half again, of which nothing is logged. The schedule goes on where it was.
        bare = service.create_training_client_from_state_with_optimizer(checkpoint).result()
        resumed = with_regularizers(bare, regularizers=regularizers, first_step=half)
        train(resumed, start, seeds[half:], lambda metrics: None)
        parameters = [sandbox.parameters(each.model_id) for each in (client, resumed)]
    model.shutdown()
    model.server_close()

    few = max(1, min(5, half))
    first, last = (
        statistics.fmean(row["reward"] for row in rows) for rows in (history[:few], history[-few:])
    )
    worst = max(row["kl"] for row in history)
    rise = RISE * steps / STEPS
    means = f"{first:.3f} to {last:.3f}, in the mean of {few} steps"
    checks = {
        f"the reward rises by {rise:.2f} or more: {means}": last - first >= rise,
        f"the KL stays below {KL_BOUND:.0f} nats a sequence: {worst:.2f}": worst < KL_BOUND,
        "the resumed run has the same parameters, bit for bit": torch.equal(*parameters),
    }
    print()
    for sentence, held in checks.items():
        print(f"{'yes' if held else 'NO ':>5}  {sentence}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
