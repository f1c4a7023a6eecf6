"""The sandbox as the official client sees it, and as a client that speaks JSON by hand does."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import tinker
import torch
from tinker import types
from tinker.proto import tinker_public_pb2 as pb

from tinker_custom_loss import RequestError
from tinker_custom_loss.sandbox import SandboxServer, api
from tinker_custom_loss.sandbox.errors import ClosedError
from tinker_custom_loss.sandbox.trainer import Trainer

TEXT = b"the quick brown fox jumps over the lazy dog, and the dog does not mind. " * 3


@pytest.fixture(autouse=True)
def _quiet_sdk(monkeypatch):
    monkeypatch.setenv("TINKER_TELEMETRY", "0")


@pytest.fixture
def server():
    with SandboxServer(seed=0) as server:
        yield server


@pytest.fixture
def connect():
    """Clients whose connections end with the test."""
    services = []

    def connect(server, seed=None):
        service = tinker.ServiceClient(base_url=server.url, api_key="tml-sandbox")
        services.append(service)
        return service.create_lora_training_client("any-model", rank=4, seed=seed).result()

    yield connect
    for service in services:
        holder = service.holder
        holder.run_coroutine_threadsafe(holder.aclose()).result()


def datums(alternatives=True):
    """Four texts, one of them with two alternatives at each position."""
    rows = [TEXT[i : i + 17 + i] for i in range(4)]
    data = []
    for i, row in enumerate(rows):
        targets = np.array(list(row[1:]), dtype=np.int64)
        if alternatives and i == 2:
            targets = np.stack([targets, (targets + 1) % 256], axis=1)
        weights = np.linspace(0.1, 1, targets.size, dtype=np.float32).reshape(targets.shape)
        data.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(list(row[:-1])),
                loss_fn_inputs={"target_tokens": targets, "weights": weights},
            )
        )
    return data


def weighted_nll(data, logprobs):
    weights = [datum.loss_fn_inputs["weights"].to_torch() for datum in data]
    loss = sum((-each * weight).sum() for each, weight in zip(logprobs, weights, strict=True))
    return loss, {"datums": float(len(data))}


ADAM = types.AdamParams(learning_rate=0.01, weight_decay=0.01, grad_clip_norm=1.0)


def train_built_in(client, data):
    future = client.forward_backward(data, "cross_entropy")
    client.optim_step(ADAM).result()
    return future.result()


def train_custom(client, data):
    future = client.forward_backward_custom(data, weighted_nll)
    client.optim_step(ADAM).result()
    return future.result()


def train_by_hand(client, data):
    outputs = client.forward(data, "cross_entropy").result().loss_fn_outputs
    logprobs = [output["logprobs"].to_torch().requires_grad_() for output in outputs]
    weighted_nll(data, logprobs)[0].backward()
    linear = [
        types.Datum(
            model_input=datum.model_input,
            loss_fn_inputs={
                "target_tokens": datum.loss_fn_inputs["target_tokens"],
                "weights": types.TensorData.from_torch(-each.grad),
            },
        )
        for datum, each in zip(data, logprobs, strict=True)
    ]
    result = client.forward_backward(linear, "cross_entropy").result()
    client.optim_step(ADAM).result()
    return result


def test_the_official_client_trains(server, connect):
    client = connect(server)
    data = datums()
    losses = [train_custom(client, data).metrics["loss:sum"] for _ in range(15)]
    assert losses[-1] < losses[0] / 2


def test_three_ways_to_train_give_the_same_parameters_bit_for_bit(server, connect):
    ends = []
    for train in (train_built_in, train_custom, train_by_hand):
        client = connect(server, seed=11)
        results = [train(client, datums()) for _ in range(4)]
        ends.append((server.parameters(client.model_id), results[-1]))
    (built_in, result), *others = ends
    assert not built_in.equal(server.parameters(connect(server, seed=11).model_id))
    for parameters, other in others:
        assert parameters.equal(built_in)
        assert other.metrics["loss:sum"] == pytest.approx(result.metrics["loss:sum"])


def test_logprobs_come_back_in_the_shapes_of_the_targets(server, connect):
    data = datums()
    output = connect(server).forward(data, "cross_entropy").result()
    logprobs = [each["logprobs"].to_torch() for each in output.loss_fn_outputs]
    targets = [datum.loss_fn_inputs["target_tokens"].to_torch() for datum in data]
    assert [each.shape for each in logprobs] == [each.shape for each in targets]
    assert sorted({each.ndim for each in logprobs}) == [1, 2]
    expected = weighted_nll(data, logprobs)[0].item()
    assert output.metrics == {"loss:sum": pytest.approx(expected, rel=1e-5)}


def test_sparse_targets_are_dense_ones_with_zeros(server, connect):
    dense = torch.zeros(6, 8, dtype=torch.int64)
    dense[1, 2], dense[4, 0] = 65, 66

    def logprobs(targets):
        weights = torch.zeros(6, 8)
        datum = types.Datum(
            model_input=types.ModelInput.from_ints([1, 2, 3, 4, 5, 6]),
            loss_fn_inputs={"target_tokens": targets, "weights": weights},
        )
        output = client.forward([datum], "cross_entropy").result()
        return output.loss_fn_outputs[0]["logprobs"].to_torch()

    client = connect(server)
    sparse = types.TensorData.from_torch_sparse(dense)
    assert sparse.sparse_crow_indices is not None
    assert logprobs(sparse).equal(logprobs(types.TensorData.from_torch(dense)))


def test_a_seed_gives_the_same_training_on_another_server(connect):
    ends = []
    for client_seed, server_seed in ((5, 0), (5, 1), (None, 5), (6, 5)):
        with SandboxServer(seed=server_seed) as server:
            client = connect(server, seed=client_seed)
            train_built_in(client, datums())
            ends.append(server.parameters(client.model_id))
    assert ends[0].equal(ends[1])
    assert ends[0].equal(ends[2])
    assert not ends[0].equal(ends[3])


def test_two_clients_train_two_models(server, connect):
    one, other = connect(server), connect(server)
    assert server.model_ids == [one.model_id, other.model_id]
    untouched = server.parameters(other.model_id)
    train_built_in(one, datums())
    assert server.parameters(other.model_id).equal(untouched)
    assert not server.parameters(one.model_id).equal(untouched)


@pytest.mark.parametrize("compress", [False, True])
def test_a_call_in_chunks_is_the_call(connect, compress):
    ends = []
    for config in ({}, {"fwdbwd_max_chunk_len": 1, "proto_compress_fwdbwd": compress}):
        with SandboxServer(client_config=config) as server:
            client = connect(server)
            results = [train_custom(client, datums()) for _ in range(2)]
            ends.append((server.parameters(client.model_id), results[-1].metrics))
    (whole, whole_metrics), (chunked, chunked_metrics) = ends
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-5)
    assert chunked_metrics == pytest.approx(whole_metrics, rel=1e-4)


def test_a_mistake_is_the_users_and_the_client_goes_on(server, connect):
    client = connect(server)
    wrong = types.Datum(
        model_input=types.ModelInput.from_ints([1, 2]),
        loss_fn_inputs={
            "target_tokens": np.array([3, 512]),
            "weights": np.ones(2, dtype=np.float32),
        },
    )
    with pytest.raises(tinker.RequestFailedError, match=r"token 512 is outside.*\[1\]") as error:
        client.forward_backward([wrong], "cross_entropy").result()
    assert error.value.category is types.RequestErrorCategory.User
    with pytest.raises(tinker.RequestFailedError, match="importance_sampling needs logprobs"):
        client.forward_backward(datums(), "importance_sampling").result()
    train_built_in(client, datums())


def test_what_is_not_a_loopback_address_is_refused():
    for host in ("0.0.0.0", "example.org", ""):
        with pytest.raises(RequestError, match="listens on loopback addresses alone"):
            SandboxServer(host=host)


class Json:
    """A client of the JSON dialect, on one connection."""

    def __init__(self, url, **headers):
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
        self._headers = {"Content-Type": "application/json", **headers}

    def post(self, endpoint, **body):
        return self.send(endpoint, json.dumps(body))

    def send(self, endpoint, body, **headers):
        headers = {**self._headers, **{k.replace("_", "-"): v for k, v in headers.items()}}
        self._connection.request("POST", f"/api/v1/{endpoint}", body, headers)
        response = self._connection.getresponse()
        return response.status, json.loads(response.read())

    def ask(self, method, endpoint):
        """The answer, of which a detail ends with "there is no X" where there is no such."""
        self._connection.request(method, f"/api/v1/{endpoint}", "{}", self._headers)
        answer = json.loads(self._connection.getresponse().read())
        if "detail" in answer:
            answer["detail"] = answer["detail"].partition(" here: docs/")[0]
        return answer

    def ok(self, endpoint, **body):
        status, answer = self.post(endpoint, **body)
        assert status == 200, answer
        return answer

    def result(self, endpoint, **body):
        request_id = self.ok(endpoint, **body)["request_id"]
        return self.ok("retrieve_future", request_id=request_id)

    def create_model(self, seed=0):
        session_id = self.ok("create_session", tags=[], sdk_version="0")["session_id"]
        self.ok("session_heartbeat", session_id=session_id)
        answer = self.ok(
            "create_model",
            session_id=session_id,
            model_seq_id=0,
            base_model="any",
            lora_config={"rank": 8, "seed": seed},
        )
        model_id = self.ok("retrieve_future", request_id=answer["request_id"])["model_id"]
        assert answer["model_id"] == model_id  # where Tinkex looks for it
        return model_id

    def close(self):
        self._connection.close()


@pytest.fixture
def by_hand(server):
    client = Json(server.url)
    yield client
    client.close()


def json_input(targets=(101, 108), weights=(1.0, 0.5), tokens=(72, 101), shape=None):
    inputs = {
        "target_tokens": {"data": list(targets), "dtype": "int64", "shape": shape},
        "weights": {"data": list(weights), "dtype": "float32", "shape": shape},
    }
    chunk = {"type": "encoded_text", "tokens": list(tokens)}
    datum = {"model_input": {"chunks": [chunk]}, "loss_fn_inputs": inputs}
    return {"data": [datum], "loss_fn": "cross_entropy"}


def test_the_json_dialect_trains_like_protobuf(server, connect, by_hand):
    model_id = by_hand.create_model(seed=3)
    call = {"model_id": model_id}
    forward = by_hand.result("forward", forward_input=json_input(), seq_id=1, **call)
    assert forward["type"] == "forward_backward"
    result = by_hand.result(
        "forward_backward", forward_backward_input=json_input(), seq_id=2, **call
    )
    assert result["loss_fn_outputs"] == forward["loss_fn_outputs"]
    (output,) = result["loss_fn_outputs"]
    assert output["logprobs"]["dtype"] == "float32"
    assert output["logprobs"]["shape"] == [2]
    first, second = output["logprobs"]["data"]
    assert result["metrics"]["loss:sum"] == pytest.approx(-first - 0.5 * second)
    step = by_hand.result(
        "optim_step", adam_params={"learning_rate": 0.01, "beta1": 0.9}, seq_id=3, **call
    )
    assert step["type"] == "optim_step"
    assert step["metrics"] == {}

    client = connect(server, seed=3)
    datum = types.Datum(
        model_input=types.ModelInput.from_ints([72, 101]),
        loss_fn_inputs={
            "target_tokens": np.array([101, 108]),
            "weights": np.array([1.0, 0.5], dtype=np.float32),
        },
    )
    client.forward_backward([datum], "cross_entropy").result()
    client.optim_step(types.AdamParams(learning_rate=0.01)).result()
    assert server.parameters(client.model_id).equal(server.parameters(model_id))


def test_calls_run_in_the_order_of_their_numbers(server, by_hand):
    in_order, shuffled = by_hand.create_model(), by_hand.create_model()
    calls = {
        1: ("forward_backward", {"forward_backward_input": json_input()}),
        2: ("optim_step", {"adam_params": {"learning_rate": 0.1}}),
        3: ("forward_backward", {"forward_backward_input": json_input(targets=(1, 2))}),
        4: ("optim_step", {"adam_params": {"learning_rate": 0.01}}),
    }
    for model_id, order in ((in_order, (1, 2, 3, 4)), (shuffled, (4, 2, 3, 1))):
        ids = [
            by_hand.ok(calls[n][0], model_id=model_id, seq_id=n, **calls[n][1])["request_id"]
            for n in order
        ]
        for request_id in ids:
            assert "error" not in by_hand.ok("retrieve_future", request_id=request_id)
    assert server.parameters(shuffled).equal(server.parameters(in_order))


def test_what_waits_behind_a_gap_says_for_what(connect):
    with SandboxServer(poll_seconds=0.01) as server:
        client = Json(server.url)
        model_id = client.create_model()
        answer = client.result("forward", model_id=model_id, seq_id=2, forward_input=json_input())
        client.close()
    assert answer["type"] == "try_again"
    assert answer["queue_state"] == "active"
    assert answer["queue_state_reason"] == "waiting for the request with seq_id 1"


def test_a_request_sent_twice_runs_once(server, by_hand):
    model_id = by_hand.create_model()
    before = server.parameters(model_id)
    step = {"model_id": model_id, "seq_id": 1, "adam_params": {"weight_decay": 0.5}}
    assert by_hand.result("optim_step", **step) == by_hand.result("optim_step", **step)
    torch.testing.assert_close(server.parameters(model_id), before * (1 - 1e-4 * 0.5))
    status, answer = by_hand.post("optim_step", **{**step, "adam_params": {}})
    assert status == 400
    assert "seq_id 1" in answer["detail"]
    assert "already used by another request; the next is 2" in answer["detail"]


def failing(by_hand, body, **headers):
    client, model_id = by_hand, by_hand.create_model()
    return client.result("forward_backward", model_id=model_id, seq_id=1, **body)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"targets": (1, 2.5)}, 'expected an integer, got 2.5 (at data[0].loss_fn_inputs["target'),
        ({"weights": (1.0, "nan")}, "expected a number, got 'nan' (at data[0].loss_fn_inputs[\"w"),
        ({"targets": (1, 2, 3)}, "target_tokens has shape [3], but the model input has 2 tokens"),
        ({"weights": (1.0,)}, "weights has shape [1], but target_tokens has [2]"),
        ({"shape": [3]}, "the shape [3] does not hold 2 values"),
        ({"tokens": (-1, 2)}, "token -1 is outside"),
    ],
)
def test_a_mistake_in_json_says_where(by_hand, change, says):
    answer = failing(by_hand, {"forward_backward_input": json_input(**change)})
    assert answer["category"] == "user"
    assert says in answer["error"]


@pytest.mark.parametrize(
    ("datum", "says"),
    [
        ("text", "expected an object (at data[0])"),
        ({}, "expected an object, got nothing (at data[0].model_input)"),
        (
            {"model_input": {"chunks": [{"type": "image"}]}, "loss_fn_inputs": {}},
            "reads chunks of encoded_text, not of image",
        ),
        (
            {"model_input": {"chunks": []}, "loss_fn_inputs": {}},
            "cross_entropy needs target_tokens (at data[0].loss_fn_inputs)",
        ),
        (
            {
                "model_input": {"chunks": []},
                "loss_fn_inputs": {"target_tokens": {"data": [], "dtype": "int64"}},
            },
            "cross_entropy needs weights",
        ),
        (
            {
                "model_input": {"chunks": []},
                "loss_fn_inputs": {"target_tokens": {"data": [], "dtype": "int8"}},
            },
            'expected a dtype of "float32" or "int64", got \'int8\'',
        ),
    ],
)
def test_a_datum_of_another_form_says_where(by_hand, datum, says):
    body = {"forward_backward_input": {"data": [datum], "loss_fn": "cross_entropy"}}
    assert says in failing(by_hand, body)["error"]


def test_no_datum_is_an_error(by_hand):
    body = {"forward_backward_input": {"data": [], "loss_fn": "cross_entropy"}}
    assert "no datum" in failing(by_hand, body)["error"]


def test_tinkex_gets_failures_in_its_own_form(server):
    client = Json(server.url, **{"User-Agent": "AsyncTinkex/Elixir 0.4.0"})
    answer = failing(client, {"forward_backward_input": json_input(weights=(1.0,))})
    client.close()
    assert answer["status"] == "failed"
    assert answer["error"]["category"] == "user"
    assert "weights has shape" in answer["error"]["message"]


def test_requests_that_cannot_be_read(by_hand):
    model_id = by_hand.create_model()
    session_id = model_id.partition(":")[0]
    protobuf = pb.ForwardBackwardRequest(model_id="nobody", seq_id=1).SerializeToString()
    for status, says, (got, answer) in [
        (400, "not JSON", by_hand.send("optim_step", "{")),
        (400, "must be a JSON object", by_hand.send("optim_step", "[]")),
        (400, "seq_id", by_hand.post("optim_step", model_id=model_id)),
        (400, "numbered from 1", by_hand.post("optim_step", model_id=model_id, seq_id=0)),
        (404, f"the models are: {model_id}", by_hand.post("forward", model_id="x", seq_id=1)),
        (404, "no model 'nobody'", by_hand.send("forward_backward", protobuf,
                                                Content_Type="application/x-protobuf")),
        (400, "not a ForwardBackwardRequest", by_hand.send("forward_backward", b"\xff",
                                                           Content_Type="application/x-protobuf")),
        (400, "not zstd", by_hand.send("forward", "{}", Content_Encoding="zstd")),
        (400, "zstd or plain, not in gzip", by_hand.send("forward", "{}", Content_Encoding="gzip")),
        (404, "no session 'x'", by_hand.post("create_model", session_id="x", model_seq_id=0)),
        (400, "'adamw' alone, not 'dimuon'",
         by_hand.post("create_model", session_id=session_id, model_seq_id=1,
                      optimizer_config={"type": "dimuon"})),
        (400, "expected an integer of 64 bits",
         by_hand.post("create_model", session_id=session_id, model_seq_id=1,
                      lora_config={"seed": 0.5})),
        (404, "no request 'x'", by_hand.post("retrieve_future", request_id="x")),
        (404, "or its result was dropped",
             by_hand.post("retrieve_future", request_id=f"{model_id}/9")),
        (400, "an object with chunks", by_hand.post("asample", prompt=[])),
        (404, "lists what the sandbox does", by_hand.post("copy_weights")),
    ]:  # fmt: skip
        assert got == status, answer
        assert says in answer["detail"]


def test_a_model_can_be_asked_about_and_unloaded(by_hand):
    model_id = by_hand.create_model()
    info = by_hand.ok("get_info", model_id=model_id)
    assert info["model_name"] == "any"
    assert info["lora_rank"] == 8
    assert by_hand.result("unload_model", model_id=model_id)["type"] == "unload_model"
    assert by_hand.post("get_info", model_id=model_id)[0] == 404


def test_closing_ends_connections_and_frees_the_port():
    server = SandboxServer()
    client = Json(server.url)
    client.create_model()
    server.close()
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
        client.ok("healthz")
    client.close()
    SandboxServer(port=urlsplit(server.url).port).close()


def test_closing_fails_what_waits():
    trainer = Trainer()
    run = trainer.run(trainer.create_model(trainer.create_session(), 0))
    run.submit(2, lambda model: {}, "behind a gap")
    future = run.future(2)
    trainer.close()
    with pytest.raises(ClosedError):
        future.result(timeout=30)


def test_the_command_serves_until_interrupted():
    command = [sys.executable, "-m", "tinker_custom_loss.sandbox", "--port", "0", "--seed", "4"]
    command += ["--fault", "rate_limits=1", "--fault", "endpoints=optim_step"]
    command += ["--fault", "endpoints=asample", "--session-seconds", "600"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            url = process.stdout.readline().split()[3]
            assert f'base_url="{url}"' in process.stdout.readline() + process.stdout.readline()
            client = Json(url)
            client.create_model()
            for struck in ("optim_step", "asample"):
                assert client.post(struck)[0] == 429
            client.close()
        finally:
            process.send_signal(signal.SIGINT)
        assert "sandbox ended" in process.communicate(timeout=30)[0]
        assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "listens on loopback addresses alone"),
        (["--threads", "0"], "expected at least 1"),
        (["--port", "99999"], "--port"),
        (["--load", "x"], "only an Erlang port names terms"),
        (["--state", f"{__file__}/below"], "--state: cannot make the directory: "),
        (["--session-seconds", "0"], "--session-seconds: expected more than 0 seconds"),
        (
            ["--fault", "lost_answer=1"],
            "--fault lost_answer: there is no such fault; known are: lost_a",
        ),
        (["--fault", "nosuch=1"], "slow_futures, server_errors, refused_losses, rate_limits\n"),
        (["--fault", "at_mots=1"], "known are: at_most, "),
        (["--fault", "lost_answers"], "expected lost_answers=NUMBER, got 'lost_answers'"),
        (["--fault", "lost_answers=2"], "--fault lost_answers: expected a share from 0 to 1"),
        (["--fault", "refused_losses=pppo"], "--fault refused_losses: expected some of cross_ent"),
        (["--erlang-port", "--fault", "latency=1"], "over HTTP only"),
    ],
)
def test_the_command_refuses_what_cannot_work(arguments, says, capsys):
    from tinker_custom_loss.sandbox.__main__ import main

    try:
        code = main(arguments)
    except SystemExit as exited:
        code = exited.code
    assert code == 2
    assert says in capsys.readouterr().err


def test_the_page_lists_the_endpoints_that_there_are(sandbox):
    page = (Path(__file__).parents[2] / "docs" / "sandbox.md").read_text(encoding="utf-8")
    table = page.partition("| endpoints |")[2].partition("\n\n")[0]
    cells = [row.split("|")[1] for row in table.splitlines()[2:]]
    listed = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    client = Json(sandbox.url)

    def is_there(endpoint):
        path = endpoint.replace("ID", "x").replace("KIND", "weights").replace("NAME", "x")
        answers = [client.ask(method, path) for method in ("GET", "POST", "PUT", "DELETE")]
        return any(answer.get("detail") != f"there is no {path}" for answer in answers)

    assert {name for name in listed if not is_there(name)} == set()
    assert not is_there("no_such_endpoint")
    client.close()
    known = sandbox._http.api._endpoints.keys() | {*api._TRAINING_CALLS, *api._STATE_CALLS}
    assert known - listed == {"save_weights_external"}  # which says that it is not there
