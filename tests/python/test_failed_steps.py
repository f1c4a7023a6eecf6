"""What a step that failed means for the calls behind it: logged, named, and as on_failure says."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tinker
import torch
from tinker import types

from tinker_custom_loss import (
    RequestError,
    StoppedError,
    TermError,
    forward_backward_custom,
    with_regularizers,
)
from training import ADAM, Gate, datums, squares

SQUARES = {"fn": squares, "weight": 0.1, "name": "squares"}


def refused_by_the_server():
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints([1, 2]),
            loss_fn_inputs={"target_tokens": torch.tensor([1, 10**6])},
        )
    ]


def fails(data, logprobs):
    raise ZeroDivisionError("no tokens to divide by")


FAILS = {"fn": fails, "weight": 1.0, "name": "ratio"}


@pytest.fixture(params=["term", "server"])
def failing_step(request):
    """A function that submits a step which fails, and what its future then raises."""
    if request.param == "term":
        return lambda client: client.forward_backward_custom(datums(), None, [FAILS]), TermError

    def refused(client):
        return client.forward_backward_custom(refused_by_the_server(), None, [SQUARES])

    return refused, tinker.RequestFailedError


class TestContinue:
    def test_the_loss_of_the_step_is_logged_with_its_number(self, new_client, failing_step, caplog):
        submit, error = failing_step
        client = with_regularizers(new_client())
        client.forward_backward_custom(datums(), None, [SQUARES]).result(60)
        client.optim_step(ADAM)
        with caplog.at_level(logging.ERROR, "tinker_custom_loss"):
            failed = submit(client)
            optim = client.optim_step(ADAM)
            optim.result(60)
        (line,) = caplog.messages
        assert line.startswith("step 1")
        assert "contributes nothing: " in line
        with pytest.raises(error):
            failed.result(60)
        assert client.forward_backward_custom(datums(), None, [SQUARES]).result(60)
        assert client.acknowledge_failure() is None

    def test_also_by_the_plain_function(self, new_client, caplog):
        client = new_client()
        with (
            caplog.at_level(logging.ERROR, "tinker_custom_loss"),
            pytest.raises(tinker.RequestFailedError),
        ):
            forward_backward_custom(
                client, refused_by_the_server(), None, [SQUARES], step=7
            ).result(60)
        assert caplog.messages[0].startswith("step 7, which the server refused, contributes not")


class TestStop:
    @pytest.fixture
    def client(self, new_client):
        return with_regularizers(new_client(), on_failure="stop")

    def test_pipelined_and_later_calls_are_refused_until_acknowledged(
        self, client, sandbox, failing_step
    ):
        submit, error = failing_step
        before = sandbox.parameters(client.model_id)
        gate = Gate()
        first = client.forward_backward_custom(datums(), None, [gate.term()])
        failed = submit(client)
        behind = [client.optim_step(ADAM), client.forward_backward_custom(datums(), squares)]
        gate.open.set()
        first.result(60)
        with pytest.raises(error) as info:
            failed.result(60)
        for future in behind:
            with pytest.raises(StoppedError, match="refused, because step 0") as stopped:
                future.result(60)
            assert stopped.value.__cause__ is info.value
        with pytest.raises(StoppedError, match=r"call acknowledge_failure\(\) to go on"):
            client.optim_step(ADAM)
        with pytest.raises(StoppedError):
            client.forward_backward_custom(datums(), None, [SQUARES])
        with pytest.raises(StoppedError):
            asyncio.run(client.save_state_async("checkpoint"))
        assert client.get_info().model_id == client.model_id  # it reads, and trains nothing
        assert torch.equal(sandbox.parameters(client.model_id), before)

        assert client.acknowledge_failure() is info.value
        assert client.acknowledge_failure() is None
        client.forward_backward_custom(datums(), None, [SQUARES]).result(60)
        client.optim_step(ADAM).result(60)
        assert not torch.equal(sandbox.parameters(client.model_id), before)

    def test_what_waited_behind_the_failure_stays_refused(self, new_client):
        """Also if it was acknowledged before their turn came."""
        acknowledged = []

        class Acknowledges(tinker.TrainingClient):
            def forward_backward(self, *args, **kwargs):  # the last thing before the next turn
                acknowledged.append(client.acknowledge_failure())
                return super().forward_backward(*args, **kwargs)

        bare = new_client()
        bare.__class__ = Acknowledges
        client = with_regularizers(bare, on_failure="stop")
        gate, never = Gate(), Gate()
        client.forward_backward_custom(datums(), None, [gate.term()])
        failed = client.forward_backward_custom(datums(), None, [FAILS])
        behind = client.forward_backward_custom(datums(), None, [never.term()])
        gate.open.set()
        with pytest.raises(TermError) as info:
            failed.result(60)
        with pytest.raises(StoppedError):
            behind.result(60)
        assert acknowledged == [None, info.value]
        assert client.optim_step(ADAM).result(60)
        assert not never.reached.is_set()

    def test_a_step_that_its_caller_withdrew_stops_nothing(self, client):
        gate = Gate()
        step = client.forward_backward_custom(datums(), None, [gate.term()])
        withdrawn = client.forward_backward_custom(datums(), None, [SQUARES])
        optim = client.optim_step(ADAM)
        assert withdrawn.future().cancel()
        assert step.future().cancel()
        gate.open.set()
        assert optim.result(60)

    def test_the_option_is_checked(self, new_client):
        with pytest.raises(RequestError, match='"continue" or "stop", got \'ignore\' '):
            with_regularizers(new_client(), on_failure="ignore")


@pytest.mark.parametrize("term", ["sleeps", "busy"])
def test_a_step_under_way_does_not_keep_python_from_ending(sandbox, term):
    """Nor is anything sent for it, or said, while Python ends."""
    script = Path(__file__).with_name("leaves_a_step_behind.py")
    ran = subprocess.run(
        [sys.executable, "-W", "error", str(script), sandbox.url, term],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TINKER_TELEMETRY": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    ended = time.time()
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ended - float(ran.stdout) < 10
