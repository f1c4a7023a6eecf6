"""What recording costs: ``recording_cost`` is a step of a demo-sized run that is recorded and keeps
its failures, over one of a run that is not. The two take turns, and it is the median of their
differences, step by step, that is compared.

    python tests/bench/recording.py [STEPS]
"""

from __future__ import annotations

import operator
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TINKER_TELEMETRY", "0")
sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "examples"))

import random

import demo
import tinker
import torch
from figures import detail, figure

from tinker_custom_loss import Recorder, flatten, with_regularizers
from tinker_custom_loss.sandbox import SandboxServer

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
TARGET = 1.02


def main() -> None:
    torch.set_num_threads(1)
    text = (Path(__file__).parents[2] / "LICENSE").read_bytes()
    rng = random.Random(0)
    seconds: dict[str, list[float]] = {"plain": [], "recorded": []}
    with SandboxServer(seed=0) as server, tempfile.TemporaryDirectory() as directory:
        service = tinker.ServiceClient(base_url=server.url, api_key="tml-sandbox")
        with Recorder(directory, keep="failures") as recorder:
            clients = {
                name: with_regularizers(
                    service.create_lora_training_client("sandbox").result(),
                    base_loss=demo.base_loss,
                    regularizers=demo.REGULARIZERS,
                    recorder=recorder if name == "recorded" else None,
                )
                for name in seconds
            }
            for step in range(STEPS):
                data = demo.batch_of(text, rng)
                for name in sorted(clients, reverse=bool(step % 2)):
                    started = time.perf_counter()
                    metrics = clients[name].forward_backward_custom(data).result().metrics
                    if name == "recorded":
                        recorder.log(flatten(metrics), step)
                    seconds[name].append(time.perf_counter() - started)
    steps = len(seconds["plain"]) - 10
    plain = statistics.median(seconds["plain"][10:])
    # Of each step by itself: what slows the machine for a while slows both.
    cost = statistics.median(map(operator.sub, seconds["recorded"][10:], seconds["plain"][10:]))
    detail(
        f"recording_cost: plain {plain * 1e3:.2f} ms, recording {cost * 1e3:+.3f} ms, "
        f"medians of {steps}"
    )
    figure("recording_cost", 1 + cost / plain, TARGET)


if __name__ == "__main__":
    main()
