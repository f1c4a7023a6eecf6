"""The sandbox's model behind an Erlang port: the real process, over real pipes."""

import os
import subprocess
import sys

import pytest
import torch

from port_client import PortClient, batch
from tinker_custom_loss import TensorBatch
from tinker_custom_loss.sandbox import AdamParams, Examples, LanguageModel

TOKENS = [torch.tensor([72, 101, 108]), torch.tensor([1, 2])]
TARGETS = [torch.tensor([101, 108, 108]), torch.tensor([[2, 7], [3, 7]])]
WEIGHTS = [torch.tensor([1.0, 0.5, 0.0]), torch.tensor([[1.0, 2.0], [-1.0, 0.25]])]

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
    assert sandbox.ready["protocol"] == 2
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
        ("sample", {}, "protocol", 'unknown op "sample"'),
        ("forward", {"model": 99}, "request", "there is no model 99"),
        ("forward", {}, "protocol", '"model" is missing'),
        ("forward_backward", {"data": data(weights=None)}, "protocol", '"weights" is missing'),
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
                    "tokens": {"data": [0, 16], "dtype": "int64", "shapes": [[2], None]},
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
