"""Whatever the composition: its gradient is that of the same loss written as one function.

The same examples in every run of the tests; `make properties` draws thousands of new ones.
"""

from __future__ import annotations

import asyncio
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from property_terms import FORMULAS, PLACES, Drawn, Linked, Shared
from tinker_custom_loss import Composer, TermError

sizes = st.integers(1, 6)
shapes = st.one_of(st.tuples(sizes), st.tuples(sizes, sizes))
dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
datums = st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=5)
finite = st.floats(-3, 3, allow_nan=False, width=32)


def terms(faults):
    return st.lists(
        st.builds(
            Drawn,
            formula=st.sampled_from(FORMULAS),
            scale=st.floats(0.25, 2, width=32),
            weight=finite,
            slope=st.just(0.0) | finite,
            place=st.sampled_from(PLACES),
            rank=st.integers(0, 3),
            fault=faults,
            policy=st.sampled_from(["raise", "skip", "zero"]),
        ),
        min_size=1,
        max_size=4,
    )


seeds = st.integers(0, 2**16)
bases = st.sampled_from([None, *FORMULAS])
sound = terms(st.none())
faulty = terms(st.sampled_from([None, None, "raises", "nan_loss", "nan_gradient"]))


def drawn_logprobs(datums, seed):
    generator = torch.Generator().manual_seed(seed)
    return [-5 * torch.rand(shape, generator=generator).to(dtype) for shape, dtype in datums]


def composer_of(base, terms):
    regularizers = [term.as_regularizer(f"term {i}") for i, term in enumerate(terms)]
    return Composer(base and (lambda data, logprobs: (0.5 * base(logprobs), {})), regularizers)


def composed(composer, logprobs, step, awaited=False):
    data = [None] * len(logprobs)
    if awaited:
        return asyncio.run(composer.compute_async(data, logprobs, step=step))
    return composer.compute(data, logprobs, step=step)


def assert_close(got, want, scale):
    """Up to the rounding of float32, relative to what was added up, and of the type it is in."""
    rounding = 1e-6 * scale
    kind = torch.finfo(got.dtype)
    rounding += 10 * (kind.eps * float(got.double().norm()) + kind.tiny)
    assert float((got - want).norm()) <= rounding


def assert_that_of_one_function(composition, base, terms, logprobs, step):
    leaves = [x.clone().double().requires_grad_() for x in logprobs]
    losses = [term.loss(leaves, step) for term in terms]
    if base is not None:
        losses.append(0.5 * base(leaves))
    parts = [
        torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        for loss in losses
    ]
    # Relative to what was added up: terms of opposite sign may cancel almost entirely.
    scale = sum(float(torch.cat([g.flatten() for g in part]).norm()) for part in parts)
    for x, got, *want in zip(logprobs, composition.gradients, *parts, strict=True):
        assert (got.shape, got.dtype) == (x.shape, x.dtype)
        assert_close(got, sum(want), scale)
    total = sum(float(loss.detach()) for loss in losses)
    scale = 1 + sum(abs(float(loss.detach())) for loss in losses)
    scale += sum(abs(term.weight_at(step) * term.scale) for term in terms)  # logsumexp cancels
    assert composition.loss_total == pytest.approx(total, abs=1e-6 * scale)


@given(datums, sound, bases, st.integers(0, 100), seeds, st.booleans())
def test_the_composed_gradient_is_the_monolithic_one(datums, terms, base, step, seed, awaited):
    logprobs = drawn_logprobs(datums, seed)
    given = [x.clone() for x in logprobs]
    random.Random(seed).shuffle(terms)
    composer = composer_of(base, terms)
    composition = composed(composer, logprobs, step, awaited)

    assert_that_of_one_function(composition, base, terms, logprobs, step)
    again = composed(composer, logprobs, step)
    assert torch.equal(again.gradient.flat, composition.gradient.flat)
    assert again.loss_total == composition.loss_total
    assert all(torch.equal(x, y) for x, y in zip(logprobs, given, strict=True))


linked = st.lists(
    st.builds(
        Linked,
        formula=st.sampled_from(FORMULAS),
        weight=finite,
        place=st.sampled_from(["inline", "async", "thread"]),
        has_parameters=st.booleans(),
        shares=st.booleans(),
    ),
    min_size=1,
    max_size=5,
)


@given(datums, linked, seeds, st.sampled_from(["compute", "compute_async", "backward"]))
def test_parameters_and_shared_graphs_get_what_one_backward_gives(datums, terms, seed, way):
    logprobs = drawn_logprobs(datums, seed)
    leaves = [x.clone().requires_grad_() for x in logprobs]
    step, expected = Shared(), Shared()
    composer = Composer(None, [t.as_regularizer(f"term {i}", step) for i, t in enumerate(terms)])
    if way == "backward":
        loss, _ = composer([None] * len(leaves), leaves)
        loss.backward()
        got = [x.grad for x in leaves]
    else:
        got = composed(composer, logprobs, None, way == "compute_async").gradients
    got = [*got, *(p.grad for p in step.parameters)]

    wide = [x.clone().double().requires_grad_() for x in logprobs]
    parts = [
        torch.autograd.grad(
            t.weight * t.loss(wide, expected),
            [*wide, *expected.parameters],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for t in terms
    ]
    scale = sum(float(torch.cat([g.flatten() for g in part]).norm()) for part in parts)
    for gradient, *want in zip(got, *parts, strict=True):
        assert_close(torch.zeros(()) if gradient is None else gradient, sum(want), scale)


@given(datums, faulty, bases, st.integers(0, 100), seeds, st.booleans())
def test_a_term_that_fails_costs_what_its_policy_says(datums, terms, base, step, seed, awaited):
    logprobs = drawn_logprobs(datums, seed)
    composer = composer_of(base, terms)
    ending = [f"term {i}" for i, term in enumerate(terms) if term.ends_the_step]
    if ending:
        with pytest.raises(TermError) as error:
            composed(composer, logprobs, step, awaited)
        assert error.value.term in ending
        return
    if base is None and all(term.skipped for term in terms):
        return  # nothing is left: what the composer says of it is told elsewhere
    composition = composed(composer, logprobs, step, awaited)
    assert_that_of_one_function(composition, base, terms, logprobs, step)
    for i, term in enumerate(terms):
        record = composition.record["regularizers"][f"term {i}"]
        assert record["skipped"] == term.skipped
        assert (record["non_finite_zeroed"] > 0) == (
            term.fault in ("nan_loss", "nan_gradient") and term.policy == "zero"
        )
        assert record["weight"] == pytest.approx(term.weight_at(step))
