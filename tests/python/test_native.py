"""The server's own loss with regularizers: one more pass, and the gradient of the whole."""

from __future__ import annotations

import asyncio
import logging
import random

import numpy as np
import pytest
import tinker
import torch

from tinker_custom_loss import Composer, RequestError, StoppedError, TermError, with_regularizers
from tinker_custom_loss.terms import columns, kl, l2
from training import (
    ADAM,
    ALONG_THE_GRADIENT,
    Gate,
    assert_same_parameters,
    datums,
    spread,
    squares,
    weighted_nll,
)

SQUARES = {"fn": squares, "weight": 0.1, "name": "squares"}
SPREAD = {"fn": spread, "weight": 0.3, "name": "spread"}


def fails(data, logprobs):
    raise ZeroDivisionError("no tokens to divide by")


FAILS = {"fn": fails, "weight": 1.0, "name": "ratio"}


class Counting(tinker.TrainingClient):
    """Notes which passes are asked of it."""

    def forward(self, data, *args, **kwargs):
        self.passes.append("forward")
        return super().forward(data, *args, **kwargs)

    def forward_backward(self, data, loss_fn, *args, **kwargs):
        self.passes.append((loss_fn, [sorted(datum.loss_fn_inputs) for datum in data]))
        return super().forward_backward(data, loss_fn, *args, **kwargs)


@pytest.fixture
def counting(new_client):
    client = new_client()
    client.__class__ = Counting
    client.passes = []
    return client


