"""Train a model away from texts that contradict themselves, as an SMT solver finds.

The solver runs in a process of its own, beside everything else, and is ended if it takes too long.

    pip install '.[examples]'  # in a clone of this repository
    python docs/examples/smt_check.py
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import tinker
import torch
import z3
from tinker import types
from torch import Tensor

from tinker_custom_loss import with_regularizers
from tinker_custom_loss.sandbox import SandboxServer
from tinker_custom_loss.terms import nll

CLAIMS = ["a<b;b<c;a<c", "a<b;b<c;c<a", "x<y;y<x", "x<y;x<z", "p<q;q<r;r<p", "p<q;p<r;q<r"]


def is_contradictory(text: str) -> bool:
    """Whether no integers satisfy all of the comparisons in ``text``."""
    solver = z3.Solver()
    for smaller, larger in re.findall(r"(\w)<(\w)", text):
        solver.add(z3.Int(smaller) < z3.Int(larger))
    return bool(solver.check() == z3.unsat)


def contradictions(
    data: Sequence[types.Datum], logprobs: Sequence[Tensor]
) -> tuple[Tensor, dict[str, float]]:
    """The mean probability of the tokens of texts that contradict themselves.

    The verdict is a constant; the gradient is that of the probabilities, ``exp(logprob)``, which
    stop mattering as they approach 0.
    """
    verdicts = [is_contradictory(bytes(datum.model_input.to_ints()).decode()) for datum in data]
    probabilities = torch.stack([x.exp().mean() for x in logprobs])
    bad = torch.tensor(verdicts)
    others = probabilities[~bad].mean()
    loss = (probabilities * bad).sum() / bad.sum().clamp(min=1)
    return loss, {"contradictions": float(bad.sum()), "others": float(others.detach())}


def batch() -> list[types.Datum]:
    texts = [claim.encode() for claim in CLAIMS]
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(list(text)),
            loss_fn_inputs={"target_tokens": [*text[1:], ord(".")]},
        )
        for text in texts
    ]


def main(steps: int = 30) -> None:
    regularizer = {
        "fn": contradictions,
        "weight": 20.0,
        "name": "contradictions",
        "run_in_executor": "process",
        "timeout": 60,
    }
    base_loss = functools.partial(nll, reduction="token_mean")
    with SandboxServer(seed=0) as server:
        service = tinker.ServiceClient(base_url=server.url, api_key="tml-sandbox")
        client = with_regularizers(service.create_lora_training_client("sandbox").result())
        data = batch()
        for step in range(steps):
            future = client.forward_backward_custom(data, base_loss, [regularizer], step=step)
            client.optim_step(types.AdamParams(learning_rate=0.01))
            if step % 10 == 0 or step == steps - 1:
                term = future.result().metrics["regularizers"]["contradictions"]
                count, others = int(term["custom"]["contradictions"]), term["custom"]["others"]
                print(
                    f"step {step:3d}  probability of a token: {term['value']:.3f} in {count} "
                    f"contradictions, {others:.3f} elsewhere"
                )
        service.holder.close()


# Processes are started by importing this file: without the guard each would train as well.
if __name__ == "__main__":
    main()
