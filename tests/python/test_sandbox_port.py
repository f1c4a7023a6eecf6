"""The sandbox's model behind an Erlang port: the real process, over real pipes."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from port_client import PortClient, batch
from tinker_custom_loss import TensorBatch
from tinker_custom_loss.port.shapes import pack_shapes
from tinker_custom_loss.sandbox import AdamParams, Examples, LanguageModel
from tinker_custom_loss.sandbox.losses import loss_named

TOKENS = [torch.tensor([72, 101, 108]), torch.tensor([1, 2])]
TARGETS = [torch.tensor([101, 108, 108]), torch.tensor([[2, 7], [3, 7]])]
WEIGHTS = [torch.tensor([1.0, 0.5, 0.0]), torch.tensor([[1.0, 2.0], [-1.0, 0.25]])]

ONE_MISSING = pack_shapes([(2,), None])

TERMS = '''
import torch

def smoothness(data, logprobs, power=2):
    """Squared differences between neighbours, of the datums with one target a position."""
    assert len(data[0].loss_fn_inputs["target_tokens"].to_numpy()) == 3
    return (logprobs[0].diff() ** power).sum(), {}

async def across(data, logprobs):
    return torch.exp(logprobs[0].mean() - logprobs[1].mean()), {}

def deaf(data, logprobs):
    return sum(each.detach().sum() for each in logprobs) + 0 * logprobs[0].sum(), {}
'''


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    terms = tmp_path_factory.mktemp("terms") / "sandbox_terms.py"
    terms.write_text(TERMS)
    with PortClient("--erlang-port", load=[terms], module="tinker_custom_loss.sandbox") as client:
        yield client
        client.hang_up()
        client.process.wait(60)  # it ends with its host


def data(**inputs):
    inputs = {"target_tokens": TARGETS, "weights": WEIGHTS, **inputs}
    return {
        "count": 2,
        "tokens": batch(*TOKENS),
        "inputs": {key: batch(*value) for key, value in inputs.items() if value is not None},
    }


def examples():
    return Examples(*map(TensorBatch.from_tensors, (TOKENS, TARGETS, WEIGHTS)))


def create(sandbox, seed=0):
    return result(sandbox.ask("create_model", seed=seed))["model"]


def result(reply):
    assert reply["op"] == "result", reply
    return reply


def test_it_says_what_it_is(sandbox):
    assert sandbox.ready["op"] == "ready"
    assert sandbox.ready["protocol"] == 3
    assert sandbox.ready["vocabulary"] == 512


@pytest.fixture
def _one_thread():
    """As the process behind the port has: sums of floats depend on how they are split."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
def test_it_is_the_model_of_the_other_faces(sandbox):
    model, twin = create(sandbox, seed=9), LanguageModel(seed=9)
    for _ in range(3):
        forward = result(sandbox.ask("forward", model=model, data=data()))
        reply = result(sandbox.ask("forward_backward", model=model, data=data()))
        expected = twin.forward_backward(examples())
        answers = zip(reply["logprobs"], forward["logprobs"], strict=True)
        for (got, alone), logprobs in zip(answers, expected.logprobs.tensors(), strict=True):
            assert got.equal(logprobs)
            assert alone.equal(logprobs)
        assert reply["metrics"] == forward["metrics"] == expected.metrics
        reply = result(sandbox.ask("parameter_gradients", model=model))
        assert reply["gradients"][0].equal(twin.gradient_flat())
        reply = result(sandbox.ask("optim_step", model=model, adam_params={"learning_rate": 0.01}))
        assert reply["metrics"] == twin.optim_step(AdamParams(learning_rate=0.01))
    (parameters,) = result(sandbox.ask("parameters", model=model))["parameters"]
    assert parameters.equal(twin.parameters_flat())


