"""A step in several calls through the port, where totals and records cross two codecs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from port_client import PortClient, batch
from splits import made_up, splits
from tinker_custom_loss import flatten, merge


@pytest.fixture(scope="module")
def port():
    with PortClient() as client:
        yield client


def through(port, split, indices, op="compute", **fields):
    """The answer of a real worker about some of the datums of a split."""
    data, logprobs = made_up(split.sizes, split.alternatives)
    keys = data[0].loss_fn_inputs
    inputs = {
        key: batch(*(torch.as_tensor(data[i].loss_fn_inputs[key]) for i in indices)) for key in keys
    }
    if op == "compute":
        fields["logprobs"] = batch(*(logprobs[i] for i in indices))
    base, *others = zip(split.cases, split.reductions, split.weights, strict=True)
    terms = [
        {
            "fn": case.name,
            "name": f"term {i}",
            "weight": weight,
            "params": case.params,
            "reduction": reduction,
        }
        for i, (case, reduction, weight) in enumerate(others)
    ]
    base_loss = {"fn": base[0].name, "params": base[0].params, "reduction": base[1]}
    reply = port.ask(
        op,
        data={"count": len(indices), "inputs": inputs},
        base_loss=base_loss,
        regularizers=terms,
        **fields,
    )
    assert reply["op"] == "result", reply
    return reply


@settings(max_examples=25)
@given(split=splits())
def test_through_the_port_the_parts_have_the_gradient_of_the_whole(port, split):
    everything = list(range(sum(map(len, split.parts))))
    whole = through(port, split, everything)
    totals = through(port, split, everything, "totals")["totals"]
    replies = [through(port, split, part, totals=totals) for part in split.parts]
    got = {}
    for indices, reply in zip(split.parts, replies, strict=True):
        got |= dict(zip(indices, reply["gradients"], strict=True))
    joined = torch.cat([got[i].reshape(-1) for i in everything])
    want = torch.cat([x.reshape(-1) for x in whole["gradients"]])
    error = torch.linalg.vector_norm(joined - want)
    assert error <= 1e-6 * torch.linalg.vector_norm(want) + 1e-12
    merged, record = flatten(merge([r["record"] for r in replies])), flatten(whole["record"])
    for key in record:
        if not key.endswith("seconds"):
            assert merged[key] == pytest.approx(record[key], rel=1e-6, abs=1e-9), key
