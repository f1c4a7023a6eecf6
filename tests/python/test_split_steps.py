"""A step in several calls: with its totals, any partition has the gradient of the single call."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings

from splits import MEANS, made_up, splits
from test_linear import forward_output
from tinker_custom_loss import (
    Composer,
    RequestError,
    add_totals,
    flatten,
    forward_backward_custom,
    linearize,
    merge,
    with_regularizers,
)
from training import datums


def in_parts(split):
    """The whole step's composition, and those of the parts."""
    data, logprobs = made_up(split.sizes, split.alternatives)
    composer = split.composer
    whole = composer.compute(data, logprobs)
    totals = json.loads(json.dumps(composer.totals(data)))
    parts = [
        composer.compute([data[i] for i in part], [logprobs[i] for i in part], totals=totals)
        for part in split.parts
    ]
    return whole, parts


@settings(max_examples=40)
@given(splits())
def test_the_parts_have_the_gradient_of_the_whole(split):
    whole, parts = in_parts(split)
    got = {}
    for indices, part in zip(split.parts, parts, strict=True):
        got |= dict(zip(indices, part.gradients, strict=True))
    joined = torch.cat([got[i].reshape(-1) for i in range(len(got))])
    error = torch.linalg.vector_norm(joined - whole.gradient.flat)
    assert error <= 1e-6 * torch.linalg.vector_norm(whole.gradient.flat) + 1e-12


@settings(max_examples=40)
@given(splits())
def test_merged_their_records_are_that_of_the_whole(split):
    whole, parts = in_parts(split)
    merged = merge([part.record for part in parts])
    want, got = flatten(whole.record), flatten(merged)
    assert want.keys() == got.keys()
    assert merged["datum_count"] == sum(map(len, split.parts))
    for key in want:
        if not key.endswith("seconds"):
            assert got[key] == pytest.approx(want[key], rel=1e-6, abs=1e-9), key


@settings(max_examples=40)
@given(splits())
def test_totals_of_the_parts_add_up(split):
    data, _ = made_up(split.sizes, split.alternatives)
    composer = split.composer
    each = [composer.totals([data[i] for i in part]) for part in split.parts]
    before = json.dumps(each)
    added, whole = add_totals(*each), composer.totals(data)
    assert json.dumps(each) == before
    assert added.keys() == whole.keys()
    for name, entry in whole.items():
        assert added[name].pop("tokens") == pytest.approx(entry.pop("tokens"))
        assert added[name] == entry


PLACES = [False, True, "process"]


@pytest.mark.parametrize("place", PLACES)
def test_wherever_a_term_runs_it_gets_the_totals(place):
    data, logprobs = made_up([(2, 3), (3, 1)], alternatives=False)
    with Composer(None, [{**term, "run_in_executor": place} for term in MEANS]) as composer:
        whole = composer.compute(data, logprobs).gradients
        totals = composer.totals(data)
        parts = [
            composer.compute(data[a:b], logprobs[a:b], totals=totals) for a, b in [(0, 2), (2, 5)]
        ]
        torch.testing.assert_close([g for part in parts for g in part.gradients], whole)
        losses = [
            composer.compute_loss(data[a:b], logprobs[a:b], totals=totals).loss_total
            for a, b in [(0, 2), (2, 5)]
        ]
    assert sum(losses) == pytest.approx(sum(part.loss_total for part in parts))


@pytest.mark.parametrize("step", ["wrapped", "plain", "linearize"])
def test_the_parameter_gradient_is_that_of_one_call(step, sandbox, new_client):
    data, composer = datums(5), Composer(None, MEANS)
    totals = composer.totals(data)

    def gradient(parts, totals):
        client = new_client()
        takes = with_regularizers(client) if step == "wrapped" else client
        for part in parts:
            if step == "wrapped":
                future = takes.forward_backward_custom(part, composer, totals=totals)
            elif step == "plain":
                future = forward_backward_custom(takes, part, composer, totals=totals)
            else:
                output = client.forward(part, "cross_entropy").result(60)
                linear, _ = linearize(part, output, composer, totals=totals)
                future = client.forward_backward(linear, "cross_entropy")
            future.result(60)
        return sandbox.model(client.model_id).gradient_flat().clone()

    def error(got):
        return float(torch.linalg.vector_norm(got - whole) / torch.linalg.vector_norm(whole))

    whole = gradient([data], None)
    parts = [[data[4], data[0]], [data[2]], [data[1], data[3]]]
    assert error(gradient(parts, totals)) <= 1e-6
    assert error(gradient(parts, None)) > 0.5  # three times as large, or nearly


def test_a_client_knows_the_totals_of_its_own_terms(sandbox, new_client):
    data = datums(5)

    def gradient(parts, split):
        bare = new_client()
        client = with_regularizers(bare, regularizers=MEANS)
        totals = client.totals(data) if split else None
        for part in parts:
            client.forward_backward_custom(part, step=0, totals=totals).result(60)
        return sandbox.model(bare.model_id).gradient_flat().clone()

    whole = gradient([data], split=False)
    got = gradient([[data[4], data[0]], [data[2]], [data[1], data[3]]], split=True)
    assert torch.linalg.vector_norm(got - whole) <= 1e-6 * torch.linalg.vector_norm(whole)
    client = with_regularizers(new_client(), regularizers=MEANS)
    other = Composer(None, MEANS[:1])
    assert client.totals(data, other) == other.totals(data)
    assert client.totals(data, None, MEANS[:1]) == other.totals(data)
    with pytest.raises(RequestError, match="a plain function looks at the whole batch"):
        with_regularizers(new_client()).totals(data, plain)


