"""Train a small language model on a text, through the official tinker SDK, over HTTP.

    python docs/examples/demo.py [TEXT]

Every step's loss is composed of a base loss and three regularizers: a built-in one, a user's own,
and an async one. At the end the parameter gradient of the linearized loss, which is what a Tinker
server computes, is compared with autograd from end to end.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

import tinker
import torch
from demo_terms import rarity, smoothness

from tinker_custom_loss import Regularizer, forward_backward_custom
from tinker_custom_loss.sandbox import SandboxServer
from tinker_custom_loss.sandbox.examples import Examples
from tinker_custom_loss.sandbox.gradient_check import check_gradient
from tinker_custom_loss.terms import l2, nll

STEPS, SECONDS, SHOW_EVERY = 120, 40, 10
SEQUENCES, LENGTH = 16, 64
TOLERANCE = 1e-5

REGULARIZERS = [
    Regularizer(l2, 0.02, "l2", params={"reduction": "token_mean"}),
    Regularizer(smoothness, 0.05, "smoothness"),
    Regularizer(rarity, 0.2, "rarity"),
]


def base_loss(data, logprobs):
    """The mean negative log-likelihood of a token, in nats."""
    return nll(data, logprobs, reduction="token_mean")


def batch_of(text: bytes, rng: random.Random) -> list[tinker.Datum]:
    """Random pieces of the text; the target of each byte is the byte behind it."""
    starts = [rng.randrange(len(text) - LENGTH) for _ in range(SEQUENCES)]
    pieces = [list(text[start : start + LENGTH + 1]) for start in starts]
    return [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints(piece[:-1]),
            loss_fn_inputs={"target_tokens": piece[1:], "weights": [1.0] * LENGTH},
        )
        for piece in pieces
    ]


def show(step: int, metrics: dict) -> None:
    base = metrics["base_loss"]
    cells = [f"nll {base['value']:.3f} |∇| {base['grad_norm']:.3f}"]
    cells += [
        f"{name} {term['value']:.3f} → {term['contribution']:.3f} |∇| {term['grad_norm']:.3f}"
        for name, term in metrics["regularizers"].items()
    ]
    print(f"{step:4} {metrics['loss_total']:8.4f} = " + " + ".join(cells), flush=True)


def table(first: dict, last: dict) -> None:
    print(f"\n{'term':12}{'weight':>8}{'first':>10}{'last':>10}{'contribution':>14}{'|∇|':>10}")
    weights = {"nll": 1.0} | {n: term["weight"] for n, term in last["regularizers"].items()}
    start = {"nll": first["base_loss"]} | first["regularizers"]
    end = {"nll": last["base_loss"]} | last["regularizers"]
    for name, weight in weights.items():
        value, norm = end[name]["value"], end[name]["grad_norm"]
        print(
            f"{name:12}{weight:8.3f}{start[name]['value']:10.4f}{value:10.4f}"
            f"{weight * value:14.4f}{norm:10.4f}"
        )


def main() -> int:
    license_text = Path(__file__).parents[2] / "LICENSE"
    path = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("TEXT") or license_text)
    try:
        text = path.read_bytes()
    except OSError as error:
        print(f"{path} cannot be read: {error.strerror}", file=sys.stderr)
        return 2
    if len(text) <= LENGTH:
        print(f"{path} is too short: more than {LENGTH} bytes are needed", file=sys.stderr)
        return 2
    print(f"{path.name}: {len(text)} bytes; {SEQUENCES} pieces of {LENGTH} bytes a step")
    print("step, loss_total = value → contribution (weight · value), |∇| w.r.t. the logprobs\n")

    rng = random.Random(0)
    with SandboxServer(seed=0) as server:
        service = tinker.ServiceClient(base_url=server.url, api_key="tml-sandbox")
        client = service.create_lora_training_client("sandbox").result()
        seen: list[dict] = []
        started = time.monotonic()
        while len(seen) < STEPS and time.monotonic() - started < SECONDS:
            batch = batch_of(text, rng)
            step = forward_backward_custom(client, batch, base_loss, REGULARIZERS, step=len(seen))
            client.optim_step(tinker.AdamParams(learning_rate=0.01))
            seen.append(step.result().metrics)
            if len(seen) % SHOW_EVERY == 1:
                show(len(seen) - 1, seen[-1])
        client.optim_step(tinker.AdamParams(learning_rate=0.0)).result()  # all steps are done
        table(seen[0], seen[-1])

        data = batch_of(text, rng)
        check = check_gradient(
            server.model(client.model_id), Examples.from_datums(data), data, base_loss, REGULARIZERS
        )

    first, last = seen[0]["loss_total"], seen[-1]["loss_total"]
    difference = check.max_abs_difference
    print(f"\nloss {first:.4f} -> {last:.4f}, {len(seen)} steps, gradient check {difference:.1e}")
    return 0 if last < first and difference <= TOLERANCE else 1


if __name__ == "__main__":
    os.environ.setdefault("TINKER_TELEMETRY", "0")
    torch.set_num_threads(1)
    sys.exit(main())
