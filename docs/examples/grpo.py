"""GRPO from end to end on this machine: the server's own loss, with regularizers added to it.

    python docs/examples/grpo.py

The model that is trained is sampled; a reward that a program can check asks for vowels. Tinker's
importance_sampling is the loss, by name. Three regularizers ride along: the KL to the start, the
entropy, and a reward model behind HTTP, asked while the step waits for nothing else. Half-way the
run is saved, resumed by a second client, and must go on to the very same parameters.

Exits with 1 if the reward does not rise, the KL leaves its bounds, or the resumed run differs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import tinker
import torch
from tinker import types

from tinker_custom_loss import with_regularizers
from tinker_custom_loss.sandbox import SandboxServer

PROMPT = list(b"Sing: ")
BEFORE = len(PROMPT) - 1  # of the targets, those that are prompt
LENGTH = 12
GROUP = 16
VOWELS = frozenset(b"aeiou")
KL_BOUND = 60.0  # nats a sequence, by k2


def reward(tokens: list[int]) -> float:
    """Vowels, of the LENGTH that there may be: anyone can check it."""
    return sum(token in VOWELS for token in tokens) / LENGTH


class RewardModel(BaseHTTPRequestHandler):
    """A model of what people like, which is far away: here, that nothing is said twice."""

    def do_POST(self) -> None:
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        scores = [1 - len(set(text)) / len(text) for text in texts]
        body = json.dumps(scores).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def dull(url: str) -> Any:
    """An async term: sequences that the reward model finds dull become less likely."""

    async def dullness(
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
        return (advantages * sums).mean(), {"dullness": float(scores.mean())}

    return dullness


def rollouts(client: Any, start: Any, step: int) -> tuple[list[types.Datum], list[float]]:
    """A group of samples of the model as it is, with group-relative advantages."""
    sampler = client.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=LENGTH, temperature=1.0, seed=step)
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


def train(client: Any, start: Any, steps: range, say: bool) -> list[dict[str, float]]:
    """The loop. ``mask`` and ``reference_logprobs`` are for the terms and stay here."""
    history = []
    for step in steps:
        data, rewards = rollouts(client, start, step)
        future = client.forward_backward(data, "importance_sampling", step=step)
        client.optim_step(types.AdamParams(learning_rate=0.02)).result()
        terms = future.result().record["regularizers"]
        row = {
            "reward": float(np.mean(rewards)),
            "kl": terms["kl"]["value"] / len(data),
            "entropy": terms["entropy"]["custom"]["entropy"] / len(data) / LENGTH,
            "dull": terms["dull"]["custom"]["dullness"],
        }
        history.append(row)
        if say and step % 5 == 0:
            print(f"{step:5d}  " + "  ".join(f"{value:8.3f}" for value in row.values()))
    return history


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    os.environ.setdefault("TINKER_TELEMETRY", "0")
    torch.set_num_threads(1)
    model = ThreadingHTTPServer(("127.0.0.1", 0), RewardModel)
    threading.Thread(target=model.serve_forever, daemon=True).start()
    regularizers = [
        {"fn": "kl", "weight": 0.02, "name": "kl"},
        {"fn": "entropy", "weight": 0.002, "name": "entropy"},
        {"fn": dull(f"http://127.0.0.1:{model.server_port}"), "weight": 0.01, "name": "dull"},
    ]
    half = steps // 2
    with SandboxServer(seed=0) as sandbox:
        service = tinker.ServiceClient(base_url=sandbox.url, api_key="tml-sandbox")
        client = with_regularizers(
            service.create_lora_training_client("sandbox", seed=0).result(),
            regularizers=regularizers,
        )
        start = client.save_weights_and_get_sampling_client().result()
        names = ("reward", "kl", "entropy", "dull")
        print(f"{'step':>5}  " + "  ".join(f"{name:>8}" for name in names))
        history = train(client, start, range(half), say=True)
        checkpoint = client.save_state("half-way").result().path
        history += train(client, start, range(half, steps), say=True)

        print("\nThe second half again, resumed from the checkpoint:")
        resumed = with_regularizers(
            service.create_training_client_from_state_with_optimizer(checkpoint).result(),
            regularizers=regularizers,
        )
        train(resumed, start, range(half, steps), say=False)
        same = torch.equal(
            sandbox.parameters(client.model_id), sandbox.parameters(resumed.model_id)
        )
    model.shutdown()
    model.server_close()
    few = max(1, min(5, half))
    rewards = [row["reward"] for row in history]
    first, last = float(np.mean(rewards[:few])), float(np.mean(rewards[-few:]))
    worst = max(row["kl"] for row in history)
    checks = {
        f"the reward rises: {first:.3f} to {last:.3f}": last > first,
        f"the KL stays below {KL_BOUND:.0f} nats a sequence: {worst:.2f}": worst < KL_BOUND,
        "the resumed run has the same parameters, bit for bit": same,
    }
    for sentence, held in checks.items():
        print(f"{'yes' if held else 'NO ':>5}  {sentence}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
