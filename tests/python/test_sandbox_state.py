"""Checkpoints of the sandbox: saved, loaded, listed, deleted, and found again after a restart."""

import pytest
import tinker
import torch
from tinker import types

from tinker_custom_loss import RequestError
from tinker_custom_loss.sandbox import SandboxServer
from tinker_custom_loss.sandbox.errors import ExpiredError, UnknownError
from tinker_custom_loss.sandbox.futures import Futures
from tinker_custom_loss.sandbox.trainer import Trainer
from training import ADAM, SDK, datums

pytestmark = pytest.mark.skipif(SDK < (0, 38), reason="written for the calls of newer SDKs")


@pytest.fixture
def connect(quiet_sdk):
    holders = []

    def connect(server):
        service = tinker.ServiceClient(base_url=server.url, api_key="tml-sandbox")
        holders.append(service.holder)
        return service

    yield connect
    for holder in holders:
        holder.run_coroutine_threadsafe(holder.aclose()).result()


def train(client, steps):
    for _ in range(steps):
        client.forward_backward(datums(), "cross_entropy")
        client.optim_step(ADAM).result()


def test_training_goes_on_to_the_bit_where_it_was_saved_with_its_optimizer(tmp_path, connect):
    with SandboxServer(state=tmp_path) as server:
        client = connect(server).create_lora_training_client("any", rank=4).result()
        train(client, 2)
        path = client.save_state("two-steps", user_metadata={"kl": "0.1"}).result().path
        train(client, 2)
        expected = server.parameters(client.model_id)
    with SandboxServer(seed=5, state=tmp_path) as server:
        service = connect(server)
        resumed = service.create_training_client_from_state_with_optimizer(path).result()
        train(resumed, 2)
        assert torch.equal(server.parameters(resumed.model_id), expected)
        anew = service.create_training_client_from_state(path).result()
        train(anew, 2)
        assert not torch.equal(server.parameters(anew.model_id), expected)
        (found,) = (
            tinker.RestClient(base_url=server.url, api_key="tml-sandbox")
            .list_user_checkpoints()
            .result()
            .checkpoints
        )
        assert found.tinker_path == path
        assert found.user_metadata == {"kl": "0.1"}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_loads_a_state_in_the_order_of_its_calls(sandbox, connect):
    client = connect(sandbox).create_lora_training_client("any").result()
    train(client, 1)
    saved = client.save_state("here")
    before = sandbox.parameters(client.model_id)
    train(client, 1)
    client.load_state_with_optimizer(saved.result().path).result()
    assert torch.equal(sandbox.parameters(client.model_id), before)


def test_a_sampler_of_saved_weights_draws_what_one_of_the_model_does(sandbox, connect):
    service = connect(sandbox)
    client = service.create_lora_training_client("any").result()
    train(client, 2)
    path = client.save_weights_for_sampler("s").result().path
    params = types.SamplingParams(max_tokens=5, seed=1)
    prompt = types.ModelInput.from_ints(list(b"the "))
    answers = [
        sampler.result().sample(prompt, 2, params).result()
        for sampler in (
            service.create_sampling_client(model_path=path),
            client.save_weights_and_get_sampling_client(),
        )
    ]
    first, second = ([each.tokens for each in answer.sequences] for answer in answers)
    assert first == second
    with pytest.raises(tinker.NotFoundError, match="there is no checkpoint"):
        service.create_sampling_client(model_path=path + "x").result()


def test_checkpoints_are_listed_told_to_expire_and_deleted(sandbox, connect):
    client = connect(sandbox).create_lora_training_client("any", rank=4).result()
    path = client.save_state("a").result().path
    client.save_weights_for_sampler("b", ttl_seconds=3600).result()
    rest = tinker.RestClient(base_url=sandbox.url, api_key="tml-sandbox")
    found = rest.list_checkpoints(client.model_id).result().checkpoints
    assert [(c.checkpoint_id, c.checkpoint_type) for c in found] == [
        ("sampler_weights/b", "sampler"),
        ("weights/a", "training"),
    ]
    assert found[0].expires_at is not None
    run = rest.get_training_run(client.model_id).result()
    assert run.last_checkpoint.tinker_path == path
    assert run.lora_rank == 4
    rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
    assert rest.list_checkpoints(client.model_id).result().checkpoints[1].expires_at is not None
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert len(rest.list_user_checkpoints().result().checkpoints) == 1
    with pytest.raises(tinker.NotFoundError, match="there is no checkpoint"):
        rest.delete_checkpoint_from_tinker_path(path).result()
    session = rest.get_session(client.holder.get_session_id()).result()
    assert session.training_run_ids == [client.model_id]


