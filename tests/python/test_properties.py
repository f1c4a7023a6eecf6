"""Whatever the composition: its gradient is that of the same loss written as one function."""

from __future__ import annotations

import asyncio
import functools
import random
import time

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinker_custom_loss import Composer

PLACES = ("inline", "async", "thread", "process")


def late(rank):
    """Make terms end in a random order, whatever the order in which they were given."""
    time.sleep(rank / 500)


def curvature(data, logprobs, *, scale, rank):
    late(rank)
    return scale * sum(x.square().sum() for x in logprobs), {}


def entropy_like(data, logprobs, *, scale, rank):
    late(rank)
    return scale * sum((x.exp() * x).sum() for x in logprobs), {}


def across_datums(data, logprobs, *, scale, rank):
    late(rank)
    means = torch.stack([x.mean() for x in logprobs])
    return scale * (means - means.mean()).square().sum() + means[0].square(), {}


def last_datum_only(data, logprobs, *, scale, rank):
    late(rank)
    return scale * torch.logsumexp(logprobs[-1].flatten(), 0), {}


TERMS = (curvature, entropy_like, across_datums, last_datum_only)


def asynchronous(fn):
    async def term(data, logprobs, *, scale, rank):
        await asyncio.sleep(rank / 500)
        return fn(data, logprobs, scale=scale, rank=0)

    return term


sizes = st.integers(1, 6)
shapes = st.lists(st.one_of(st.tuples(sizes), st.tuples(sizes, sizes)), min_size=1, max_size=5)
weights = st.floats(-3, 3, allow_nan=False, width=32)
terms = st.lists(
    st.tuples(
        st.sampled_from(TERMS),
        weights,
        st.sampled_from(PLACES),
        st.floats(0.25, 2, width=32),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=4,
)


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(shapes, terms, st.sampled_from([None, *TERMS]), st.integers(0, 2**16))
def test_the_composed_gradient_is_the_monolithic_one(shapes, terms, base, seed):
    generator = torch.Generator().manual_seed(seed)
    logprobs = [-torch.rand(shape, generator=generator) * 5 for shape in shapes]
    base = base and functools.partial(base, scale=0.5, rank=0)
    regularizers = [
        {
            "fn": asynchronous(fn) if place == "async" else fn,
            "weight": weight,
            "name": f"{index}-{fn.__name__}",
            "params": {"scale": scale, "rank": rank},
            "run_in_executor": {"thread": True, "process": "process"}.get(place, False),
        }
        for index, (fn, weight, place, scale, rank) in enumerate(terms)
    ]
    random.Random(seed).shuffle(regularizers)

    composer = Composer(base, regularizers)
    composition = composer.compute([None] * len(shapes), logprobs)

    leaves = [x.clone().double().requires_grad_() for x in logprobs]
    loss = sum(
        weight * fn(None, leaves, scale=scale, rank=0)[0] for fn, weight, _, scale, _ in terms
    )
    if base is not None:
        loss = loss + base(None, leaves)[0]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    # Relative to what was added up: terms of opposite sign may cancel almost entirely.
    telemetry = composition.telemetry
    scale = sum(record["grad_norm_weighted"] for record in telemetry["regularizers"].values())
    if base is not None:
        scale += telemetry["base_loss"]["grad_norm"]
    difference = torch.cat(
        [(got - want).flatten() for got, want in zip(composition.gradients, gradients, strict=True)]
    )
    assert float(difference.norm()) <= 1e-6 * scale
    again = composer.compute([None] * len(shapes), logprobs)
    assert torch.equal(again.gradient.flat, composition.gradient.flat)
