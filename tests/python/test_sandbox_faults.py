"""Faults that were asked for: a wrapped client survives them, or its call ends in a named error."""

from __future__ import annotations

import contextlib

import pytest
import tinker

from tinker_custom_loss import NonFiniteError, RequestError, with_regularizers
from tinker_custom_loss.sandbox import Faults, SandboxServer
from training import ADAM, datums, squares, weighted_nll

SQUARES = {"fn": squares, "weight": 0.1, "name": "squares"}
QUICK = {"retry_after": 0.01, "at_most": 2}


@contextlib.contextmanager
def training(faults=None, **options):
    """A sandbox with these faults, and a wrapped client of the official SDK."""
    with SandboxServer(seed=0, faults=faults, **options) as server:
        service = tinker.ServiceClient(base_url=server.url, api_key="tml-sandbox")
        client = service.create_lora_training_client("any-model", rank=4)
        client = client.result() if isinstance(client, tinker.APIFuture) else client
        try:
            yield server, with_regularizers(client, regularizers=[SQUARES])
        finally:
            holder = service.holder
            holder.run_coroutine_threadsafe(holder.aclose()).result()


def two_steps(client):
    """Native and custom bases, submitted before any is answered; what the calls came to."""
    futures = []
    for _ in range(2):
        futures.append(client.forward_backward(datums(alternatives=False), "cross_entropy"))
        futures.append(client.forward_backward_custom(datums(), weighted_nll))
        futures.append(client.optim_step(ADAM))
    return [future.result(60) for future in futures]


@pytest.fixture(autouse=True)
def _quiet(quiet_sdk):
    pass


@pytest.fixture(scope="module")
def without_faults():
    """Parameters after two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKER_TELEMETRY", "0")
        with training() as (server, client):
            two_steps(client)
            return server.parameters(client.model_id)


ON_TRAINING = {"endpoints": ("forward_backward",)}


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("server_errors", ON_TRAINING),
        ("server_errors", {"endpoints": ("retrieve_future",)}),
        ("rate_limits", ON_TRAINING),
        ("rate_limits", {"endpoints": ("optim_step",)}),
        ("lost_requests", {"at_most": 1}),
        # Done before its answer was lost: what the client sends again must not be done again.
        ("lost_answers", ON_TRAINING | {"at_most": 1}),
        ("lost_answers", {"endpoints": ("optim_step",), "at_most": 1}),
        ("lost_answers", {"endpoints": ("retrieve_future",), "at_most": 1}),
        ("slow_futures", {"slow_seconds": 0.1}),
    ],
)
def test_the_parameters_are_those_of_a_run_without_faults(kind, where, without_faults):
    faults = Faults(**(QUICK | where | {kind: 1.0}))
    with training(faults, poll_seconds=0.02) as (server, client):
        assert all(two_steps(client))
        assert server.parameters(client.model_id).equal(without_faults)
        assert server.faults_struck == {kind: faults.at_most}


def test_latency_changes_no_parameters(without_faults):
    with training(Faults(latency=0.02)) as (server, client):
        two_steps(client)
        assert server.parameters(client.model_id).equal(without_faults)


@pytest.mark.parametrize("base", ["custom", "native"])
def test_a_nan_logprob_ends_in_an_error_that_says_where(base):
    with training(Faults(nan_logprobs=1.0, at_most=1)) as (server, client):
        submit = {
            "custom": lambda: client.forward_backward_custom(datums(), weighted_nll),
            "native": lambda: client.forward_backward(datums(alternatives=False), "cross_entropy"),
        }[base]
        with pytest.raises(NonFiniteError, match="nan"):
            submit().result(60)
        assert server.faults_struck == {"nan_logprobs": 1}
        assert submit().result(60)


def test_a_refused_loss_is_the_users_error_and_the_client_goes_on():
    with training(Faults(refused_losses=("ppo",))) as (server, client):
        with pytest.raises(tinker.RequestFailedError, match="asked to refuse the loss 'ppo'"):
            client.forward_backward(datums(), "ppo").result(60)
        assert server.faults_struck == {"refused_losses": 1}
        assert client.forward_backward_custom(datums(), weighted_nll).result(60)


def test_a_seed_strikes_the_same_requests_and_another_seed_others():
    def struck(seed):
        with SandboxServer(faults=Faults(seed=seed, lost_requests=0.2, rate_limits=0.5)) as server:
            plan = server._faults
            return [plan.on_the_way("optim_step") for _ in range(50)]

    assert struck(1) == struck(1) != struck(2)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"latency": -1}, "seconds from 0 to 60, got -1"),
        ({"server_errors": 1.5}, "a share from 0 to 1, got 1.5"),
        ({"nan_logprobs": True}, "a share from 0 to 1, got True"),
        ({"slow_seconds": float("nan")}, "seconds from 0 to 60, got nan"),
        ({"retry_after": 0}, "more than 0 seconds"),
        ({"seed": "a"}, "an integer of at least 0, got 'a'"),
        ({"at_most": -1}, "an integer of at least 0, got -1"),
        ({"refused_losses": "ppo"}, "a tuple of names, got 'ppo'"),
        ({"refused_losses": ("pppo",)}, "cispo, dro, got 'pppo'"),
        ({"endpoints": ("healthz",)}, "got 'healthz'"),
    ],
)
def test_options_are_checked_when_they_are_given(option, says):
    with pytest.raises(RequestError, match=says) as caught:
        Faults(**option)
    assert caught.value.path == f"faults.{next(iter(option))}"


def test_the_server_takes_faults_and_nothing_else():
    with pytest.raises(RequestError, match="expected Faults"):
        SandboxServer(faults={"latency": 1})
