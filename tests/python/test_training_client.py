"""The wrapped client: all of a TrainingClient, in the order in which it is called."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading

import pytest
import tinker
import torch
from tinker import types

import tinker_custom_loss
from tinker_custom_loss import RequestError, TermError, with_regularizers
from tinker_custom_loss.terms import l2
from training import ADAM, SDK, Gate, datums, parameters_after, squares, weighted_nll

L2 = {"fn": l2, "weight": 0.1, "name": "l2"}


@pytest.fixture
def client(new_client):
    return with_regularizers(new_client())


class TestItIsATrainingClient:
    def test_to_isinstance_and_to_its_users(self, client):
        assert isinstance(client, tinker.TrainingClient)
        assert isinstance(client, tinker_custom_loss.RegularizedTrainingClient)
        assert client.model_id
        assert client.get_info().model_id == client.model_id
        assert set(dir(tinker.TrainingClient)) <= set(dir(client))
        assert repr(client).startswith("RegularizedTrainingClient(<tinker.")

    def test_every_public_method_is_there(self, client):
        for name in dir(tinker.TrainingClient):
            if not name.startswith("_"):
                assert callable(getattr(client, name)), name

    def test_wrapping_twice_is_wrapping_once(self, client):
        assert with_regularizers(client) is client

    def test_an_unknown_attribute_is_unknown(self, client):
        with pytest.raises(AttributeError, match="nonsense"):
            client.nonsense  # noqa: B018

    def test_there_is_one_of_it(self, client):
        """A copy would count the steps for itself, and log them twice."""
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="RegularizedTrainingClient cannot be copied"):
                copied(client)

    @pytest.mark.parametrize("value", [None, "client", object(), tinker.TrainingClient])
    def test_anything_else_is_refused(self, value):
        with pytest.raises(RequestError, match=r"expected a tinker\.TrainingClient, got"):
            with_regularizers(value)

    def test_a_plain_second_positional_means_what_it_meant(self, client, new_client, sandbox):
        data = datums()
        theirs = new_client()
        got = parameters_after(
            3, sandbox, client, lambda c, _: c.forward_backward_custom(data, weighted_nll)
        )
        want = parameters_after(
            3, sandbox, theirs, lambda c, _: c.forward_backward_custom(data, weighted_nll)
        )
        assert torch.equal(got, want)
        by_keyword = client.forward_backward_custom(data=data, loss_fn=weighted_nll)
        assert by_keyword.result(60).metrics["datums"] == 4.0

    def test_options_of_the_sdk_are_for_the_sdk_alone(self, client):
        data = datums()
        with pytest.raises(RequestError, match="'loss_type_input' of a step with regularizers"):
            client.forward_backward_custom(data, None, [L2], loss_type_input="logprobs")
        with pytest.raises(RequestError, match="not both"):
            client.forward_backward_custom(data, squares, loss_fn=squares)
        with pytest.raises(TypeError):
            client.forward_backward_custom(data, squares, colour="blue")


class TestOrder:
    def test_calls_behind_a_step_wait_for_their_turn(self, client, new_client, sandbox):
        data = datums()

        def calls(client, custom):
            return [
                custom(data),
                client.optim_step(ADAM),
                client.forward_backward(data, "cross_entropy"),
                client.optim_step(ADAM),
                client.forward(data, "cross_entropy"),
                client.forward_backward_custom(data, weighted_nll),
                client.optim_step(ADAM),
            ]

        other = new_client()
        plain = calls(other, lambda data: other.forward_backward_custom(data, squares))
        outputs = [future.result(60) for future in plain]

        gate = Gate()
        futures = calls(
            client, lambda data: client.forward_backward_custom(data, None, [gate.term()])
        )
        assert gate.reached.wait(60)
        assert not any(future.future().done() for future in futures)
        gate.open.set()
        results = [future.result(60) for future in futures]
        torch.testing.assert_close(
            sandbox.parameters(client.model_id), sandbox.parameters(other.model_id)
        )
        for got, want in zip(results[2:], outputs[2:], strict=True):
            assert got.metrics == pytest.approx(want.metrics, rel=1e-4)

    @pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning")
    def test_async_calls_too(self, client, new_client, sandbox):
        data = datums()

        async def train(client, term):
            futures = await asyncio.gather(
                client.forward_backward_custom_async(data, None, [term]),
                client.optim_step_async(ADAM),
                client.forward_backward_async(data, "cross_entropy"),
                client.optim_step_async(ADAM),
            )
            if isinstance(term["fn"], Gate):
                assert term["fn"].reached.wait(60)
                term["fn"].open.set()
            for future in futures:
                await future
            return sandbox.parameters(client.model_id)

        waited = asyncio.run(train(client, Gate().term()))
        at_once = with_regularizers(new_client())
        assert torch.equal(asyncio.run(train(at_once, {**Gate().term(), "fn": squares})), waited)

    @pytest.mark.parametrize("name", ["compact", "compact_async"])
    def test_a_method_that_is_not_known_waits(self, new_client, name):
        """Of a later SDK, say: what is not known to need no turn is given one."""
        order = []

        class Later(tinker.TrainingClient):
            def compact(self):
                order.append(name)

            async def compact_async(self):
                order.append(name)

        bare = new_client()
        bare.__class__ = Later
        client = with_regularizers(bare)
        gate = Gate()

        def passes(data, logprobs):
            result = gate(data, logprobs)
            order.append("step")
            return result

        step = client.forward_backward_custom(datums(), None, [{**gate.term(), "fn": passes}])
        assert gate.reached.wait(60)
        assert client.get_info()  # needs no turn

        def call():
            called = getattr(client, name)()
            if called is not None:
                asyncio.run(called)

        caller = threading.Thread(target=call)
        caller.start()
        caller.join(0.2)
        assert caller.is_alive()
        gate.open.set()
        caller.join(60)
        step.result(60)
        assert order == ["step", name]
        call()  # with nothing before it
        assert order == ["step", name, name]

    def test_what_the_sdk_would_have_raised_the_future_raises(self, client):
        with pytest.raises(TypeError, match="AdamParams"):
            client.optim_step("fast")
        gate = Gate()
        step = client.forward_backward_custom(datums(), None, [gate.term()])
        wrong = client.optim_step("fast")
        right = client.optim_step(ADAM)
        gate.open.set()
        with pytest.raises(TypeError, match="AdamParams"):
            wrong.result(60)
        right.result(60)
        step.result(60)

    def test_a_list_that_is_used_again_is_that_of_the_call(self, client):
        gate = Gate()
        first = client.forward_backward_custom(datums(), None, [gate.term()])
        data = datums()
        second = client.forward_backward_custom(data, None, [L2])
        data.clear()
        gate.open.set()
        first.result(60)
        assert second.result(60).metrics["datum_count"] == 4

    def test_a_call_can_be_withdrawn_until_it_is_sent(self, client, sandbox):
        before = sandbox.parameters(client.model_id)
        gate = Gate()
        step = client.forward_backward_custom(datums(), None, [gate.term()])
        optim = client.optim_step(types.AdamParams(learning_rate=0.01))
        assert gate.reached.wait(60)
        assert optim.future().cancel()
        gate.open.set()
        step.result(60)
        assert torch.equal(sandbox.parameters(client.model_id), before)

    def test_a_failure_of_the_server_is_the_futures(self, client):
        outside = types.Datum(
            model_input=types.ModelInput.from_ints([1, 2]),
            loss_fn_inputs={"target_tokens": torch.tensor([1, 10**6])},
        )
        with pytest.raises(tinker.RequestFailedError):
            client.forward_backward_custom([outside], None, [L2]).result(60)
        assert client.forward_backward_custom(datums(), None, [L2]).result(60)


class TestTwoClients:
    def test_their_terms_run_at_the_same_time(self, new_client):
        """Each term waits for the other's: one after the other, they would wait for ever."""
        both = threading.Barrier(2, timeout=60)

        def meets(data, logprobs):
            both.wait()
            return squares(data, logprobs)

        term = {"fn": meets, "weight": 1.0, "name": "meets"}
        clients = [with_regularizers(new_client()) for _ in range(2)]
        futures = []
        for client in clients:
            futures.append(client.forward_backward_custom(datums(), None, [term]))
            futures.append(client.optim_step(ADAM))
        for future in futures:
            future.result(120)

    @pytest.mark.skipif(SDK < (0, 38), reason="this SDK does not queue losses on one thread")
    def test_through_the_sdk_alone_they_do_not(self, new_client):
        """If this ever fails, docs/api/trainingclient.md has good news to tell."""
        together = threading.Barrier(2, timeout=1.0)

        def meets(data, logprobs):
            together.wait()
            return squares(data, logprobs)

        term = {"fn": meets, "weight": 1.0, "name": "meets"}
        futures = [
            tinker_custom_loss.forward_backward_custom(new_client(), datums(), None, [term])
            for _ in range(2)
        ]
        for future in futures:
            with pytest.raises(TermError, match="BrokenBarrierError"):
                future.result(60)
