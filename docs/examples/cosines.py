"""The cosine of two terms' gradients, with respect to the logprobs and to the parameters.

    python docs/examples/cosines.py

On the sandbox's model, before and after it has learned a little from this package's licence.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from demo import base_loss, batch_of
from demo_terms import smoothness

from tinker_custom_loss import Composer
from tinker_custom_loss.sandbox.examples import Examples
from tinker_custom_loss.sandbox.model import AdamParams, LanguageModel


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.cosine_similarity(one.flatten(), other.flatten(), dim=0))


def main() -> None:
    torch.set_num_threads(1)
    text = (Path(__file__).parents[2] / "LICENSE").read_bytes()
    rng, model = random.Random(0), LanguageModel(seed=0)
    for step in range(101):
        data = batch_of(text, rng)
        examples = Examples.from_datums(data)
        logprobs = model.forward(examples).logprobs
        if step in (0, 100):
            on_logprobs, on_parameters = [], []
            for term in (base_loss, smoothness):
                gradient = Composer(term).compute(data, logprobs).gradient
                on_logprobs.append(gradient.flat)
                model.zero_gradients()
                model.forward_backward(examples.weighted(gradient.with_flat(-gradient.flat)))
                on_parameters.append(model.gradient_flat().clone())
            model.zero_gradients()
            print(
                f"step {step}: nll against smoothness, cosine {cosine(*on_logprobs):+.2f} on the "
                f"logprobs, {cosine(*on_parameters):+.2f} on the parameters"
            )
        gradient = Composer(base_loss).compute(data, logprobs).gradient
        model.forward_backward(examples.weighted(gradient.with_flat(-gradient.flat)))
        model.optim_step(AdamParams(learning_rate=0.01))


if __name__ == "__main__":
    main()
