"""What with_regularizers holds for loops that do not say it: defaults, and the count of steps."""

from __future__ import annotations

from typing import ClassVar

import pytest
import tinker

from tinker_custom_loss import (
    Composer,
    RequestError,
    forward_backward_custom,
    with_regularizers,
)
from training import datums, spread, squares, weighted_nll

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
    """A loop cannot forget the step: the client counts."""

    @pytest.fixture
    def weight_of(self, new_client):
        term = {"fn": squares, "weight": lambda step: 1.0 + step, "name": "squares"}
        client = with_regularizers(new_client(), regularizers=[term])

        def weight_of(**options):
            output = client.forward_backward_custom(datums(), weighted_nll, **options).result(60)
            return output.record["regularizers"]["squares"]["weight"]

        weight_of.client = client
        return weight_of

    def test_from_zero(self, weight_of):
        assert [weight_of() for _ in range(3)] == [1.0, 2.0, 3.0]

    def test_on_from_a_step_that_is_given(self, weight_of):
        """As after a checkpoint; and micro-batches of one step may all say which."""
        assert [weight_of(step=7), weight_of(step=7), weight_of()] == [8.0, 8.0, 9.0]

    def test_not_what_was_refused(self, weight_of):
        with pytest.raises(RequestError):
            weight_of.client.forward_backward_custom([], weighted_nll)
        with pytest.raises(RequestError):
            weight_of(step="3")
        assert weight_of() == 1.0

    def test_in_the_order_of_the_calls(self, weight_of):
        futures = [weight_of.client.forward_backward_custom(datums()) for _ in range(4)]
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