def policy_data():
    """Of each datum the first half is the prompt, as tinker-cookbook's RL loops send it."""

    def after_prompt(make):
        def column(shape):
            values = make(shape).astype(np.float32)
            values[: shape[0] // 2] = 0
            return values

        return column

    data = datums(
        alternatives=False,
        logprobs=after_prompt(lambda shape: -np.linspace(4, 6, shape[0])),
        advantages=after_prompt(lambda shape: np.linspace(-1, 1, shape[0])),
    )
    for datum in data:
        del datum.loss_fn_inputs["weights"]
    return data


class TestCrossEntropy:
    def test_the_gradient_is_that_of_the_whole_loss(self, new_client, sandbox, counting):
        """To 1e-6, without a forward pass."""
        data = datums()
        native = with_regularizers(counting, regularizers=[SQUARES, SPREAD])
        whole = with_regularizers(new_client(), regularizers=[SQUARES, SPREAD])
        for _ in range(3):
            output = native.forward_backward(data, "cross_entropy")
            native.optim_step(ADAM)
            want = whole.forward_backward_custom(data, weighted_nll).result(60)
            whole.optim_step(ADAM).result(60)
        assert_same_parameters(
            sandbox.parameters(native.model_id), sandbox.parameters(whole.model_id)
        )
        assert [loss for loss, _ in counting.passes] == ["cross_entropy"] * 6
        got = output.result(60)
        assert got.record.keys() == want.record.keys()
        assert got.record["loss_total"] == pytest.approx(want.record["loss_total"], rel=1e-4)
        assert got.record["base_loss"].keys() == want.record["base_loss"].keys()
        for name in ("squares", "spread"):
            term, same = got.record["regularizers"][name], want.record["regularizers"][name]
            assert term.keys() == same.keys()
            assert term["value"] == pytest.approx(same["value"], rel=1e-4)
            assert term["cosine_to_total"] is None  # the server's gradient is not known here

    def test_the_servers_output_stays_where_it_was(self, new_client):
        data = datums()
        bare = new_client().forward_backward(data, "cross_entropy").result(60)
        client = with_regularizers(new_client(), regularizers=[SQUARES], flat_metrics=True)
        got = client.forward_backward(data, "cross_entropy").result(60)
        assert bare.metrics.items() <= got.metrics.items()
        assert got.metrics["base_loss/value"] == bare.metrics["loss:sum"]
        assert got.metrics["loss_total"] == pytest.approx(
            bare.metrics["loss:sum"] + got.metrics["regularizers/squares/contribution"]
        )
        assert isinstance(got.metrics["surrogate_loss:sum"], float)
        assert got.loss_fn_output_type == bare.loss_fn_output_type
        for mine, theirs in zip(got.loss_fn_outputs, bare.loss_fn_outputs, strict=True):
            assert mine.keys() == theirs.keys()
            assert np.array_equal(mine["logprobs"].to_numpy(), theirs["logprobs"].to_numpy())

    def test_arrays_that_only_terms_read_stay_here(self, counting):
        data = datums(
            alternatives=False,
            reference_logprobs=lambda shape: np.full(shape, -2, dtype=np.float32),
        )
        client = with_regularizers(counting, regularizers=[{"fn": kl, "weight": 0.1, "name": "kl"}])
        output = client.forward_backward(data, "cross_entropy").result(60)
        assert output.record["regularizers"]["kl"]["value"] > 0
        assert {tuple(keys) for _, each in counting.passes for keys in each} == {
            ("target_tokens", "weights")
        }

    @pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning")
    def test_async_loops_get_them_too(self, new_client):
        client = with_regularizers(new_client(), regularizers=[SQUARES])

        async def step():
            future = await client.forward_backward_async(datums(), loss_fn="cross_entropy")
            optim = await client.optim_step_async(ADAM)
            await optim.result_async()
            return await future.result_async()

        assert asyncio.run(step()).record["regularizers"]["squares"]["value"] > 0

    def test_what_a_call_says_goes_first(self, counting):
        client = with_regularizers(counting, regularizers=[SQUARES])
        plain = client.forward_backward(datums(), "cross_entropy", regularizers=[]).result(60)
        assert not hasattr(plain, "record")
        assert len(counting.passes) == 1
        other = client.forward_backward(datums(), "cross_entropy", regularizers=[SPREAD], step=7)
        assert list(other.result(60).record["regularizers"]) == ["spread"]
        assert other.result(60).record["schedule_step"] == 7

    def test_steps_are_counted_with_the_custom_ones(self, new_client):
        client = with_regularizers(new_client(), regularizers=[SQUARES])
        steps = [
            client.forward_backward(datums(), "cross_entropy"),
            client.forward_backward_custom(datums(), spread),
        ]
        client.optim_step(ADAM)
        steps.append(client.forward_backward(datums(), "cross_entropy"))
        assert [each.result(60).record["schedule_step"] for each in steps] == [0, 0, 1]

    def test_a_gradient_of_zero_is_not_sent(self, counting):
        late = {**SQUARES, "weight": lambda step: 0.0 if step < 1 else 0.1}
        client = with_regularizers(counting, regularizers=[late])
        assert client.forward_backward(datums(), "cross_entropy").result(60).record
        assert len(counting.passes) == 1
        client.optim_step(ADAM)
        client.forward_backward(datums(), "cross_entropy").result(60)
        assert len(counting.passes) == 3

    def test_wrong_arguments_are_refused_before_anything_is_sent(self, counting):
        client = with_regularizers(counting, regularizers=[SQUARES])
        with pytest.raises(RequestError, match="the batch is empty"):
            client.forward_backward([], "cross_entropy")
        with pytest.raises(RequestError, match="step"):
            client.forward_backward(datums(), "cross_entropy", step="two")
        with pytest.raises(RequestError, match="totals"):
            client.forward_backward(datums(), "cross_entropy", regularizers=[], totals={})
        assert counting.passes == []


class TestEveryLossOfTheServers:
    @pytest.mark.parametrize(
        "loss_fn", ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"]
    )
    def test_the_gradient_is_that_of_the_whole_loss(self, new_client, sandbox, counting, loss_fn):
        data = datums(alternatives=False) if loss_fn == "cross_entropy" else policy_data()
        native = with_regularizers(counting, regularizers=[SQUARES, SPREAD])
        # Two calls, whose gradients add up, and nothing is waited for before the end.
        parts = data[:2], data[2:]
        steps = [native.forward_backward(part, loss_fn) for part in parts]
        native.optim_step(ALONG_THE_GRADIENT).result(60)
        whole = with_regularizers(new_client(), regularizers=[SQUARES, SPREAD])
        if loss_fn == "cross_entropy":
            same = Composer(weighted_nll, [SQUARES, SPREAD])
        else:  # the server's have no mask: its dro tethers the prompt, too
            same = Composer(loss_fn, [SQUARES, SPREAD], base_params={"weights": None})
        wants = [whole.forward_backward_custom(part, same) for part in parts]
        whole.optim_step(ALONG_THE_GRADIENT).result(60)
        assert_same_parameters(
            sandbox.parameters(native.model_id), sandbox.parameters(whole.model_id)
        )
        assert [loss for loss, _ in counting.passes] == [loss_fn, "cross_entropy"] * 2  # no forward
        for step, want in zip(steps, wants, strict=True):
            assert step.result(60).record["base_loss"]["value"] == pytest.approx(
                want.result(60).record["base_loss"]["value"], rel=1e-4
            )


class TestOptimStep:
    """Loops such as tinker-cookbook's log its metrics, and none of a pass."""

    def test_has_the_record_of_the_steps_before_it(self, new_client):
        client = with_regularizers(new_client(), regularizers=[SQUARES], flat_metrics=True)
        bare = client.optim_step(ADAM).result(60).metrics or {}
        first = client.forward_backward(datums(), "cross_entropy")
        second = client.forward_backward(datums(), "cross_entropy")
        metrics = client.optim_step(ADAM).result(60).metrics
        value = "regularizers/squares/value"
        both = first.result(60).metrics[value] + second.result(60).metrics[value]
        assert metrics[value] == pytest.approx(both)
        assert bare.keys() <= metrics.keys()
        assert value not in (client.optim_step(ADAM).result(60).metrics or {})

    def test_also_where_a_custom_step_and_one_of_the_servers_loss_are_before_it(self, new_client):
        """Of the server's loss the record knows no cosine, so there is none to merge."""
        client = with_regularizers(new_client(), regularizers=[SQUARES, SPREAD], flat_metrics=True)
        custom = client.forward_backward_custom(datums(), weighted_nll)
        native = client.forward_backward(datums(), "cross_entropy")
        metrics = client.optim_step(ADAM).result(60).metrics
        both = [each.result(60).metrics["loss_total"] for each in (custom, native)]
        assert metrics["loss_total"] == pytest.approx(sum(both))
        assert [key for key in metrics if key.startswith("cosines/")] == ["cosines/squares/spread"]

    def test_and_of_none_that_failed(self, new_client):
        client = with_regularizers(new_client(), regularizers=[FAILS], flat_metrics=True)
        client.forward_backward(datums(), "cross_entropy")
        assert "loss_total" not in (client.optim_step(ADAM).result(60).metrics or {})


class TestOrder:
    def test_what_was_called_later_waits_for_the_linear_pass(self, new_client, sandbox):
        data = datums()
        gate = Gate()
        client = with_regularizers(new_client(), regularizers=[gate.term()])
        before = sandbox.parameters(client.model_id)
        step = client.forward_backward(data, "cross_entropy")
        optim = client.optim_step(ADAM)
        assert gate.reached.wait(60)
        assert not step.future().done()
        assert torch.equal(sandbox.parameters(client.model_id), before)
        gate.open.set()
        optim.result(60)
        same = with_regularizers(new_client(), regularizers=[{**gate.term(), "fn": squares}])
        same.forward_backward(data, "cross_entropy").result(60)
        same.optim_step(ADAM).result(60)
        assert torch.equal(sandbox.parameters(client.model_id), sandbox.parameters(same.model_id))

    @pytest.mark.parametrize("regularizers", [[], [SQUARES]], ids=["alone", "regularized"])
    def test_what_waits_is_sent_as_it_was_when_it_was_called(self, new_client, regularizers):
        """A loop may fill its list and its options anew for the next call."""
        gate = Gate()
        client = with_regularizers(new_client(), regularizers=[gate.term()])
        client.forward_backward(datums(), "cross_entropy")
        data, options = policy_data(), {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}
        bare = new_client().forward_backward(data, "ppo", dict(options)).result(60)
        waits = client.forward_backward(data, "ppo", options, regularizers=regularizers)
        del data[1:]
        options.update(clip_low_threshold=0.0, clip_high_threshold=9.0)
        gate.open.set()
        got = waits.result(60)
        assert len(got.loss_fn_outputs) == len(bare.loss_fn_outputs)
        assert got.metrics["loss:sum"] == pytest.approx(bare.metrics["loss:sum"])

    @pytest.mark.parametrize("seed", range(3))
    def test_what_is_pipelined_comes_to_what_is_awaited_one_by_one(self, new_client, sandbox, seed):
        """Bases of both kinds, failing terms, refused calls, saves and steps, in any order."""
        kinds = ["native", "ppo", "custom", "fails", "alone", "refused", "saves", "optim", "optim"]

        def ended(await_each):
            late = {**SPREAD, "weight": lambda step: 0.1 * (step + 1)}
            client = with_regularizers(
                new_client(), regularizers=[SQUARES, late], flat_metrics=True
            )
            rng, futures, outcomes = random.Random(seed), [], []
            for i in range(20):
                kind, data = rng.choice(kinds), datums(rng.randint(2, 4))
                futures.append(
                    {
                        "native": lambda data: client.forward_backward(data, "cross_entropy"),
                        "ppo": lambda _: client.forward_backward(policy_data(), "ppo"),
                        "custom": lambda data: client.forward_backward_custom(data, weighted_nll),
                        "fails": lambda data: client.forward_backward_custom(data, fails),
                        "alone": lambda data: client.forward_backward(
                            data, "cross_entropy", regularizers=[]
                        ),
                        "refused": lambda data: client.forward_backward(data, "no_such_loss"),
                        "saves": lambda _, i=i: client.save_state(f"at-{i}"),
                        "optim": lambda _: client.optim_step(ADAM),
                    }[kind](data)
                )
                if await_each:
                    futures[-1].future().exception(60)
            for future in futures:
                error = future.future().exception(60)
                metrics = None if error else getattr(future.result(), "metrics", None)
                total = (metrics or {}).get("loss_total")
                outcomes.append((type(error), total))
            return outcomes, sandbox.parameters(client.model_id)

        (outcomes, parameters), (same, as_awaited) = ended(False), ended(True)
        assert outcomes == same
        assert torch.equal(parameters, as_awaited)

    def test_another_wrapper_of_the_client_has_the_same_order(self, new_client, sandbox):
        """As where a notebook wraps it anew while a step is under way."""
        data, bare, gate = datums(), new_client(), Gate()
        first = with_regularizers(bare, regularizers=[gate.term()])
        second = with_regularizers(bare, regularizers=[SPREAD])
        first.forward_backward(data, "cross_entropy")
        optim = second.optim_step(ADAM)
        assert gate.reached.wait(60)
        gate.open.set()
        optim.result(60)
        same = with_regularizers(new_client(), regularizers=[{**gate.term(), "fn": squares}])
        same.forward_backward(data, "cross_entropy").result(60)
        same.optim_step(ADAM).result(60)
        assert torch.equal(sandbox.parameters(bare.model_id), sandbox.parameters(same.model_id))


class TestFailures:
    def test_a_failing_term_leaves_the_base(self, new_client, sandbox, caplog):
        data = datums()
        client = with_regularizers(new_client(), regularizers=[FAILS])
        with caplog.at_level(logging.ERROR, "tinker_custom_loss"):
            step = client.forward_backward(data, "cross_entropy")
            client.optim_step(ADAM).result(60)
        with pytest.raises(TermError, match="no tokens to divide by") as info:
            step.result(60)
        assert any("gradient is accumulated" in note for note in info.value.__notes__)
        (line,) = caplog.messages
        assert line.startswith("the regularization of step 0, whose own loss is accumulated, cont")
        bare = new_client()
        bare.forward_backward(data, "cross_entropy").result(60)
        bare.optim_step(ADAM).result(60)
        assert torch.equal(sandbox.parameters(client.model_id), sandbox.parameters(bare.model_id))

    def test_a_term_that_may_be_skipped_is(self, new_client):
        skipped = {**FAILS, "on_error": "skip"}
        client = with_regularizers(new_client(), regularizers=[skipped, SQUARES])
        record = client.forward_backward(datums(), "cross_entropy").result(60).record
        assert record["regularizers"]["ratio"]["skipped"]

    def test_the_client_stops_if_it_is_asked_to(self, new_client):
        client = with_regularizers(new_client(), regularizers=[FAILS], on_failure="stop")
        step = client.forward_backward(datums(), "cross_entropy")
        optim = client.optim_step(ADAM)
        with pytest.raises(StoppedError, match="the regularization of step 0"):
            optim.result(60)
        with pytest.raises(TermError):
            step.result(60)

    def test_what_the_server_refuses_the_future_raises(self, new_client):
        client = with_regularizers(new_client(), regularizers=[SQUARES])
        step = client.forward_backward(datums(), "no_such_loss")
        with pytest.raises((tinker.TinkerError, ValueError)):
            step.result(60)
        assert client.forward_backward(datums(), "cross_entropy").result(60).record

    def test_a_step_that_is_withdrawn_leaves_the_base(self, new_client):
        gate = Gate()
        client = with_regularizers(new_client(), regularizers=[gate.term()], on_failure="stop")
        step = client.forward_backward(datums(), "cross_entropy")
        assert gate.reached.wait(60)
        step.future().cancel()
        gate.open.set()
        assert client.optim_step(ADAM).result(60)

    def test_a_term_may_not_call_its_own_client(self, new_client):
        def calls(data, logprobs):
            client.forward_backward(data, "cross_entropy")

        client = with_regularizers(
            new_client(), regularizers=[{"fn": calls, "weight": 1.0, "name": "calls"}]
        )
        with pytest.raises(TermError, match=r"called forward_backward\(\) of the training client"):
            client.forward_backward(datums(), "cross_entropy").result(60)


class TestDatumsOfPolicies:
    def test_only_sampled_tokens_are_weighted(self, caplog):
        """tinker-cookbook takes the mask away, which the server would refuse."""
        data = policy_data()
        logprobs = [torch.full((len(d.loss_fn_inputs["logprobs"].data),), -1.0) for d in data]
        for each in logprobs:
            each.requires_grad_()
        loss, _ = l2(data, logprobs)
        loss.backward()
        for datum, each in zip(data, logprobs, strict=True):
            sampled = datum.loss_fn_inputs["logprobs"].to_torch() != 0
            assert torch.equal(each.grad != 0, sampled)
        assert caplog.messages == []

    def test_a_mask_goes_first(self):
        data = policy_data()
        for datum in data:
            mask = np.zeros_like(datum.loss_fn_inputs["logprobs"].to_numpy())
            mask[-1] = 1
            datum.loss_fn_inputs["mask"] = tinker.TensorData.from_numpy(mask)
        logprobs = [torch.full((len(d.loss_fn_inputs["mask"].data),), -1.0) for d in data]
        for each in logprobs:
            each.requires_grad_()
        l2(data, logprobs)[0].backward()
        assert all((each.grad != 0).nonzero().tolist() == [[len(each) - 1]] for each in logprobs)

    def test_one_advantage_a_datum_makes_no_prompt_a_sample(self):
        """One number is there for every token, and so tells none apart."""
        data = policy_data()
        for datum in data:
            datum.loss_fn_inputs["advantages"] = tinker.TensorData.from_numpy(np.float32([0.5]))
        logprobs = [torch.full((len(d.loss_fn_inputs["logprobs"].data),), -1.0) for d in data]
        sampled = sum(int((d.loss_fn_inputs["logprobs"].to_torch() != 0).sum()) for d in data)
        assert l2(data, logprobs)[1]["tokens"] == sampled < sum(map(len, logprobs))

    def test_zeros_that_may_have_been_sampled_are_said_once(self, caplog):
        columns._warn_of_zeros.cache_clear()
        data = policy_data()
        for datum in data:
            for key in ("logprobs", "advantages"):
                datum.loss_fn_inputs[key].to_numpy()[-1] = 0
        logprobs = [torch.full((len(d.loss_fn_inputs["logprobs"].data),), -1.0) for d in data]
        for _ in range(2):
            l2(data, logprobs)
        (line,) = caplog.messages
        assert "taken not to have been sampled" in line

    def test_advantages_of_another_length_are_named(self):
        data = policy_data()
        short = tinker.TensorData.from_numpy(np.ones(3, dtype=np.float32))
        data[1].loss_fn_inputs["advantages"] = short
        logprobs = [torch.full((len(d.loss_fn_inputs["logprobs"].data),), -1.0) for d in data]
        with pytest.raises(
            ValueError, match=r'"advantages" of datum 1 has shape \[3\], but its "l'
        ):
            l2(data, logprobs)
