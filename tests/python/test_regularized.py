"""Loops that make their own clients: a service client, or all of a process for a while."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest
import tinker

from tinker_custom_loss import RegularizedTrainingClient, RequestError, regularized
from training import ADAM, SDK, datums, squares

SQUARES = {"fn": squares, "weight": 0.1, "name": "squares"}


@pytest.fixture
def service(sandbox):
    service = tinker.ServiceClient(base_url=sandbox.url, api_key="tml-sandbox")
    yield service
    holder = service.holder
    holder.run_coroutine_threadsafe(holder.aclose()).result()


def client_of(created):
    return created.result() if isinstance(created, tinker.APIFuture) else created


def terms_of(client):
    step = client.forward_backward(datums(), "cross_entropy")
    client.optim_step(ADAM)
    return list(getattr(step.result(60), "record", {}).get("regularizers", ()))


class TestAServiceClient:
    def test_is_one(self, service):
        wrapped = regularized(service, regularizers=[SQUARES])
        assert isinstance(wrapped, tinker.ServiceClient)
        assert wrapped.holder is service.holder
        assert set(dir(tinker.ServiceClient)) <= set(dir(wrapped))
        assert repr(wrapped).startswith("RegularizedServiceClient(<tinker.")
        with pytest.raises(AttributeError, match="nonsense"):
            wrapped.nonsense  # noqa: B018

    def test_its_training_clients_have_regularizers(self, service):
        wrapped = regularized(service, regularizers=[SQUARES], flat_metrics=True)
        created = wrapped.create_lora_training_client("any-model", rank=4)
        client = client_of(created)
        assert isinstance(client, RegularizedTrainingClient)
        output = client.forward_backward(datums(), "cross_entropy").result(60)
        assert output.metrics["regularizers/squares/value"] > 0

    @pytest.mark.skipif(SDK < (0, 38), reason="there it is the client itself")
    @pytest.mark.filterwarnings("ignore:Using the future:FutureWarning")
    def test_the_future_of_one_is_still_the_sdks(self, service):
        created = regularized(service, regularizers=[SQUARES]).create_lora_training_client("any")
        assert isinstance(created, tinker.BackcompatTrainingClientFuture)
        assert terms_of(created) == ["squares"]

        async def awaited():
            return await created

        assert isinstance(asyncio.run(awaited()), RegularizedTrainingClient)

    @pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning")
    def test_those_of_async_loops_too(self, service):
        wrapped = regularized(service, regularizers=[SQUARES])
        client = asyncio.run(wrapped.create_lora_training_client_async("any-model"))
        assert terms_of(client) == ["squares"]

    @pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning")
    @pytest.mark.parametrize("form", ["", "_async"])
    @pytest.mark.parametrize("optimizer", ["", "_with_optimizer"])
    def test_those_of_a_checkpoint_too(self, service, sandbox, optimizer, form):
        """They go on from it: their step is that of ``first_step``."""
        saved = client_of(service.create_lora_training_client("any-model", rank=4))
        saved.forward_backward(datums(), "cross_entropy")
        saved.optim_step(ADAM)
        path = saved.save_state("saved").result(60).path
        wrapped = regularized(service, regularizers=[SQUARES], first_step=1)
        create = getattr(wrapped, f"create_training_client_from_state{optimizer}{form}")
        created = asyncio.run(create(path)) if form else create(path)
        client = client_of(created)
        assert isinstance(client, RegularizedTrainingClient)
        before = sandbox.parameters(client.model_id)
        assert before.equal(sandbox.parameters(saved.model_id))
        record = client.forward_backward(datums(), "cross_entropy").result(60).record
        assert record["schedule_step"] == 1
        assert list(record["regularizers"]) == ["squares"]
        with regularized(regularizers=[SQUARES]):
            create = getattr(service, f"create_training_client_from_state{optimizer}{form}")
            created = asyncio.run(create(path)) if form else create(path)
            assert terms_of(client_of(created)) == ["squares"]

    def test_a_schedule_that_begins_anew_in_a_run_that_goes_on_is_said(self, service, caplog):
        saved = client_of(service.create_lora_training_client("any-model", rank=4))
        path = saved.save_state("saved").result(60).path
        late = {**SQUARES, "weight": lambda step: 0.1 * step}
        for options in ({}, {"first_step": 5}):
            wrapped = regularized(
                service, regularizers=[late, SQUARES | {"name": "other"}], **options
            )
            client_of(wrapped.create_training_client_from_state(path))
            client_of(wrapped.create_training_client_from_state_with_optimizer(path))
        (line,) = caplog.messages
        assert 'the schedule of the weight of regularizer "squares" begins at step 0' in line

    @pytest.mark.parametrize("value", ["service", tinker.ServiceClient, object()])
    def test_anything_else_is_refused(self, value):
        with pytest.raises(RequestError, match=r"expected a tinker\.ServiceClient, got"):
            regularized(value, regularizers=[SQUARES])

    def test_options_are_checked_when_they_are_given(self, service):
        with pytest.raises(RequestError, match="weight"):
            regularized(service, regularizers=[{"fn": squares, "name": "squares"}])
        with pytest.raises(RequestError, match="on_failure"):
            regularized(regularizers=[SQUARES], on_failure="panic")
        with pytest.raises(RequestError, match="regularizers already"):
            regularized(regularized(service, regularizers=[SQUARES]), regularizers=[SQUARES])


class TestEverywhere:
    def test_within_every_service_client_creates_such(self, sandbox, caplog):
        with (
            caplog.at_level(logging.INFO, "tinker_custom_loss"),
            regularized(regularizers=[SQUARES]),
        ):
            service = tinker.ServiceClient(base_url=sandbox.url, api_key="tml-sandbox")
            client = client_of(service.create_lora_training_client("any-model"))
            assert terms_of(client) == ["squares"]
        (line,) = caplog.messages
        assert "create_lora_training_client" in line
        assert terms_of(client) == ["squares"]  # it keeps them
        bare = client_of(service.create_lora_training_client("any-model"))
        assert not isinstance(bare, RegularizedTrainingClient)
        service.holder.run_coroutine_threadsafe(service.holder.aclose()).result()

    def test_what_it_replaced_is_there_again_also_after_an_error(self):
        before = dict(vars(tinker.ServiceClient))

        def fails_within():
            with regularized(regularizers=[SQUARES]):
                assert dict(vars(tinker.ServiceClient)) != before
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fails_within()
        assert dict(vars(tinker.ServiceClient)) == before

    @pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning")
    def test_a_method_of_the_sdk_that_calls_another_wraps_once(self, service):
        with regularized(regularizers=[SQUARES]):
            client = asyncio.run(service.create_lora_training_client_async("any-model"))
        assert terms_of(client) == ["squares"]

    def test_one_at_a_time(self):
        refused = []

        def enter():
            try:
                with regularized(regularizers=[SQUARES]):
                    pass
            except RequestError as error:
                refused.append(error)

        with regularized(regularizers=[SQUARES]):
            enter()
            thread = threading.Thread(target=enter)
            thread.start()
            thread.join()
        assert len(refused) == 2
        assert "in force already" in str(refused[0])
        with regularized(regularizers=[SQUARES]):
            pass
