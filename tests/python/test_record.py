"""The record of a step: where its keys and a loss's own metrics stand, nested and flat."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from term_library import square, total
from tinker_custom_loss import Composer, NonFiniteError, RequestError, TermError, flatten, merge

DATA = ["datum"]


@pytest.fixture
def logprobs():
    return [torch.tensor([-1.0, -2.0, -3.0])]


def returning(metrics):
    return lambda data, logprobs: (logprobs[0].sum(), metrics)


def term(fn, weight=1.0, name="term", **options):
    return {"fn": fn, "weight": weight, "name": name, **options}


class TestMetrics:
    def test_the_base_losss_own_stay_at_the_top_level_and_are_in_the_record(self, logprobs):
        base = returning({"dpo_loss": 0.5, "reward:mean": 2})
        leaves = [t.clone().requires_grad_() for t in logprobs]
        _, alone = Composer(base)(DATA, leaves)
        _, metrics = Composer(base, [term(square)])(DATA, leaves)
        assert alone.items() <= metrics.items()
        assert metrics["base_loss"]["custom"] == {"dpo_loss": 0.5, "reward:mean": 2.0}
        assert metrics["loss_total"] == -6 + 14

    @pytest.mark.parametrize("key", ["loss_total", "regularizers", "base_loss/value"])
    def test_a_metric_that_would_hide_a_key_of_the_record_is_refused(self, logprobs, key):
        with pytest.raises(TermError, match=f'base loss returned a metric "{key}", which would'):
            Composer(returning({key: 1.0}), [term(square)]).compute(DATA, logprobs)
        regularizer = term(returning({key: 1.0}))  # its metrics never stand at the top level
        composition = Composer(total, [regularizer]).compute(DATA, logprobs)
        assert composition.record["regularizers"]["term"]["custom"] == {key: 1.0}

    def test_a_loggers_own_keys_are_not_among_those_of_the_record(self, logprobs):
        record = Composer(total).compute(DATA, logprobs, step=7).record
        assert not {"step", "seconds", "epoch", "time", "_step"} & record.keys()
        assert record["schedule_step"] == 7
        assert record["compute_seconds"] > 0

    @pytest.mark.parametrize(("one", "other"), [("a:b", "a.b"), ("a.b:c", "a:b.c")])
    def test_two_that_are_one_in_the_flat_form_are_refused(self, logprobs, one, other):
        metrics = {one: 1.0, other: 2.0}
        with pytest.raises(TermError, match=f'metrics "{one}" and "{other}", which are the same'):
            Composer(total, [term(returning(metrics))]).compute(DATA, logprobs)

    @pytest.mark.parametrize(
        ("value", "recorded"),
        [
            (None, None),
            (np.array(1.5), 1.5),
            (np.float32(1.5), 1.5),
            (np.int64(2), 2.0),
            (np.array([True]), 1.0),
            (torch.tensor([[1.5]]), 1.5),
        ],
        ids=repr,
    )
    def test_numbers_come_in_many_types_and_none_is_no_number(self, logprobs, value, recorded):
        record = Composer(total, [term(returning({"m": value}))]).compute(DATA, logprobs).record
        assert record["regularizers"]["term"]["custom"] == {"m": recorded}
        assert flatten(record).get("regularizers/term/custom/m") == recorded

    @pytest.mark.parametrize("value", ["1.5", 1j, np.array(1j), np.zeros(2), [1.0]], ids=repr)
    def test_what_is_no_number_is_refused(self, logprobs, value):
        with pytest.raises(TermError, match=r'the metric "m" of the term "term" is .*; expected a'):
            Composer(total, [term(returning({"m": value}))]).compute(DATA, logprobs)


RECORD = {"loss_total": 2, "base_loss": None, "regularizers": {"kl": {"custom": {"a:b": 1.0}}}}


@pytest.mark.parametrize(("weight", "cosine"), [(0.5, 1.0), (-0.5, 1.0), (0.0, 0.0)])
def test_the_only_gradient_is_the_total_as_weighted(logprobs, weight, cosine):
    record = Composer(None, [term(square, weight)]).compute(DATA, logprobs).record
    assert record["regularizers"]["term"]["cosine_to_total"] == cosine


class TestCosines:
    """Of each pair of terms, as they are weighted."""

    def test_of_every_pair_once_with_the_signs_of_the_weights(self, logprobs):
        terms = [term(square, 0.5, "pull"), term(square, -2.0, "push"), term(square, 0.0, "idle")]
        composition = Composer(total, terms).compute(DATA, logprobs, term_gradients=True)
        names, own = composition.cosines()
        cosine = float(own[names.index("base_loss"), names.index("pull")])
        assert 0.1 < abs(cosine) < 1
        cosines = composition.record["cosines"]
        assert list(cosines) == ["base_loss", "pull", "push"]
        assert cosines["base_loss"] == pytest.approx({"pull": cosine, "push": -cosine, "idle": 0})
        assert cosines["pull"] == pytest.approx({"push": -1, "idle": 0})
        assert cosines["push"] == {"idle": 0}
        assert "cosines/base_loss/pull" in composition.flat_record

    def test_one_term_has_no_pair_and_a_loss_alone_no_gradient(self, logprobs):
        composer = Composer(None, [term(square)])
        assert composer.compute(DATA, logprobs).record["cosines"] == {}
        assert composer.compute_loss(DATA, logprobs).record["cosines"] is None

    def test_of_a_step_in_parts_is_that_of_the_whole(self, logprobs):
        terms = [term(square, -0.5)]
        logprobs = [*logprobs, torch.tensor([-0.1, 0.3])]
        parts = [Composer(total, terms).compute(DATA, [part]).record for part in logprobs]
        whole = Composer(total, terms).compute(DATA * 2, logprobs).record
        assert merge(parts)["cosines"]["base_loss"] == pytest.approx(whole["cosines"]["base_loss"])
        blind = {**parts[0], "cosines": None}
        assert merge([blind, parts[1]])["cosines"] is None


class TestFlatten:
    def test_every_key_begins_with_the_prefix(self):
        expected = {"train/loss_total": 2.0, "train/regularizers/kl/custom/a.b": 1.0}
        assert flatten(RECORD, prefix="train") == expected
        assert flatten(RECORD, prefix="train/") == expected

    def test_it_loses_no_key(self):
        with pytest.raises(RequestError, match=r'two keys of the record are "x/a\.b"'):
            flatten({"x": {"a:b": 1.0, "a.b": 2.0}})


class TestSchedules:
    def test_one_is_refused_where_nobody_says_the_step(self, logprobs):
        composer = Composer(total, [term(square, lambda step: step / 10)])
        leaves = [t.clone().requires_grad_() for t in logprobs]
        for compute in (composer, composer.compute, composer.compute_loss):
            with pytest.raises(RequestError, match=r'"term" is a schedule.*give step='):
                compute(DATA, leaves)
        assert composer.compute(DATA, logprobs, step=0).loss_total == -6

    def test_without_one_no_step_need_be_known(self, logprobs):
        disabled = term(square, lambda step: 1.0, "off", enabled=False)
        composition = Composer(total, [term(square), disabled]).compute(DATA, logprobs)
        assert composition.record["schedule_step"] is None

    @pytest.mark.parametrize("step", [-1, True, "3", 1.0])
    def test_a_step_is_counted_from_0(self, logprobs, step):
        with pytest.raises(RequestError, match='"step": expected a non-negative integer'):
            Composer(total).compute(DATA, logprobs, step=step)


def flat(data, logprobs):
    """A regularizer in whose graph the logprobs are, and in whose value they are not."""
    return (logprobs[0].sum() - logprobs[0].detach().sum()) * 0.0, {}


class TestZeroGradient:
    @staticmethod
    def warnings(caplog):
        return [r.message for r in caplog.records if "is exactly 0 at every" in r.message]

    def test_it_is_recorded_in_every_step_and_said_once(self, logprobs, caplog):
        for _ in range(3):  # a client makes a composer a step
            record = Composer(total, [term(flat, -0.5, "flat term")]).compute(DATA, logprobs)
            assert record.record["regularizers"]["flat term"]["zero_gradient"] is True
            assert record.record["base_loss"]["zero_gradient"] is False
        (message,) = self.warnings(caplog)
        assert '"flat term"' in message

    def test_of_a_base_loss_too(self, logprobs, caplog):
        record = Composer(flat, [term(square)]).compute(DATA, logprobs).record
        assert record["base_loss"]["zero_gradient"] is True
        assert '"base_loss"' in self.warnings(caplog)[0]

    def test_with_the_weight_0_it_is_a_fact_and_no_news(self, logprobs, caplog):
        record = Composer(total, [term(flat, 0.0, "off")]).compute(DATA, logprobs).record
        assert record["regularizers"]["off"]["zero_gradient"] is True
        record = Composer(total, [term(square, 0.0, "out")]).compute(DATA, logprobs).record
        assert record["regularizers"]["out"]["zero_gradient"] is False
        assert not self.warnings(caplog)

    def test_a_term_of_the_catalogue_may_rest(self, caplog):
        logprobs = [torch.tensor([-1.0, -2.0])]
        kl = {"fn": "kl", "weight": 0.1}
        for weights, at_rest in [([0.0, 1.0], True), ([0.0, 0.0], False)]:
            inputs = {"reference_logprobs": logprobs[0], "weights": torch.tensor(weights)}
            data = [SimpleNamespace(loss_fn_inputs=inputs)]
            record = Composer(total, [kl]).compute(data, logprobs).record
            assert record["regularizers"]["kl"]["zero_gradient"] is at_rest
        assert not self.warnings(caplog)

    def test_what_is_not_differentiable_or_was_made_zero_has_none(self, logprobs, caplog):
        def constant(data, logprobs):
            return 1.0, {}

        def broken(data, logprobs):
            return (logprobs[0] * math.nan).sum(), {}

        def fails(data, logprobs):
            raise ValueError

        terms = [
            term(constant, name="constant"),
            term(broken, name="broken", on_non_finite="zero"),
            term(fails, name="fails", on_error="skip"),
        ]
        record = Composer(total, terms).compute(DATA, logprobs).record
        assert {r["zero_gradient"] for r in record["regularizers"].values()} == {False}
        assert not self.warnings(caplog)

    def test_without_gradients_nobody_knows(self, logprobs):
        record = Composer(total, [term(flat)]).compute_loss(DATA, logprobs).record
        assert record["regularizers"]["term"]["zero_gradient"] is None
        assert record["base_loss"]["zero_gradient"] is None


class TestOverflow:
    """Each loss and gradient is finite; what their sum comes to is not."""

    @pytest.mark.parametrize("weights", [(1e308, -1e308), (1e308, 1e308), (1e308, 0.0)])
    def test_of_the_weighted_losses_names_the_terms(self, logprobs, weights):
        def large(data, logprobs):  # its gradient is 0
            return 1e6 + 0 * logprobs[0].sum(), {}

        terms = [term(large, weight, f"term {i}") for i, weight in enumerate(weights)]
        composer = Composer(None, terms)
        for compute in (composer.compute, composer.compute_loss):
            with pytest.raises(NonFiniteError, match=r'weighted losses overflows.*"term 0": ') as e:
                compute(DATA, logprobs)
            assert e.value.term == "term 0, term 1"

    @pytest.mark.parametrize("weights", [(3e38, 3e38), (1e300, -1e300), (1e300, 0.0)])
    def test_of_the_weighted_gradients_names_the_terms(self, logprobs, weights):
        def centred(data, logprobs):  # its loss is 0, its gradient is not
            return (logprobs[0] - logprobs[0].detach()).sum(), {}

        terms = [term(centred, weight, f"term {i}") for i, weight in enumerate(weights)]
        with pytest.raises(NonFiniteError, match="weighted gradients overflows") as caught:
            Composer(None, terms).compute(DATA, logprobs)
        assert caught.value.term == "term 0, term 1"

    def test_a_single_gradient_is_no_exception(self, logprobs):
        with pytest.raises(NonFiniteError, match="weighted gradients overflows"):
            Composer(None, [term(total, 1e300)]).compute(DATA, logprobs)


class TestDtypes:
    def test_each_datums_gradient_is_in_the_dtype_of_its_logprobs(self):
        dtypes = [torch.bfloat16, torch.float64, torch.float32]
        logprobs = [torch.tensor([-1 / 3], dtype=dtype) for dtype in dtypes]
        composer = Composer(total, [term(square)])
        composition = composer.compute([None] * 3, logprobs)
        assert [g.dtype for g in composition.gradients] == dtypes
        exact = 1 - 2 * torch.tensor(1 / 3, dtype=torch.float64)
        assert composition.gradients[1].item() == pytest.approx(exact.item(), rel=1e-15)
        assert composition.gradient.flat.dtype == torch.float64

        leaves = [t.requires_grad_() for t in logprobs]
        composer([None] * 3, leaves)[0].backward()
        assert all(
            torch.equal(leaf.grad, gradient)
            for leaf, gradient in zip(leaves, composition.gradients, strict=True)
        )

    def test_one_that_does_not_fit_its_dtype_is_an_error(self):
        logprobs = [torch.zeros(2), torch.zeros(2).half()]
        with pytest.raises(NonFiniteError, match="does not fit into float16"):
            Composer(None, [term(total, 1e6)]).compute([None] * 2, logprobs)

    def test_a_default_device_is_not_ours(self, logprobs):
        leaves = [t.clone().requires_grad_() for t in logprobs]
        torch.set_default_device("meta")
        try:
            composer = Composer(total, [term(square)])
            composition = composer.compute(DATA, logprobs, term_gradients=True)
            loss, _ = composer(DATA, leaves)
            loss.backward()
            _, cosines = composition.cosines()
        finally:
            torch.set_default_device(None)
        assert (loss.item(), loss.device.type) == (-6 + 14, "cpu")
        assert leaves[0].grad.tolist() == [-1, -3, -5]
        assert cosines[0, 0].item() == pytest.approx(1.0)
        assert math.isfinite(composition.loss_total)
