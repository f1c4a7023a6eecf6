"""Both ways into the native face, through the official client and over HTTP."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tinker
import torch
from tinker import types

import tinker_custom_loss
from tinker_custom_loss import (
    Composer,
    NonFiniteError,
    RequestError,
    TermError,
    flatten,
    forward_backward_custom,
    forward_backward_custom_async,
    with_regularizers,
)
from tinker_custom_loss.sandbox.model import ForwardBackwardResult
from training import (
    ADAM,
    SDK,
    assert_same_parameters,
    datums,
    parameters_after,
    spread,
    squares,
    weighted_nll,
)

REGULARIZERS = [
    {"fn": squares, "weight": lambda step: 0.1 / (1 + step), "name": "squares"},
    {"fn": spread, "weight": -0.5, "name": "spread"},
]


def composed(step):
    """What ``REGULARIZERS`` and ``weighted_nll`` are at one step, written as one function."""

    def loss(data, logprobs):
        total = weighted_nll(data, logprobs)[0]
        for term in REGULARIZERS:
            weight = term["weight"](step) if callable(term["weight"]) else term["weight"]
            total = total + weight * term["fn"](data, logprobs)[0]
        return total, {}

    return loss


@pytest.fixture(params=["function", "client"])
def new_face(request, new_client):
    """A function that gives ``(client, forward_backward_custom)`` of one of the two ways in."""

    def new_face():
        client = new_client()
        if request.param == "client":
            client = with_regularizers(client)
            return client, client.forward_backward_custom
        return client, functools.partial(forward_backward_custom, client)

    return new_face


def failing(data, logprobs):
    raise ZeroDivisionError("no tokens to divide by")


class TestTraining:
    def test_fifty_pipelined_steps_end_as_fifty_awaited_ones(self, new_face, sandbox):
        data = datums()
        awaited, custom = new_face()
        expected = parameters_after(
            50, sandbox, awaited, lambda _, i: custom(data, weighted_nll, REGULARIZERS, step=i)
        )

        pipelined, custom = new_face()
        futures = []
        for i in range(50):
            futures.append(custom(data, weighted_nll, REGULARIZERS, step=i))
            futures.append(pipelined.optim_step(ADAM))
        for future in futures:
            future.result(120)
        assert torch.equal(sandbox.parameters(pipelined.model_id), expected)

    def test_it_trains_as_the_sdk_does_on_the_same_loss(self, new_face, new_client, sandbox):
        data = datums()
        ours, custom = new_face()
        theirs = new_client()
        got = parameters_after(
            5, sandbox, ours, lambda _, i: custom(data, weighted_nll, REGULARIZERS, step=i)
        )
        expected = parameters_after(
            5, sandbox, theirs, lambda c, i: c.forward_backward_custom(data, composed(i))
        )
        assert_same_parameters(got, expected)

    def test_without_regularizers_it_is_the_sdk(self, new_face, new_client, sandbox):
        data = datums()
        ours, custom = new_face()
        theirs = new_client()
        future = custom(data, weighted_nll)
        expected = theirs.forward_backward_custom(data, weighted_nll)
        assert type(future) is type(expected)
        assert future.result().metrics == expected.result().metrics
        got = parameters_after(5, sandbox, ours, lambda _, i: custom(data, weighted_nll))
        want = parameters_after(
            5, sandbox, theirs, lambda c, _: c.forward_backward_custom(data, weighted_nll)
        )
        assert torch.equal(got, want)

    def test_metrics_are_the_sdks_and_the_record(self, new_face):
        _, custom = new_face()
        metrics = custom(datums(), weighted_nll, REGULARIZERS, step=3).result().metrics
        terms = metrics["regularizers"]
        assert terms["squares"]["weight"] == 0.1 / 4
        assert metrics["base_loss"]["custom"] == {"datums": 4.0}
        total = metrics["base_loss"]["value"] + sum(t["contribution"] for t in terms.values())
        assert metrics["loss_total"] == pytest.approx(total)
        assert metrics["loss:sum"] == metrics["loss_total"]
        assert metrics["schedule_step"] == 3
        assert metrics["surrogate_loss:sum"] != metrics["loss:sum"]

    def test_flat_metrics_are_the_same_numbers(self, new_face):
        _, custom = new_face()
        data = datums()
        nested = custom(data, weighted_nll, REGULARIZERS, step=0).result().metrics
        flat = custom(data, weighted_nll, REGULARIZERS, step=0, flat_metrics=True).result().metrics
        assert all(isinstance(value, float) for value in flat.values())
        clocks = ("seconds", "compute_seconds")
        own = {k: v for k, v in nested.items() if ":" not in k}
        assert {k: v for k, v in flat.items() if ":" not in k and not k.endswith(clocks)} == {
            k: v for k, v in flatten(own).items() if not k.endswith(clocks)
        }

    @pytest.mark.skipif(SDK < (0, 32), reason="this SDK refuses arrays of one's own in a datum")
    def test_terms_see_arrays_that_are_never_sent(self, new_face):
        _, custom = new_face()
        data = datums(reference=lambda shape: torch.full(shape, -2.0).numpy())

        def distance(data, logprobs):
            references = [datum.loss_fn_inputs["reference"].to_torch() for datum in data]
            pairs = zip(logprobs, references, strict=True)
            return sum((x - y).abs().sum() for x, y in pairs), {}

        term = {"fn": distance, "weight": 1.0, "name": "distance"}
        assert custom(data, None, [term]).result().metrics["loss_total"] > 0

    def test_a_composer_may_stand_for_base_loss_and_regularizers(self, new_face):
        _, custom = new_face()
        data = datums()
        composer = Composer(weighted_nll, REGULARIZERS)
        once = custom(data, composer, step=2).result().metrics["loss_total"]
        assert once == custom(data, weighted_nll, REGULARIZERS, step=2).result().metrics["loss:sum"]

    def test_async(self, new_face, sandbox):
        data = datums()
        sync_client, custom = new_face()
        expected = parameters_after(
            3, sandbox, sync_client, lambda _, i: custom(data, weighted_nll, REGULARIZERS, step=i)
        )
        client, _ = new_face()

        async def train():
            for i in range(3):
                future = await forward_backward_custom_async(
                    client, data, weighted_nll, REGULARIZERS, step=i
                )
                optim = client.optim_step(ADAM)
                await future
                await optim

        asyncio.run(train())
        assert torch.equal(sandbox.parameters(client.model_id), expected)


class TestFailures:
    def test_a_failing_term_contributes_nothing_and_the_client_goes_on(
        self, new_face, sandbox, caplog
    ):
        data = datums()
        untroubled, custom = new_face()
        zero = [
            types.Datum(
                model_input=datum.model_input,
                loss_fn_inputs={
                    "target_tokens": datum.loss_fn_inputs["target_tokens"],
                    "weights": datum.loss_fn_inputs["weights"].to_numpy() * 0,
                },
            )
            for datum in data
        ]

        def zero_at_1(client, i):
            if i == 1:
                return client.forward_backward(zero, "cross_entropy")
            return custom(data, weighted_nll, REGULARIZERS, step=i)

        expected = parameters_after(3, sandbox, untroubled, zero_at_1)

        client, custom = new_face()
        bad = {"fn": failing, "weight": 1.0, "name": "ratio"}
        futures = []
        with caplog.at_level(logging.ERROR):
            for i in range(3):
                terms = [*REGULARIZERS, bad] if i == 1 else REGULARIZERS
                futures.append(custom(data, weighted_nll, terms, step=i))
                futures.append(client.optim_step(ADAM))
            with pytest.raises(TermError, match='"ratio" raised ZeroDivisionError: no tok') as info:
                futures.pop(2).result(60)
        assert isinstance(info.value.__cause__, ZeroDivisionError)
        for future in futures:
            future.result(60)
        assert torch.equal(sandbox.parameters(client.model_id), expected)
        assert 'step 1 contributes nothing: the term "ratio" raised' in caplog.text

    def test_non_finite_is_an_error_of_that_step_alone(self, new_face):
        _, custom = new_face()
        data = datums()

        def nan_gradient(data, logprobs):
            return (logprobs[1][2] - logprobs[1][2].detach()).sqrt() + logprobs[0].sum(), {}

        def infinite(data, logprobs):
            return logprobs[0].sum() - torch.inf, {}

        gradient = custom(data, None, [{"fn": nan_gradient, "weight": 1.0, "name": "root"}])
        loss = custom(data, None, [{"fn": infinite, "weight": 1.0, "name": "ratio"}])
        after = custom(data, None, REGULARIZERS, step=0)
        with pytest.raises(NonFiniteError) as info:
            gradient.result(60)
        assert (info.value.term, info.value.datum, info.value.token) == ("root", 1, (2,))
        with pytest.raises(NonFiniteError, match='"ratio" is -inf'):
            loss.result(60)
        assert after.result(60).metrics["loss_total"]

    def test_a_datum_that_no_term_touches_gets_zero_weights(self, new_face, new_client, sandbox):
        data = datums()

        def first_only(data, logprobs):
            return weighted_nll(data[:1], logprobs[:1])

        client, custom = new_face()
        term = {"fn": first_only, "weight": 1.0, "name": "first"}
        got = parameters_after(2, sandbox, client, lambda _, i: custom(data, None, [term]))
        other = new_client()
        want = parameters_after(
            2, sandbox, other, lambda c, _: c.forward_backward(data[:1], "cross_entropy")
        )
        assert_same_parameters(got, want)

    @pytest.mark.parametrize(
        "interruption", [KeyboardInterrupt, SystemExit, asyncio.CancelledError]
    )
    def test_not_even_an_interruption_in_a_term_ends_the_client(self, new_face, interruption):
        _, custom = new_face()

        def interrupts(data, logprobs):
            raise interruption("now")

        async def interrupts_async(data, logprobs):
            raise interruption("now")

        data = datums()
        first = custom(data, None, [{"fn": interrupts, "weight": 1.0, "name": "stop"}])
        second = custom(data, None, [{"fn": interrupts_async, "weight": 1.0, "name": "stop"}])
        for future in (first, second):
            with pytest.raises(TermError, match=interruption.__name__):
                future.result(60)
        assert custom(data, None, REGULARIZERS, step=0).result(60)

    def test_a_withdrawn_step_contributes_nothing(self, new_face, sandbox):
        if SDK < (0, 38) and isinstance(new_face()[1], functools.partial):
            pytest.skip("this SDK runs the loss before it returns")
        client, custom = new_face()
        before = sandbox.parameters(client.model_id)
        started = threading.Event()

        async def never_ends(data, logprobs):
            started.set()
            await asyncio.Event().wait()

        data = datums()
        future = custom(data, None, [{"fn": never_ends, "weight": 1.0, "name": "never"}])
        assert started.wait(60)
        optim = client.optim_step(types.AdamParams(learning_rate=0.01))
        assert future.future().cancel()
        with pytest.raises(concurrent.futures.CancelledError):
            future.result(60)
        optim.result(60)
        assert torch.equal(sandbox.parameters(client.model_id), before)
        assert custom(data, None, REGULARIZERS, step=0).result(60)

    def test_to_stop_waiting_is_not_to_withdraw(self, new_face):
        if SDK < (0, 38) and isinstance(new_face()[1], functools.partial):
            pytest.skip("this SDK runs the loss before it returns")
        _, custom = new_face()
        go_on = threading.Event()

        def waits(data, logprobs):
            go_on.wait(60)
            return squares(data, logprobs)

        future = custom(datums(), None, [{"fn": waits, "weight": 1.0, "name": "waits"}])
        with pytest.raises(TimeoutError):
            future.result(timeout=0.01)

        async def stop_waiting():
            with pytest.raises(TimeoutError):
                await future.result_async(timeout=0.01)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(future, 0.01)
            go_on.set()
            return await future

        assert asyncio.run(stop_waiting()).metrics["loss_total"] > 0
        assert concurrent.futures.wait([future.future()], 60).done


class TestArguments:
    """What is wrong with an argument is said before anything is sent."""

    @pytest.mark.parametrize(
        ("arguments", "options", "path"),
        [
            ((None, None), {}, "base_loss"),
            ((None, []), {}, "regularizers"),
            ((weighted_nll, {"fn": squares}), {}, "regularizers"),
            ((REGULARIZERS,), {}, "base_loss"),
            (("cross_entropy",), {}, "base_loss.fn"),
            ((weighted_nll, REGULARIZERS), {"step": "3"}, "step"),
            ((weighted_nll, REGULARIZERS), {"step": -1}, "step"),
            ((weighted_nll, REGULARIZERS), {"step": True}, "step"),
            ((Composer(weighted_nll), REGULARIZERS), {}, "regularizers"),
            (
                (None, [{"fn": squares, "weight": 1.0, "name": "a", "timeout": 1}]),
                {},
                "regularizers[0].timeout",
            ),
        ],
    )
    def test_refused_when_given(self, new_face, arguments, options, path):
        _, custom = new_face()
        with pytest.raises(RequestError) as info:
            custom(datums(), *arguments, **options)
        assert info.value.path == path
        assert custom(datums(), None, REGULARIZERS, step=0).result(60)

    @pytest.mark.parametrize("regularizers", [REGULARIZERS, None], ids=["composed", "plain"])
    @pytest.mark.parametrize(
        ("data", "path"),
        [
            (None, "data"),
            ("text", "data"),
            ({}, "data"),
            ([], "data"),
            (datums(1)[0], "data"),
            ([*datums(1), None], "data[1]"),
            ([[1, 2, 3]], "data[0]"),
            ([types.Datum(types.ModelInput.from_ints([1]), {})], "data[0].loss_fn_inputs"),
        ],
        ids=["None", "text", "dict", "empty", "one datum", "None in it", "tokens", "no targets"],
    )
    def test_data_that_is_none(self, new_face, data, path, regularizers):
        client, custom = new_face()
        with pytest.raises(RequestError) as info:
            custom(data, weighted_nll, regularizers, step=0)
        assert info.value.path == path
        with pytest.raises(RequestError):
            asyncio.run(
                forward_backward_custom_async(client, data, weighted_nll, regularizers, step=0)
            )
        assert custom(datums(), weighted_nll, REGULARIZERS, step=0).result(60)

    @pytest.mark.parametrize("regularizers", [REGULARIZERS, None], ids=["composed", "plain"])
    def test_a_generator_of_datums_is_their_list(self, new_face, regularizers):
        _, custom = new_face()
        listed = custom(datums(), weighted_nll, regularizers, step=0).result(60).metrics
        generated = custom((d for d in datums()), weighted_nll, regularizers, step=0).result(60)
        assert generated.metrics["loss:sum"] == listed["loss:sum"]

    @pytest.mark.parametrize("value", [None, "client", object(), tinker.TrainingClient])
    def test_a_client_that_is_none(self, value):
        with pytest.raises(RequestError, match=r"expected a tinker\.TrainingClient, got"):
            forward_backward_custom(value, datums(), weighted_nll)
        with pytest.raises(RequestError, match=r"expected a tinker\.TrainingClient, got"):
            asyncio.run(forward_backward_custom_async(value, datums(), None, REGULARIZERS, step=0))


class TestServersThatGiveNoLoss:
    """SkyRL's answers have no ``loss:sum``."""

    @pytest.fixture(autouse=True)
    def no_loss(self, monkeypatch):
        monkeypatch.setattr(ForwardBackwardResult, "metrics", {})

    @pytest.mark.parametrize("regularizers", [REGULARIZERS, None], ids=["composed", "plain"])
    def test_train_as_others(self, new_face, regularizers):
        _, custom = new_face()
        data = datums()
        for _ in range(2):
            output = custom(data, weighted_nll, regularizers, step=0).result(60)
        if regularizers:
            assert output.metrics["loss:sum"] == output.record["loss_total"]
            assert "surrogate_loss:sum" not in output.metrics
        assert output.loss_fn_outputs


