"""Train a small language model on a text, through the official tinker SDK, over HTTP.

    python docs/examples/demo.py [TEXT]

The run is recorded in runs/demo; python -m tinker_custom_loss report runs/demo makes a page of it.

Every step's loss is composed of a base loss and four regularizers: a catalogue term, and three of
demo_terms.py, one written with @term and one async. At the end the parameter gradient of the
linearized loss, which is what a Tinker server computes, is compared with autograd from end to end.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

import tinker
import torch
from demo_terms import rarity, smoothness, surprise

from tinker_custom_loss import Recorder, Regularizer, flatten, live, with_regularizers
from tinker_custom_loss.sandbox import SandboxServer
from tinker_custom_loss.sandbox.examples import Examples
from tinker_custom_loss.sandbox.gradient_check import check_gradient
from tinker_custom_loss.terms import l2, nll

STEPS, SECONDS = 120, 40
SEQUENCES, LENGTH = 16, 64
TOLERANCE = 1e-5

REGULARIZERS = [
    Regularizer(l2, 0.02, "l2", params={"reduction": "token_mean"}),
    Regularizer(surprise, 0.1, "surprise", params={"reduction": "token_mean"}),
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
    print(f"{path.name}: {len(text)} bytes; {SEQUENCES} pieces of {LENGTH} bytes a step\n")

    rng = random.Random(0)
    losses: list[float] = []
    with SandboxServer(seed=0) as server, Recorder("runs/demo", overwrite=True) as recorder:
        service = tinker.ServiceClient(base_url=server.url, api_key="tml-sandbox")
        client = with_regularizers(
            service.create_lora_training_client("sandbox").result(),
            base_loss=base_loss,
            regularizers=REGULARIZERS,
            recorder=recorder,
        )
        started = time.monotonic()
        with live(recorder, total=STEPS):
            while len(losses) < STEPS and time.monotonic() - started < SECONDS:
                step = client.forward_backward_custom(batch_of(text, rng))
                client.optim_step(tinker.AdamParams(learning_rate=0.01))
                metrics = step.result().metrics
                recorder.log(flatten(metrics), len(losses))
                losses.append(metrics["loss_total"])
        client.optim_step(tinker.AdamParams(learning_rate=0.0)).result()  # all steps are done

        data = batch_of(text, rng)
        check = check_gradient(
            server.model(client.model_id), Examples.from_datums(data), data, base_loss, REGULARIZERS
        )

    first, last = losses[0], losses[-1]
    difference = check.max_abs_difference
    print(f"\nloss {first:.4f} -> {last:.4f}, {len(losses)} steps, gradient check {difference:.1e}")
    return 0 if last < first and difference <= TOLERANCE else 1


if __name__ == "__main__":
    os.environ.setdefault("TINKER_TELEMETRY", "0")
    torch.set_num_threads(1)
    sys.exit(main())
