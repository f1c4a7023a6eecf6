"""What with_regularizers holds for loops that do not say it: defaults, and the count of steps."""

from __future__ import annotations

import asyncio
from typing import ClassVar

import pytest
import tinker

from tinker_custom_loss import (
    Composer,
    RequestError,
    forward_backward_custom,
    merge,
    with_regularizers,
)
from training import ADAM, datums, spread, squares, weighted_nll

SQUARES = {"fn": squares, "weight": 0.1, "name": "squares"}
SPREAD = {"fn": spread, "weight": 0.1, "name": "spread"}


def terms_of(client, *arguments, **options):
    """The names of a step's terms, the base loss among them."""
    record = client.forward_backward_custom(datums(), *arguments, **options).result(60).record
    return [*(["base_loss"] if record["base_loss"] else []), *record["regularizers"]]


class TestDefaults:
    def test_a_loop_that_makes_the_call_itself_gets_them(self, new_client):
        client = with_regularizers(new_client(), regularizers=[SQUARES])
        assert terms_of(client, weighted_nll) == ["base_loss", "squares"]
        assert terms_of(client, loss_fn=weighted_nll) == ["base_loss", "squares"]
        assert terms_of(client) == ["squares"]

    def test_a_base_loss_too(self, new_client):
        client = with_regularizers(new_client(), base_loss=weighted_nll, regularizers=[SQUARES])
        assert terms_of(client) == ["base_loss", "squares"]

    def test_what_the_call_says_goes_first(self, new_client):
        client = with_regularizers(new_client(), base_loss=squares, regularizers=[SQUARES])
        assert terms_of(client, weighted_nll, [SPREAD]) == ["base_loss", "spread"]
        assert terms_of(client, weighted_nll, []) == ["base_loss"]
        assert terms_of(client, Composer(None, [SPREAD])) == ["spread"]

    def test_a_base_loss_alone_is_the_sdks_step(self, new_client):
        client = with_regularizers(new_client(), base_loss=weighted_nll)
        output = client.forward_backward_custom(datums()).result(60)
        assert output.metrics["datums"] == 4.0
        assert not hasattr(output, "record")

    def test_a_composer_is_one(self, new_client):
        client = with_regularizers(new_client(), base_loss=Composer(weighted_nll, [SPREAD]))
        assert terms_of(client) == ["base_loss", "spread"]

    def test_flat_metrics(self, new_client):
        client = with_regularizers(new_client(), regularizers=[SQUARES], flat_metrics=True)
        flat = client.forward_backward_custom(datums()).result(60)
        assert flat.metrics["regularizers/squares/value"] > 0
        assert flat.record["regularizers"]["squares"]["value"] > 0  # the record is as ever
        nested = client.forward_backward_custom(datums(), flat_metrics=False).result(60)
        assert nested.metrics["regularizers"]["squares"]["value"] > 0

    @pytest.mark.parametrize("flat", [True, False])
    def test_the_plain_function_asks_a_wrapped_client_for_either_form(self, new_client, flat):
        client = with_regularizers(new_client())
        step = forward_backward_custom(client, datums(), None, [SQUARES], flat_metrics=flat)
        metrics = step.result(60).metrics
        assert ("regularizers/squares/value" in metrics, "regularizers" in metrics) == (
            flat,
            not flat,
        )

    @pytest.mark.parametrize(
        ("options", "path"),
        [
            ({"base_loss": "nil"}, "base_loss.fn"),
            ({"regularizers": [{"fn": squares, "name": "squares"}]}, "regularizers[0].weight"),
            ({"regularizers": [SQUARES, SQUARES]}, "regularizers[1].name"),
            ({"base_loss": Composer(squares), "regularizers": [SQUARES]}, "regularizers"),
        ],
    )
    def test_are_checked_when_they_are_given(self, new_client, options, path):
        with pytest.raises(RequestError) as info:
            with_regularizers(new_client(), **options)
        assert info.value.path == path

    def test_are_given_once(self, new_client):
        client = with_regularizers(new_client(), regularizers=[SQUARES])
        assert with_regularizers(client) is client
        with pytest.raises(RequestError, match="has regularizers already"):
            with_regularizers(client, regularizers=[SPREAD])