@pytest.mark.skipif(not hasattr(tinker, "LossHandle"), reason="this SDK has no LossHandle")
class TestLossHandle:
    @pytest.fixture
    def handle(self):
        from tinker.lib.public_interfaces.custom_loss import trace_loss

        def loss(logprobs, weights):
            return -(logprobs * weights).sum(), {
                "custom/mass:sum": weights.sum(),
                "custom/level:mean": logprobs.mean(),
            }

        return lambda client: trace_loss(
            loss, {"logprobs": 1, "weights": 1}, client.holder.get_session_id()
        )

    def test_alone_it_is_the_sdks(self, new_face, handle):
        client, custom = new_face()
        data = datums(alternatives=False)
        metrics = custom(data, handle(client)).result(60).metrics
        assert metrics["custom/mass:sum"] == pytest.approx(
            sum(datum.loss_fn_inputs["weights"].to_numpy().sum() for datum in data)
        )

    def test_with_regularizers_it_is_a_base_loss(self, new_face, handle):
        client, custom = new_face()
        data = datums(alternatives=False)
        alone = custom(data, handle(client)).result(60).metrics
        metrics = custom(data, handle(client), REGULARIZERS, step=0).result(60).metrics
        assert metrics["base_loss"]["value"] == pytest.approx(alone["loss:sum"])
        custom_metrics = {k: v for k, v in alone.items() if k.startswith("custom/")}
        assert metrics["base_loss"]["custom"] == pytest.approx(custom_metrics)

    def test_a_missing_input_is_named(self, new_face, handle):
        client, custom = new_face()
        data = [
            types.Datum(d.model_input, {"target_tokens": d.loss_fn_inputs["target_tokens"]})
            for d in datums(alternatives=False)
        ]
        for regularizers in (REGULARIZERS, None):
            with pytest.raises(
                RequestError, match=r"datum\[0\] has no loss_fn_inputs\['weights'\]"
            ):
                custom(data, handle(client), regularizers)

    def test_an_input_of_another_rank_is_refused(self, new_face, handle):
        """[T] logprobs and [T,1] weights would broadcast to [T,T]."""
        client, custom = new_face()
        data = datums(alternatives=False)
        for datum in data:
            weights = datum.loss_fn_inputs["weights"].to_torch()
            datum.loss_fn_inputs["weights"] = types.TensorData.from_torch(weights[:, None])
        with pytest.raises(RequestError, match="has rank 2, but loss 'loss' declared weights"):
            custom(data, handle(client), REGULARIZERS, step=0)

    def test_that_of_another_session_is_refused(self, new_face, handle):
        client, custom = new_face()
        other, _ = new_face()
        for regularizers in (REGULARIZERS, None):
            with pytest.raises(RequestError, match="was created in session"):
                custom(datums(alternatives=False), handle(other), regularizers)
        assert custom(datums(alternatives=False), handle(client), REGULARIZERS, step=0).result(60)


def test_the_package_does_not_import_the_tinker_client():
    package = Path(tinker_custom_loss.__file__).parents[1]
    code = "import sys, tinker_custom_loss; sys.exit('tinker' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=package)