def plain(data, logprobs):
    return torch.cat([x.reshape(-1) for x in logprobs]).mean(), {}


class TestRefused:
    data, logprobs = made_up([(2, 3), (3, 1)], alternatives=False)

    def refuse(self, message, composer, totals, count=2):
        with pytest.raises(RequestError, match=message) as refused:
            composer.compute(self.data[:count], self.logprobs[:count], totals=totals)
        assert refused.value.path == "totals"
        return refused.value

    @pytest.mark.parametrize(
        ("composer", "name"),
        [
            (Composer(plain, MEANS), "the base loss"),
            (Composer(None, [*MEANS, {"fn": plain, "weight": 1.0}]), 'regularizer "plain"'),
        ],
    )
    def test_a_part_for_a_term_that_may_look_at_the_whole_batch(self, composer, name):
        totals = composer.totals(self.data)
        error = self.refuse(f"{name} may look at the whole batch", composer, totals)
        assert "2 of the step's 5 datums" in str(error)
        assert "@term" in str(error)

    def test_but_totals_of_just_these_datums_are_no_part(self):
        composer = Composer(plain, MEANS)
        totals = composer.totals(self.data)
        got = composer.compute(self.data, self.logprobs, totals=totals)
        want = composer.compute(self.data, self.logprobs)
        assert got.loss_total == want.loss_total
        assert torch.equal(got.gradient.flat, want.gradient.flat)

    @pytest.mark.parametrize("name", ["dpo", "kto"])
    def test_a_torn_group(self, name):
        composer = Composer(name)
        totals = composer.totals(self.data)
        self.refuse(
            "of group 13 this call has 2, and the step, by its totals, 3", composer, totals, 4
        )

    def test_one_index_for_two_groups(self):
        composer = Composer("dpo")
        totals = composer.totals(self.data[:2])
        self.refuse("different groups different indices", composer, add_totals(totals, totals))

    def test_totals_of_other_terms(self):
        composer, other = Composer(None, MEANS), Composer(None, MEANS[:2])
        few, many = other.totals(self.data), composer.totals(self.data)
        self.refuse('no totals for regularizer "l2"', composer, few)
        self.refuse('totals are given for a term "l2"', other, many)
        with pytest.raises(RequestError, match="different terms"):
            add_totals(few, many)
        renamed = Composer(None, [*MEANS[:2], {"fn": plain, "name": "l2", "weight": 1.0}])
        self.refuse(
            'of a term of scope "batch", but its scope is "token"',
            composer,
            renamed.totals(self.data),
        )

    def test_totals_smaller_than_the_part(self):
        composer = Composer(None, MEANS)
        totals = composer.totals(self.data[:1])
        self.refuse("of a step with 1 datum, but this call alone has 2", composer, totals)
        totals = composer.totals(self.data)
        totals["nll"]["tokens"] = 0.25
        self.refuse('"nll" it has 0.25 tokens', composer, totals)

    def test_totals_of_as_many_other_datums(self):
        composer = Composer(None, MEANS)
        self.refuse("but of others", composer, composer.totals(self.data[2:]), 3)

    @pytest.mark.parametrize("totals", [{}, [], {"nll": 3}, {"nll": {"scope": "token"}}])
    def test_what_are_no_totals(self, totals):
        self.refuse("totals", Composer(None, MEANS[:1]), totals)

    def test_datums_without_targets(self):
        datum = SimpleNamespace(loss_fn_inputs={"weights": [1.0]})
        with pytest.raises(RequestError, match='datum 0 has no "target_tokens"'):
            Composer(None, MEANS).totals([datum])

    def test_before_anything_is_sent(self, sandbox, new_client):
        data, composer = datums(3), Composer(plain, MEANS)
        totals, bare = composer.totals(data), new_client()
        client = with_regularizers(bare)
        before = sandbox.model(bare.model_id).gradient_flat().clone()
        for call in (
            client.forward_backward_custom,
            lambda *a, **o: forward_backward_custom(bare, *a, **o),
        ):
            with pytest.raises(RequestError, match="the base loss may look at the whole batch"):
                call(data[:2], composer, totals=totals)
            with pytest.raises(RequestError, match="a plain function looks at the whole batch"):
                call(data[:2], plain, totals=totals)
        scheduled = Composer(None, [{"fn": "nll", "weight": lambda step: 1.0}])
        with pytest.raises(RequestError, match="is a schedule, and"):
            forward_backward_custom(bare, data[:2], scheduled, totals=scheduled.totals(data))
        with pytest.raises(RequestError, match="the base loss may look at the whole batch"):
            linearize(data[:2], forward_output(data[:2]), composer, totals=totals)
        assert torch.equal(sandbox.model(bare.model_id).gradient_flat(), before)


def test_awaited_it_is_the_same():
    data, logprobs = made_up([(2, 3), (3, 1)], alternatives=False)
    composer = Composer(None, MEANS)
    totals = composer.totals(data)
    got = asyncio.run(composer.compute_async(data[:2], logprobs[:2], totals=totals))
    want = composer.compute(data[:2], logprobs[:2], totals=totals)
    assert torch.equal(got.gradient.flat, want.gradient.flat)
