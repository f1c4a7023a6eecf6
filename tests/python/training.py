"""Batches and losses with which tests train the sandbox's model."""

from __future__ import annotations

import threading

import numpy as np
import tinker
import torch
from tinker import types

SDK = tuple(int(part) for part in tinker.__version__.split(".")[:2])
# With the usual eps of 1e-8 Adam would turn gradients that are rounding errors into full steps.
ADAM = types.AdamParams(learning_rate=0.01, weight_decay=0.01, grad_clip_norm=1.0, eps=1e-5)
# A step of 1000 times the gradient, beside which the parameters from before are nothing: Adam's own
# first step is the sign of the gradient, in which a wrong size would not be seen.
ALONG_THE_GRADIENT = types.AdamParams(learning_rate=1e9, eps=1e6)
TEXT = b"the quick brown fox jumps over the lazy dog, and the dog does not mind. " * 4


def datums(count=4, alternatives=True, **arrays):
    """Texts of different length; of every third, two alternatives at each position ([T,2]).

    Each entry of ``arrays`` is a function from the shape of a datum's targets to an array.
    """
    data = []
    for i in range(count):
        row = TEXT[5 * i : 5 * i + 10 + i]
        targets = np.array(list(row[1:]), dtype=np.int64)
        if alternatives and i % 3 == 2:
            targets = np.stack([targets, (targets + 1) % 256], axis=1)
        inputs = {"target_tokens": targets}
        inputs["weights"] = np.linspace(0.1, 1, targets.size, dtype=np.float32).reshape(
            targets.shape
        )
        inputs |= {key: make(targets.shape) for key, make in arrays.items()}
        data.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(list(row[:-1])), loss_fn_inputs=inputs
            )
        )
    return data


def weighted_nll(data, logprobs):
    weights = [datum.loss_fn_inputs["weights"].to_torch() for datum in data]
    loss = sum((-each * weight).sum() for each, weight in zip(logprobs, weights, strict=True))
    return loss, {"datums": float(len(data))}


def squares(data, logprobs):
    return sum(each.square().sum() for each in logprobs), {}


def spread(data, logprobs):
    return torch.stack([each.exp().mean() for each in logprobs]).var(), {}


def parameters_after(steps, sandbox, client, step):
    """The model's parameters once ``step(client, i)`` and an optimizer step ran ``steps`` times."""
    for i in range(steps):
        step(client, i).result(60)
        client.optim_step(ADAM).result(60)
    return sandbox.parameters(client.model_id)


def assert_same_parameters(got, want):
    """Equal to 1e-6, relative to their norm."""
    error = torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want)
    assert error <= 1e-6, f"relative error {error:.2e}"


class Gate:
    """A term that waits at a gate, so that the calls behind it queue up."""

    def __init__(self):
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, data, logprobs):
        self.reached.set()
        assert self.open.wait(60)
        return squares(data, logprobs)

    def term(self):
        return {"fn": self, "weight": 1.0, "name": "gate"}
