"""The order of a wrapped client's calls, the context each runs in, and what may not be called."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading

import pytest
import tinker
from tinker import types

from tinker_custom_loss import TermError, forward_backward_custom, with_regularizers
from training import ADAM, SDK, Gate, datums, squares

ITERATION: contextvars.ContextVar[int] = contextvars.ContextVar("iteration")

# The SDK's own *_async methods, which instrumentation is laid around, are deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning")


@pytest.fixture
def client(new_client):
    return with_regularizers(new_client())


class TestContext:
    def test_each_call_runs_in_the_context_it_was_made_in(self, client, monkeypatch):
        """A trace id or the scope of an iteration is the caller's, however long the call waited."""
        seen = []
        optim_step = tinker.TrainingClient.optim_step

        def traced(self, *args, **kwargs):
            seen.append(("optim_step", ITERATION.get()))
            return optim_step(self, *args, **kwargs)

        monkeypatch.setattr(
            tinker.TrainingClient, "optim_step", functools.wraps(optim_step)(traced)
        )

        def records(data, logprobs):
            seen.append(("term", ITERATION.get()))
            return squares(data, logprobs)

        gate = Gate()
        futures = [client.forward_backward_custom(datums(), None, [gate.term()])]
        for i in range(3):
            token = ITERATION.set(i)
            term = {"fn": records, "weight": 1.0, "name": "records"}
            futures.append(client.forward_backward_custom(datums(), None, [term]))
            futures.append(client.optim_step(ADAM))
            ITERATION.reset(token)
        gate.open.set()
        for future in futures:
            future.result(60)
        assert seen == [(what, i) for i in range(3) for what in ("term", "optim_step")]


class TestWhatSubmits:
    """Which methods return a future at once is what the SDK says of them, in every version."""

    @pytest.mark.skipif(SDK < (0, 38), reason="this SDK waits for the sampling client itself")
    def test_a_sampling_client_of_the_weights_is_a_future_at_once(self, client):
        gate = Gate()
        step = client.forward_backward_custom(datums(), None, [gate.term()])
        assert gate.reached.wait(60)
        sampling = client.save_weights_and_get_sampling_client()
        assert not gate.open.is_set()
        assert isinstance(sampling, tinker.BackcompatSamplingClientFuture)
        assert sampling.future().cancel()
        gate.open.set()
        step.result(60)

    def test_all_that_the_sdk_says_returns_a_future_does(self, client):
        submitting = [
            "forward",
            "load_state",
            "load_state_with_optimizer",
            "optim_step",
            "save_state",
            "save_weights_external",
            "save_weights_for_sampler",
        ]
        gate = Gate()
        step = client.forward_backward_custom(datums(), None, [gate.term()])
        assert gate.reached.wait(60)
        futures = [getattr(client, name)() for name in submitting]  # wrong, but that is for later
        futures.append(client.forward_backward(datums(), "cross_entropy"))
        assert not any(future.future().done() for future in futures)
        assert all(future.future().cancel() for future in futures)
        gate.open.set()
        step.result(60)


def instrumented(monkeypatch, name, seen):
    """Lay a wrapper around a method of the SDK's class, as tracers do."""
    original = getattr(tinker.TrainingClient, name)

    @functools.wraps(original)
    async def scope(self, *args, **kwargs):
        seen.append(name)
        return await original(self, *args, **kwargs)

    monkeypatch.setattr(tinker.TrainingClient, name, scope)