def test_a_name_is_taken_once_unless_it_is_overwritten(sandbox, connect):
    client = connect(sandbox).create_lora_training_client("any").result()
    client.save_state("a").result()
    with pytest.raises(tinker.RequestFailedError, match="save with overwrite=True"):
        client.save_state("a").result()
    client.save_state("a", overwrite=True).result()
    with pytest.raises(tinker.RequestFailedError, match="letters, digits"):
        client.save_state("a/b").result()


def test_a_finished_session_is_gone(sandbox, connect):
    service = connect(sandbox)
    client = service.create_lora_training_client("any").result()
    service.close("success").result()
    with pytest.raises(RequestError, match="there is no model"):
        sandbox.model(client.model_id)


def test_a_directory_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"not safe")
    with pytest.raises(RequestError, match=r"x\.safetensors is no checkpoint of a sandbox"):
        SandboxServer(state=tmp_path)


def test_results_are_kept_in_bounded_bytes_and_those_retrieved_go_first():
    class Result:
        nbytes = 1 << 20

    futures = Futures(limit=4 << 20)
    for i in range(4):
        futures.add(f"m/{i}").set_result(Result())
        if i == 2:
            futures.retrieved("m/2")
    waiting = futures.add("m/9")
    assert futures.get("m/0").done()
    with pytest.raises(UnknownError, match=r"no request 'm/2' .* dropped: the sandbox keeps 4 MiB"):
        futures.get("m/2")
    assert futures.get("m/9") is waiting


def test_no_two_sandboxes_have_a_session_of_one_name(connect):
    with SandboxServer() as first, SandboxServer() as second:
        ids = {connect(server).holder.get_session_id() for server in (first, second)}
    assert len(ids) == 2


def test_a_session_of_which_nothing_is_heard_expires_with_its_models():
    now = 0.0
    trainer = Trainer(session_seconds=30, clock=lambda: now)
    silent, heard = trainer.create_session(), trainer.create_session()
    models = [trainer.create_model(session, 0) for session in (silent, heard)]
    now = 20.0
    trainer.check_session(heard)
    now = 40.0
    for _ in range(2):
        with pytest.raises(ExpiredError, match="nothing was heard of it for 30 s"):
            trainer.run(models[0])
    assert trainer.run(models[1]).model_id == models[1]
    assert list(trainer.sessions) == [heard]
    now = 80.0  # of neither anything is heard, and nobody names them
    trainer.check_session(trainer.create_session())
    assert trainer.model_ids == []
    trainer.close()


def test_an_expired_session_is_gone_for_its_client(connect):
    with SandboxServer(session_seconds=1e-9) as server:
        with pytest.raises(tinker.APIStatusError, match="has expired") as caught:
            connect(server).create_lora_training_client("any-model").result(60)
        assert caught.value.status_code == 410
    for wrong in (0, -1, True, "10"):
        with pytest.raises(RequestError, match="more than 0 seconds"):
            SandboxServer(session_seconds=wrong)


@pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning")  # create_rest_client
def test_lists_come_in_pages(sandbox, connect):
    service = connect(sandbox)
    clients = [service.create_lora_training_client("any", rank=4).result() for _ in range(3)]
    rest = service.create_rest_client()
    runs = rest.list_training_runs(limit=2, offset=1).result()
    assert [run.training_run_id for run in runs.training_runs] == [
        client.model_id for client in reversed(clients[:2])
    ]
    assert rest.list_training_runs(project_id="somewhere-else").result().training_runs == []
    sessions = [service.holder.get_session_id()]
    for _ in range(2):
        another = connect(sandbox)
        another.create_lora_training_client("any", rank=4).result()
        sessions.insert(0, another.holder.get_session_id())
    assert list(rest.list_sessions(limit=2).result().sessions) == sessions[:2]
    assert list(rest.list_sessions(limit=2, offset=2).result().sessions) == sessions[2:]
