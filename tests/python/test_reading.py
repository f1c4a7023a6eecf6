"""What the terms of one composition read of the datums: once a step, and anew in the next."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from tinker_custom_loss import Composer, Regularizer, term


class Counted:
    """An array of a datum that counts how often it is read."""

    def __init__(self, *values):
        self.tensor, self.reads = torch.tensor(values), 0

    def to_torch(self):
        self.reads += 1
        return self.tensor


def composition(place):
    inputs = {
        "weights": Counted(1.0, 0.0, 1.0),
        "reference_logprobs": Counted(-1.0, -2.0, -1.0),
    }
    terms = [
        {"fn": "kl", "name": name, "weight": 1.0, "reduction": reduction, "run_in_executor": place}
        for name, reduction in (("a", "token_sum"), ("b", "token_mean"), ("c", "token_sum"))
    ]
    return inputs, Composer("nll", terms)


@pytest.mark.parametrize("place", [False, True], ids=["inline", "in threads"])
class TestTermsOfOneStep:
    def test_read_each_array_once(self, place):
        inputs, composer = composition(place)
        composer.compute([SimpleNamespace(loss_fn_inputs=inputs)], [torch.full((3,), -3.0)])
        assert {key: array.reads for key, array in inputs.items()} == dict.fromkeys(inputs, 1)

    def test_see_what_changed_since_the_step_before(self, place):
        inputs, composer = composition(place)
        data, logprobs = [SimpleNamespace(loss_fn_inputs=inputs)], [torch.full((3,), -3.0)]
        assert composer.compute(data, logprobs).gradients[0][1] == 0.0
        inputs["weights"].tensor[:] = torch.tensor([0.0, 1.0, 0.0])
        inputs["reference_logprobs"].tensor[:] = -3.0
        assert composer.compute(data, logprobs).gradients[0].tolist() == [0.0, -1.0, 0.0]


def test_terms_in_threads_compute_at_the_same_time():
    both = threading.Barrier(2, timeout=10)

    @term(scope="token")
    def meeting(logprob):
        both.wait()
        return -logprob

    terms = [Regularizer(meeting, 1.0, name, run_in_executor=True) for name in ("a", "b")]
    composition = Composer(None, terms).compute([None], [torch.tensor([-1.0, -2.0])])
    assert composition.loss_total == 6.0