class TestInstrumentation:
    def test_of_async_methods_sees_their_calls(self, client, monkeypatch):
        seen = []
        instrumented(monkeypatch, "optim_step_async", seen)
        instrumented(monkeypatch, "forward_backward_async", seen)

        async def train():
            passed = await client.forward_backward_async(datums(), "cross_entropy")
            optimized = await client.optim_step_async(ADAM)
            await passed
            await optimized

        asyncio.run(train())
        assert seen == ["forward_backward_async", "optim_step_async"]

    def test_also_of_calls_that_waited(self, client, monkeypatch):
        seen = []
        instrumented(monkeypatch, "optim_step_async", seen)

        async def train():
            gate = Gate()
            step = client.forward_backward_custom(datums(), None, [gate.term()])
            optimized = await client.optim_step_async(ADAM)  # a future, at once
            assert seen == []
            gate.open.set()
            await step
            await optimized

        asyncio.run(train())
        assert seen == ["optim_step_async"]

    def test_a_replacement_that_says_nothing_returns_what_it_likes(self, client, monkeypatch):
        original = tinker.TrainingClient.forward_backward_async

        async def counted(self, data, *args, **kwargs):
            return len(data), await original(self, data, *args, **kwargs)

        monkeypatch.setattr(tinker.TrainingClient, "forward_backward_async", counted)

        async def train():
            gate = Gate()
            step = client.forward_backward_custom(datums(), None, [gate.term()])
            call = asyncio.ensure_future(client.forward_backward_async(datums(3), "cross_entropy"))
            await asyncio.sleep(0)
            gate.open.set()
            count, future = await call
            assert count == 3
            await future
            await step

        asyncio.run(train())

    def test_a_coroutine_takes_its_turn_when_it_begins(self, new_client):
        """Calls behind it go on while it waits for what it began, and so does its caller's loop."""
        order, release = [], threading.Event()

        class Later(tinker.TrainingClient):
            async def compact_async(self):
                order.append("compact")
                await asyncio.to_thread(release.wait, 60)

            def optim_step(self, *args, **kwargs) -> tinker.APIFuture[types.OptimStepResponse]:
                order.append("optim_step")
                return super().optim_step(*args, **kwargs)

        bare = new_client()
        bare.__class__ = Later
        client = with_regularizers(bare)

        async def train():
            gate = Gate()
            step = client.forward_backward_custom(datums(), None, [gate.term()])
            compact = asyncio.ensure_future(client.compact_async())
            await asyncio.sleep(0)
            optim = client.optim_step(ADAM)
            gate.open.set()
            optim.result(60)  # blocks this loop
            assert not compact.done()
            release.set()
            await compact
            await step

        asyncio.run(train())
        assert order == ["compact", "optim_step"]


class TestATermThatCallsItsClient:
    """It would wait for the step, and the step for the term: an error says so."""

    @pytest.mark.parametrize("place", [False, True])
    def test_the_wrapped_one(self, client, place):
        def calls(data, logprobs):
            client.optim_step(ADAM).result(60)
            return squares(data, logprobs)

        term = {"fn": calls, "weight": 1.0, "name": "calls", "run_in_executor": place}
        with pytest.raises(TermError, match=r"a term called optim_step\(\) of the training client"):
            client.forward_backward_custom(datums(), None, [term]).result(120)
        assert client.optim_step(ADAM).result(60)

    def test_asynchronously(self, client):
        async def calls(data, logprobs):
            await client.forward_backward_custom(data, squares)
            return squares(data, logprobs)

        term = {"fn": calls, "weight": 1.0, "name": "calls"}
        with pytest.raises(TermError, match=r"a term called forward_backward_custom\(\) of the"):
            client.forward_backward_custom(datums(), None, [term]).result(120)

    def test_through_another(self, client, new_client):
        other = with_regularizers(new_client())

        def back(data, logprobs):
            client.optim_step(ADAM).result(60)
            return squares(data, logprobs)

        def there(data, logprobs):
            inner = {"fn": back, "weight": 1.0, "name": "back"}
            other.forward_backward_custom(data, None, [inner]).result(60)
            return squares(data, logprobs)

        term = {"fn": there, "weight": 1.0, "name": "there"}
        with pytest.raises(TermError, match=r"a term called optim_step\(\) of the training client"):
            client.forward_backward_custom(datums(), None, [term]).result(120)

    def test_of_the_plain_function(self, new_client):
        client = new_client()

        def calls(data, logprobs):
            forward_backward_custom(client, data, None, [inner]).result(60)
            return squares(data, logprobs)

        inner = {"fn": squares, "weight": 1.0, "name": "squares"}
        term = {"fn": calls, "weight": 1.0, "name": "calls"}
        with pytest.raises(TermError, match=r"a term called forward_backward_custom\(\) of the"):
            forward_backward_custom(client, datums(), None, [term]).result(120)

    def test_may_call_another_and_ask_its_own(self, client, new_client):
        other = with_regularizers(new_client())

        def calls(data, logprobs):
            assert client.get_info().model_id == client.model_id
            output = other.forward(data, "cross_entropy").result(60)
            return squares(data, logprobs)[0], {"outputs": len(output.loss_fn_outputs)}

        term = {"fn": calls, "weight": 1.0, "name": "calls"}
        output = client.forward_backward_custom(datums(), None, [term]).result(120)
        assert output.record["regularizers"]["calls"]["custom"] == {"outputs": 4}