def test_forward_needs_no_weights(sandbox):
    reply = result(sandbox.ask("forward", model=create(sandbox), data=data(weights=None)))
    assert [list(each.shape) for each in reply["logprobs"]] == [[3], [2, 2]]


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize(
    ("loss_fn", "config"),
    [
        ("cross_entropy", None),
        ("importance_sampling", None),
        ("ppo", {"clip_low_threshold": 0.9}),
        ("cispo", {"clip_high_threshold": 2.0}),
        ("dro", {"beta": 0.5}),
    ],
)
def test_the_losses_are_those_of_the_service(sandbox, loss_fn, config):
    sampler = [torch.full(each.shape, -6.2) for each in TARGETS]
    columns = {"logprobs": sampler, "advantages": WEIGHTS}
    asked = {"data": data(**columns), "loss_fn": loss_fn, "loss_fn_config": config}
    model, twin = create(sandbox, seed=4), LanguageModel(seed=4)
    reply = result(sandbox.ask("forward_backward", model=model, **asked))
    read = {name: TensorBatch.from_tensors(values) for name, values in columns.items()}
    expected = twin.forward_backward(
        dataclasses.replace(examples(), **read), loss_named(loss_fn, config)
    )
    assert reply["metrics"] == expected.metrics
    (gradient,) = result(sandbox.ask("parameter_gradients", model=model))["gradients"]
    assert gradient.equal(twin.gradient_flat())


def test_a_sampler_keeps_the_weights_that_it_was_made_of(sandbox):
    model = create(sandbox, seed=2)
    sampler = result(sandbox.ask("save_for_sampling", model=model))["sampler"]

    def draw(**params):
        return result(
            sandbox.ask(
                "sample",
                sampler=sampler,
                prompt=batch(TOKENS[0]),
                sampling_params={"max_tokens": 5, **params},
                num_samples=3,
                prompt_logprobs=True,
            )
        )

    first = draw(seed=1)
    assert [each.shape for each in first["tokens"]] == [(5,)] * 3
    assert first["stopped"] == [False] * 3
    result(sandbox.ask("forward_backward", model=model, data=data()))
    result(sandbox.ask("optim_step", model=model, adam_params={"learning_rate": 0.1}))
    again = draw(seed=1)
    for key in ("tokens", "logprobs"):
        assert all(a.equal(b) for a, b in zip(first[key], again[key], strict=True))
    assert not all(
        a.equal(b) for a, b in zip(draw()["tokens"], draw()["tokens"], strict=True)
    )  # each without a seed has one of its own

    # What it thinks of a text is what forward says of the same tokens as targets.
    twin = LanguageModel(seed=2)
    text = TensorBatch.from_tensors([TOKENS[0][:-1]]), TensorBatch.from_tensors([TOKENS[0][1:]])
    expected = twin.forward(Examples(*text)).logprobs.tensors()[0]
    (prompt_logprobs,) = first["prompt_logprobs"]
    assert prompt_logprobs[0].isnan()
    torch.testing.assert_close(prompt_logprobs[1:], expected)


def test_a_state_outlives_the_process_and_goes_on_bit_equal(tmp_path):
    def train(client, model):
        result(client.ask("forward_backward", model=model, data=data()))
        result(client.ask("optim_step", model=model, adam_params={"learning_rate": 0.1}))
        return result(client.ask("parameters", model=model))["parameters"][0]

    options = ("--erlang-port", "--state", str(tmp_path / "state"))
    with PortClient(*options, module="tinker_custom_loss.sandbox") as client:
        model = create(client)
        train(client, model)
        path = result(client.ask("save_state", model=model, name="one"))["path"]
        taken = client.ask("save_state", model=model, name="one")
        assert "there is a checkpoint" in taken["error"]["message"]
        expected = train(client, model)
    with PortClient(*options, module="tinker_custom_loss.sandbox") as client:
        model = create(client, seed=5)
        result(client.ask("load_state", model=model, path=path, optimizer=True))
        assert train(client, model).equal(expected)
        result(client.ask("load_state", model=model, path=path, optimizer=False))
        assert not train(client, model).equal(expected)  # its moments are new


def test_models_are_apart(sandbox):
    one, other = create(sandbox), create(sandbox)
    result(sandbox.ask("forward_backward", model=one, data=data()))
    gradients = result(sandbox.ask("parameter_gradients", model=other))["gradients"]
    assert not gradients[0].any()


