"""What a term's gradient holds beyond the plain case: parameters, shared graphs, changed memory."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import math
import threading

import numpy as np
import pytest
import torch

from term_library import head_on_logprobs, raises, square, total
from tinker_custom_loss import (
    ChangedLogprobsError,
    Composer,
    NonFiniteError,
    RequestError,
    StaleGraphError,
    TensorBatch,
    TermError,
)
from tinker_custom_loss.terms import l2

DATA = ["datum"]


@pytest.fixture
def logprobs():
    return [torch.tensor([-1.0, -2.0, -3.0])]


@pytest.fixture
def temperature():
    return torch.nn.Parameter(torch.tensor(2.0))


def term(fn, weight=1.0, name="term", **options):
    return {"fn": fn, "weight": weight, "name": name, **options}


def scaled_by(parameter):
    def scaled(data, logprobs):
        return (parameter * logprobs[0]).sum(), {}

    return scaled


def monolithic(logprobs, base, terms):
    """The same loss written as one function, as the SDK differentiates it."""
    leaves = [t.clone().requires_grad_() for t in logprobs]
    loss = base(DATA, leaves)[0] + sum(t["weight"] * t["fn"](DATA, leaves)[0] for t in terms)
    loss.backward()
    return [leaf.grad for leaf in leaves]


class TestParameters:
    @pytest.mark.parametrize("place", [False, True])
    def test_they_get_the_gradient_that_one_backward_would_give(self, logprobs, place):
        torch.manual_seed(0)
        head = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))

        def through_head(data, logprobs):
            return head(logprobs[0]).sum(), {}

        terms = [
            term(through_head, 0.5, "a", run_in_executor=place),
            term(through_head, -2.0, "b"),
        ]
        expected = monolithic(logprobs, total, terms)
        wanted = [p.grad for p in head.parameters()]
        head.zero_grad()
        composition = Composer(total, terms).compute(DATA, logprobs)
        torch.testing.assert_close(composition.gradients, expected)
        for parameter, gradient in zip(head.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        assert len(composition.parameter_gradients) == len(wanted)

    def test_they_are_added_to_what_is_there_once_a_step(self, logprobs, temperature):
        composer = Composer(total, [term(scaled_by(temperature), 0.5)])
        for step in (1, 2):
            composer.compute(DATA, logprobs)
            assert temperature.grad.item() == step * 0.5 * -6

    def test_as_a_custom_loss_fn_they_wait_for_the_callers_backward(self, logprobs, temperature):
        leaves = [t.clone().requires_grad_() for t in logprobs]
        loss, _ = Composer(total, [term(scaled_by(temperature), 0.5)])(DATA, leaves)
        assert temperature.grad is None
        (3 * loss).backward()
        assert temperature.grad.item() == 3 * 0.5 * -6
        assert leaves[0].grad.tolist() == [6, 6, 6]

    def test_async_too(self, logprobs, temperature):
        async def scaled(data, logprobs):
            await asyncio.sleep(0)
            return scaled_by(temperature)(data, logprobs)

        composer = Composer(total, [term(scaled)])
        asyncio.run(composer.compute_async(DATA, logprobs))
        assert temperature.grad.item() == -6

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_also_where_the_caller_has_gradients_off(self, logprobs, temperature, mode):
        with mode():
            Composer(scaled_by(temperature)).compute(DATA, logprobs)
        assert temperature.grad.item() == -6
        assert not temperature.grad.is_inference()

    def test_a_step_that_fails_leaves_them_alone(self, logprobs, temperature):
        with pytest.raises(TermError):
            Composer(scaled_by(temperature), [term(raises)]).compute(DATA, logprobs)
        with pytest.raises(NonFiniteError, match="weighted gradients overflows"):
            Composer(scaled_by(temperature), [term(total, 1e300)]).compute(DATA, logprobs)
        assert temperature.grad is None

    def test_a_skipped_term_leaves_them_alone(self, logprobs, temperature):
        def fails_late(data, logprobs):
            scaled_by(temperature)(data, logprobs)
            raise ValueError("late")

        Composer(total, [term(fails_late, on_error="skip")]).compute(DATA, logprobs)
        assert temperature.grad is None

    def test_the_loss_alone_leaves_them_alone(self, logprobs, temperature):
        Composer(scaled_by(temperature)).compute_loss(DATA, logprobs)
        assert temperature.grad is None

    @pytest.mark.parametrize("policy", ["raise", "skip", "zero"])
    def test_what_nan_does_in_their_gradient_is_said_by_the_term(self, logprobs, policy):
        parameter = torch.nn.Parameter(torch.tensor([0.0, 1.0]))

        def root(data, logprobs):  # the derivative of sqrt at 0 is infinite
            return parameter.sqrt().sum() + logprobs[0].sum(), {}

        composer = Composer(total, [term(root, on_non_finite=policy)])
        if policy == "raise":
            with pytest.raises(NonFiniteError, match=r"to a parameter of shape \[2\] is not fin"):
                composer.compute(DATA, logprobs)
            assert parameter.grad is None
            return
        record = composer.compute(DATA, logprobs).record["regularizers"]["term"]
        assert record["skipped"] is (policy == "skip")
        assert record["non_finite_zeroed"] == (policy == "zero")
        grad = parameter.grad if parameter.grad is None else parameter.grad.tolist()
        assert grad == (None if policy == "skip" else [0.0, 0.5])

    def test_their_weighted_sum_may_not_overflow(self, logprobs, temperature):
        def steep(data, logprobs):  # it is 0, and its derivative by the parameter 1e38
            return 1e38 * (temperature - temperature.detach()), {}

        with pytest.raises(NonFiniteError, match="gradients of a parameter overflows"):
            Composer(total, [term(steep, 100.0)]).compute(DATA, logprobs)
        assert temperature.grad is None

    def test_a_sparse_gradient_is_added_too(self, logprobs):
        embedding = torch.nn.Embedding(4, 3, sparse=True)

        def embedded(data, logprobs):
            return (embedding(torch.tensor([1, 1])) * logprobs[0]).sum(), {}

        Composer(total, [term(embedded, 0.5)]).compute(DATA, logprobs)
        assert embedding.weight.grad.to_dense()[1].tolist() == [-1.0, -2.0, -3.0]

    def test_their_hooks_are_run_once(self, logprobs, temperature):
        seen = []
        temperature.register_hook(lambda grad: seen.append("gradient"))
        temperature.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
        Composer(total, [term(scaled_by(temperature))]).compute(DATA, logprobs)
        assert seen == ["gradient", "accumulated"]

    def test_in_another_process_they_are_refused_by_name(self, logprobs):
        params = {"head": torch.nn.Linear(3, 1)}
        remote = term(head_on_logprobs, name="head", params=params, run_in_executor="process")
        with pytest.raises(
            TermError, match=r'"head" depends on parameters of its own.*another pro'
        ):
            Composer(total, [remote]).compute(DATA, logprobs)

    def test_one_that_is_not_trained_may_go_to_another_process(self, logprobs):
        params = {"head": torch.nn.Linear(3, 1), "frozen": True}
        remote = term(head_on_logprobs, name="head", params=params, run_in_executor="process")
        assert Composer(total, [remote]).compute(DATA, logprobs).parameter_gradients == []

    def test_in_an_executor_of_threads_they_are_trained(self, logprobs):
        head = torch.nn.Linear(3, 1)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            here = term(head_on_logprobs, params={"head": head}, run_in_executor=pool)
            Composer(total, [here]).compute(DATA, logprobs)
        assert head.weight.grad.tolist() == [[-1, -2, -3]]


class TestSharedGraphs:
    def sharing(self, places=(False, False)):
        """Two terms, of which the second uses what the first one computed and kept."""
        kept = {}

        def computes(data, logprobs):
            kept["feature"] = logprobs[0].exp().square()
            return kept["feature"].sum(), {}

        def uses(data, logprobs):
            return (kept["feature"] * logprobs[0]).sum(), {}

        first, second = places
        terms = [
            term(computes, 0.5, "computes", run_in_executor=first),
            term(uses, 2.0, "uses", run_in_executor=second),
        ]
        return terms, kept

    @pytest.mark.parametrize("gradients_kept", [False, True])
    def test_no_part_of_a_gradient_is_lost(self, logprobs, gradients_kept):
        terms, _ = self.sharing()
        expected = monolithic(logprobs, total, terms)
        composition = Composer(total, terms).compute(DATA, logprobs, term_gradients=gradients_kept)
        torch.testing.assert_close(composition.gradients, expected)

    def test_nor_where_one_depends_on_the_feature_alone(self, logprobs):
        kept = {}

        def computes(data, logprobs):
            kept["feature"] = logprobs[0].exp()
            return kept["feature"].sum(), {}

        terms = [term(computes, 0.0, "computes"), term(lambda d, x: (kept["feature"].sum(), {}))]
        composition = Composer(None, terms).compute(DATA, logprobs)
        torch.testing.assert_close(composition.gradients[0], logprobs[0].exp())

    def test_the_leaf_of_an_earlier_step_is_refused_by_name(self, logprobs):
        (computes, uses), kept = self.sharing()
        Composer(total, [computes]).compute(DATA, logprobs)
        assert kept
        with pytest.raises(StaleGraphError, match='"uses" depends on the logprobs of another step'):
            Composer(total, [uses]).compute(DATA, [t.clone() for t in logprobs])
        with pytest.raises(StaleGraphError, match='"uses" depends on the logprobs of another step'):
            Composer(total, [uses]).compute(DATA, logprobs)

    def test_what_is_kept_detached_is_a_constant(self, logprobs):
        (computes, uses), kept = self.sharing()
        Composer(total, [computes]).compute(DATA, logprobs)
        kept["feature"] = kept["feature"].detach()
        composition = Composer(None, [uses]).compute(DATA, logprobs)
        torch.testing.assert_close(composition.gradients[0], 2 * kept["feature"])

    def test_a_part_of_a_head_that_two_terms_share(self, logprobs, temperature):
        kept = {}

        def computes(data, logprobs):
            kept["scale"] = temperature.exp()
            return (kept["scale"] * logprobs[0]).sum(), {}

        def uses(data, logprobs):
            return (kept["scale"] * logprobs[0].square()).sum(), {}

        terms = [term(computes, 0.5, "computes"), term(uses, 2.0, "uses")]
        monolithic(logprobs, total, terms)
        expected, temperature.grad = temperature.grad, None
        Composer(total, terms).compute(DATA, logprobs)
        torch.testing.assert_close(temperature.grad, expected)


def by_numpy(x):
    x.detach().numpy()[...] = 0.0


def by_data(x):
    x.data.mul_(2.0)


def by_method(x):
    x.detach().mul_(2.0)


def by_nan(x):
    x.detach().numpy()[0] = math.nan


class TestChangedLogprobs:
    @pytest.mark.parametrize("change", [by_numpy, by_data, by_method, by_nan])
    @pytest.mark.parametrize("place", [False, True])
    @pytest.mark.parametrize("flat", [False, True])
    def test_whichever_way_it_is_refused_and_the_callers_memory_stays(
        self, logprobs, change, place, flat
    ):
        def changes(data, logprobs):
            loss = logprobs[0].square().sum()
            change(logprobs[0])
            return loss, {}

        given = TensorBatch.from_tensors(logprobs) if flat else logprobs
        before = (given.flat if flat else given[0]).clone()
        composer = Composer(total, [term(changes, name="changes", run_in_executor=place)])
        with pytest.raises(ChangedLogprobsError, match='"changes" changed the logprobs in place'):
            composer.compute(DATA, given)
        assert torch.equal(given.flat if flat else given[0], before)

    def test_under_the_names_of_a_term_of_the_catalogue_too(self, logprobs):
        @functools.wraps(l2)
        def changes(data, logprobs):
            by_numpy(logprobs[0])
            return logprobs[0].square().sum(), {}

        with pytest.raises(ChangedLogprobsError):
            Composer(total, [term(changes)]).compute(DATA, logprobs)

    def test_async_too(self, logprobs):
        async def changes(data, logprobs):
            by_numpy(logprobs[0])
            await asyncio.sleep(0)
            return logprobs[0].sum(), {}

        with pytest.raises(ChangedLogprobsError):
            Composer(total, [term(changes)]).compute(DATA, logprobs)

    def test_by_another_term_before_they_are_differentiated_too(self, logprobs):
        kept, returned = [], threading.Event()

        async def keeps(data, logprobs):
            kept.append(logprobs[0])
            asyncio.get_running_loop().call_soon(returned.set)
            return square(data, logprobs)

        def changes(data, logprobs):
            assert returned.wait(60)
            by_numpy(kept[0])
            return logprobs[0].sum(), {}

        with pytest.raises(ChangedLogprobsError):
            Composer(changes, [term(keeps)]).compute(DATA, logprobs)

    def test_where_a_later_term_shares_them_too(self, logprobs):
        kept = []

        def keeps(data, logprobs):
            kept.extend([logprobs[0], logprobs[0].square()])
            return logprobs[0].sum(), {}

        def changes(data, logprobs):
            by_numpy(kept[0])
            return logprobs[0].sum(), {}

        def shares(data, logprobs):
            return kept[1].sum(), {}

        terms = [term(changes, name="changes"), term(shares, name="shares")]
        with pytest.raises(ChangedLogprobsError):
            Composer(keeps, terms).compute(DATA, logprobs)

    def test_nan_and_minus_zero_are_no_change(self):
        odd = [torch.tensor([math.nan, -0.0, 0.0, math.inf])]
        assert Composer(lambda d, x: (x[0][1:3].sum(), {})).compute(DATA, odd).loss_total == 0

    def test_a_write_after_the_step_reaches_nobody(self, logprobs):
        kept = []

        def keeps(data, logprobs):
            kept.extend(logprobs)
            return logprobs[0].sum(), {}

        batch = TensorBatch.from_tensors(logprobs)
        Composer(keeps).compute(DATA, batch)
        kept[0].detach().numpy()[...] = np.nan
        assert torch.equal(batch.flat, logprobs[0])


class TestSecondDerivatives:
    def loss(self, logprobs):
        leaves = [t.clone().requires_grad_() for t in logprobs]
        return Composer(total, [term(square)])(DATA, leaves)[0], leaves

    def test_are_refused(self, logprobs):
        loss, leaves = self.loss(logprobs)
        with pytest.raises(RequestError, match="cannot be differentiated twice"):
            torch.autograd.grad(loss, leaves, create_graph=True)

    def test_a_second_backward_is_refused_as_of_any_graph(self, logprobs):
        loss, leaves = self.loss(logprobs)
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
        assert leaves[0].grad.tolist() == [-1, -3, -5]

    def test_with_retain_graph_it_adds_up_as_of_any_graph(self, logprobs):
        loss, leaves = self.loss(logprobs)
        loss.backward(retain_graph=True)
        loss.backward()
        assert leaves[0].grad.tolist() == [-2, -6, -10]