class TestCount:
    """A loop cannot forget the step: the client counts those of the optimizer."""

    @pytest.fixture
    def weight_of(self, new_client):
        term = {"fn": squares, "weight": lambda step: 1.0 + step, "name": "squares"}
        client = with_regularizers(new_client(), regularizers=[term])

        def weight_of(base="custom", **options):
            if base == "custom":
                step = client.forward_backward_custom(datums(), weighted_nll, **options)
            else:
                step = client.forward_backward(datums(), "cross_entropy", **options)
            return step.result(60).record["regularizers"]["squares"]["weight"]

        weight_of.client = client
        return weight_of

    @pytest.mark.parametrize("base", ["custom", "native"])
    def test_from_zero(self, weight_of, base):
        weights = []
        for _ in range(3):
            weights.append(weight_of(base))
            weight_of.client.optim_step(ADAM)
        assert weights == [1.0, 2.0, 3.0]

    @pytest.mark.parametrize("base", ["custom", "native"])
    def test_the_calls_of_one_step_of_the_optimizer_are_one(self, weight_of, base):
        """As the minibatches of an RL loop, whose gradients add up."""
        assert [weight_of(base) for _ in range(3)] == [1.0, 1.0, 1.0]
        weight_of.client.optim_step(ADAM)
        assert weight_of(base) == 2.0

    @pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning")
    def test_also_where_the_loop_is_async(self, weight_of):
        assert weight_of() == 1.0
        asyncio.run(weight_of.client.optim_step_async(ADAM))
        assert weight_of() == 2.0

    def test_on_from_a_step_that_is_given(self, weight_of):
        """As after a checkpoint."""
        assert [weight_of(step=7), weight_of()] == [8.0, 8.0]
        weight_of.client.optim_step(ADAM)
        assert weight_of() == 9.0

    def test_a_step_is_also_heard_where_nothing_is_regularized(self, weight_of):
        weight_of.client.forward_backward(datums(), "cross_entropy", regularizers=[], step=4)
        assert weight_of() == 5.0

    def test_on_from_the_first_step_of_a_run_that_goes_on(self, new_client):
        term = {"fn": squares, "weight": lambda step: 1.0 + step, "name": "squares"}
        client = with_regularizers(new_client(), regularizers=[term], first_step=20)
        record = client.forward_backward(datums(), "cross_entropy").result(60).record
        assert record["schedule_step"] == 20
        assert record["regularizers"]["squares"]["weight"] == 21.0
        with pytest.raises(RequestError, match="first_step"):
            with_regularizers(new_client(), regularizers=[term], first_step=-1)

    def test_the_parts_of_a_step_need_not_name_it(self, new_client):
        late = {"fn": "nll", "weight": lambda step: float(step), "reduction": "token_mean"}
        client = with_regularizers(new_client(), regularizers=[late], first_step=2)
        data = datums(alternatives=False)
        totals = client.totals(data)
        parts = [client.forward_backward_custom([d], totals=totals) for d in data]
        whole = client.forward_backward_custom(data).result(60).record
        merged = merge([part.result(60).record for part in parts])
        assert merged["schedule_step"] == 2
        assert merged["loss_total"] == pytest.approx(whole["loss_total"])

    def test_not_what_was_refused(self, weight_of):
        with pytest.raises(RequestError):
            weight_of.client.forward_backward_custom([], weighted_nll)
        with pytest.raises(RequestError):
            weight_of(step="3")
        assert weight_of() == 1.0

    def test_in_the_order_of_the_calls(self, weight_of):
        futures = []
        for _ in range(4):
            futures.append(weight_of.client.forward_backward_custom(datums()))
            weight_of.client.optim_step(ADAM)
        weights = [f.result(60).record["regularizers"]["squares"]["weight"] for f in futures]
        assert weights == [1.0, 2.0, 3.0, 4.0]


class TestABaseLossByName:
    PPO: ClassVar = {"fn": "ppo", "params": {"clip_low": 0.1}, "reduction": "token_mean"}

    def step(self, client, loss):
        datum = tinker.Datum(
            tinker.ModelInput.from_ints([1, 2, 3]),
            {"target_tokens": [2, 3, 4], "logprobs": [-5.0] * 3, "advantages": [1.0, -1.0, 0.5]},
        )
        return client.forward_backward_custom([datum], loss).result().record

    @pytest.mark.parametrize("loss", ["ppo", PPO], ids=["name", "options"])
    def test_is_that_term_at_the_call_and_by_default(self, new_client, loss):
        at_the_call = self.step(with_regularizers(new_client()), loss)
        by_default = self.step(with_regularizers(new_client(), base_loss=loss), None)
        assert at_the_call["base_loss"]["custom"]["tokens"] == 3
        assert at_the_call["loss_total"] == by_default["loss_total"] != 0.0

    def test_a_reduction_of_it_counts(self, new_client):
        client = with_regularizers(new_client())
        total = self.step(client, {**self.PPO, "reduction": "token_sum"})["loss_total"]
        assert self.step(client, self.PPO)["loss_total"] == pytest.approx(total / 3)

    @pytest.mark.parametrize(
        ("loss", "said"),
        [
            ("ppoo", "the nearest are: ppo"),
            ({"fn": "ppo", "parms": {}}, "unknown option 'parms' .str. of the base loss"),
            ({"params": {}}, 'has no "fn"'),
            ({"fn": "ppo", "reduction": "mean"}, "mean"),
        ],
    )
    def test_a_wrong_one_is_refused_when_it_is_given(self, new_client, loss, said):
        with pytest.raises(RequestError, match=said):
            with_regularizers(new_client(), base_loss=loss)
        with pytest.raises(RequestError, match=said):
            with_regularizers(new_client()).forward_backward_custom(datums(), loss)