def test_the_linearized_gradient_is_checked_end_to_end(sandbox):
    model = create(sandbox)
    reply = result(
        sandbox.ask(
            "check_gradient",
            model=model,
            data=data(),
            base_loss={"fn": "nll", "params": {"reduction": "token_sum"}},
            regularizers=[
                {
                    "name": "smooth",
                    "fn": "sandbox_terms:smoothness",
                    "weight": 0.1,
                    "params": {"power": 2},
                },
                {"name": "across", "fn": "sandbox_terms:across", "weight": 0.3},
                {"name": "l2", "fn": "l2", "weight": 0.01},
            ],
        )
    )
    assert reply["max_abs_gradient"] > 0.1
    assert reply["max_abs_difference"] < 1e-6
    gradients = result(sandbox.ask("parameter_gradients", model=model))["gradients"]
    assert not gradients[0].any()


@pytest.mark.parametrize(
    ("op", "fields", "kind", "says"),
    [
        ("dream", {}, "protocol", 'unknown op "dream"'),
        ("forward", {"model": 99}, "request", "there is no model 99"),
        ("forward", {}, "protocol", '"model" is missing'),
        (
            "forward_backward",
            {"data": data(weights=None)},
            "request",
            "cross_entropy needs weights",
        ),
        ("forward_backward", {"data": data(), "loss_fn": "ppo"}, "request", "ppo needs logprobs"),
        ("forward", {"data": data(), "loss_fn": "mse"}, "request", "not 'mse'"),
        ("sample", {"sampler": 9, "prompt": batch(TOKENS[0])}, "request", "no sampler 9"),
        ("save_state", {"model": 0, "name": "a/b"}, "request", "a checkpoint's name has"),
        ("load_state", {"model": 0, "path": "tinker://x"}, "request", "no checkpoint"),
        (
            "forward_backward",
            {"data": data(weights=[torch.ones(3), torch.ones(2)])},
            "request",
            "weights has shape [2], but target_tokens has [2, 2]",
        ),
        (
            "forward",
            {
                "data": {
                    **data(),
                    "tokens": {
                        "data": [0, 16],
                        "dtype": "int64",
                        "shapes": pack_shapes([(2,), None]),
                    },
                }
            },
            "request",
            "datum 1 has no tensor at `data.tokens.shapes[1]`",
        ),
        (
            "forward",
            {"data": data(target_tokens=[torch.ones(3), torch.ones(2)])},
            "request",
            "expected an integer dtype at `data.inputs.target_tokens.dtype`",
        ),
        ("optim_step", {"adam_params": {"beta1": 1.0}}, "request", "invalid beta1"),
        ("create_model", {"seed": "x"}, "protocol", "expected an integer at `seed`"),
        (
            "check_gradient",
            {"data": data(), "regularizers": [{"name": "x", "fn": "l3", "weight": 1.0}]},
            "request",
            'there is no term "l3"',
        ),
    ],
)
def test_a_mistake_is_answered_and_the_next_request_served(sandbox, op, fields, kind, says):
    if op in ("forward_backward", "optim_step", "check_gradient") or "data" in fields:
        fields = {"model": create(sandbox), **fields}
    reply = sandbox.ask(op, **fields)
    assert reply["op"] == "error"
    assert reply["error"]["kind"] == kind
    assert says in reply["error"]["message"]
    create(sandbox)


def test_a_frame_that_is_no_request_is_answered(sandbox):
    sandbox.send_frame(b"\xc1")
    reply = sandbox.receive()
    assert (reply["op"], reply["id"], reply["error"]["kind"]) == ("error", None, "protocol")
    create(sandbox)


def test_what_cannot_be_loaded_is_the_first_frame(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("raise ValueError('no')")
    with PortClient("--erlang-port", load=[broken], module="tinker_custom_loss.sandbox") as client:
        assert client.ready["error"]["kind"] == "startup"
        assert client.process.wait(60) == 1


def test_without_a_host_it_says_for_whom_it_is():
    command = [sys.executable, "-m", "tinker_custom_loss.sandbox", "--erlang-port"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert run.returncode == 2
    assert "for a host that holds file descriptors 3 and 4" in run.stderr
