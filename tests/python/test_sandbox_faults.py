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


def saved_sampled_and_loaded(server, client):
    """What a loop has of a model beside its training: samples, and what it goes on from."""
    client.forward_backward(datums(), "cross_entropy")
    client.optim_step(ADAM)
    path = client.save_state("saved").result(60).path
    client.save_weights_for_sampler("sampler").result(60)
    sampler = client.save_weights_and_get_sampling_client()
    sampler = sampler.result() if isinstance(sampler, tinker.APIFuture) else sampler
    params = tinker.SamplingParams(max_tokens=8, seed=1)
    prompt = tinker.ModelInput.from_ints(list(b"the "))
    (sequence,) = sampler.sample(prompt, 1, params).result(60).sequences
    client.forward_backward(datums(), "cross_entropy")
    client.optim_step(ADAM)
    client.load_state_with_optimizer(path).result(60)
    return [*sequence.tokens, *sequence.logprobs], server.parameters(client.model_id)


@pytest.fixture(scope="module")
def without_faults_saved():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKER_TELEMETRY", "0")
        with training() as (server, client):
            return saved_sampled_and_loaded(server, client)


@pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning")  # load_state
@pytest.mark.parametrize(
    ("kind", "endpoint"),
    [
        ("server_errors", "asample"),
        ("rate_limits", "save_weights_for_sampler"),
        ("lost_requests", "load_weights"),
        *(
            ("lost_answers", endpoint)
            for endpoint in ("asample", "save_weights", "save_weights_for_sampler", "load_weights")
        ),
    ],
)
def test_samples_and_checkpoints_are_those_of_a_run_without_faults(
    kind, endpoint, without_faults_saved
):
    faults = Faults(**{kind: 1.0}, retry_after=0.01, at_most=1, endpoints=(endpoint,))
    with training(faults) as (server, client):
        sampled, parameters = saved_sampled_and_loaded(server, client)
        assert sampled == without_faults_saved[0]
        assert parameters.equal(without_faults_saved[1])
        assert server.faults_struck == {kind: 1}


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


def test_a_nan_in_an_answer_that_no_term_reads_is_no_failure():
    """As that of a call without regularizers."""
    with training(Faults(nan_logprobs=1.0, at_most=1)) as (server, client):
        assert client.forward_backward(datums(), "cross_entropy", regularizers=[]).result(60)
        assert server.faults_struck == {"nan_logprobs": 1}


def test_a_refused_linear_pass_leaves_the_base_and_says_so(caplog):
    """The server takes the loss of the loop, and not the one that carries the regularizers."""
    with training(Faults(refused_losses=("cross_entropy",))) as (server, client):
        data = [
            tinker.Datum(
                model_input=datum.model_input,
                loss_fn_inputs={
                    "target_tokens": datum.loss_fn_inputs["target_tokens"],
                    "logprobs": datum.loss_fn_inputs["weights"],
                    "advantages": datum.loss_fn_inputs["weights"],
                },
            )
            for datum in datums(alternatives=False)
        ]
        step = client.forward_backward(data, "importance_sampling")
        optim = client.optim_step(ADAM)
        with pytest.raises(tinker.RequestFailedError, match="asked to refuse") as info:
            step.result(60)
        assert any("the regularizers' is not" in note for note in info.value.__notes__)
        assert optim.result(60)
        assert "the regularization of step 0" in caplog.text
        with training() as (other, bare):
            bare.forward_backward(data, "importance_sampling", regularizers=[])
            bare.optim_step(ADAM).result(60)
            assert server.parameters(client.model_id).equal(other.parameters(bare.model_id))


def test_of_a_loss_that_is_refused_in_part_nothing_wrong_is_said(caplog):
    """The SDK sends a call in several chunks: those that were taken are accumulated."""
    refused = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, 2]),
        loss_fn_inputs={"target_tokens": [1, 10**6], "weights": [1.0, 1.0]},
    )
    with training(client_config={"fwdbwd_max_chunk_len": 2}) as (server, client):
        step = client.forward_backward([*datums(alternatives=False)[:2], refused], "cross_entropy")
        with pytest.raises(tinker.RequestFailedError, match="vocabulary"):
            step.result(60)
        assert server.model(client.model_id).gradient_flat().any()
        (line,) = caplog.messages
        assert line.startswith("the regularization of step 0, whose own loss the server refused, c")


def test_a_service_that_stays_away_ends_in_an_error_and_not_in_silence(caplog):
    """What was accumulated is said; the client is not to go on as if nothing had been."""
    with training() as (server, client):
        client.forward_backward(datums(), "cross_entropy").result(60)
        server._trainer.unload_model(client.model_id)
        step = client.forward_backward(datums(), "cross_entropy")
        with pytest.raises(tinker.TinkerError, match="there is no model"):
            step.result(60)
        assert "of step 0, whose own loss the server refused, contributes nothing" in caplog.text


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
