"""The composer: one loss, one gradient, one record, against closed forms."""

from __future__ import annotations

import asyncio
import itertools
import math
import pickle
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from term_library import (
    changes_in_place,
    constant,
    exits,
    first_datum_only,
    in_float64,
    infinite_loss,
    nan_gradient_in_datum_1,
    raises,
    returns,
    returns_bare_loss,
    returns_text,
    returns_text_metric,
    returns_vector,
    square,
    square_async,
    total,
)
from tinker_custom_loss import (
    CancelledError,
    ChangedLogprobsError,
    Composer,
    NonFiniteError,
    RequestError,
    TensorBatch,
    TermError,
    flatten,
)

DATA = ["first datum", "second datum"]  # the composer hands data through, whatever it is


@pytest.fixture
def logprobs():
    """One [3] and one [2,2], mixed: x = (-1, -2, -3, -4, -5, -6, -7)."""
    return [torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([[-4.0, -5.0], [-6.0, -7.0]])]


def spec(fn, weight, name, **options):
    return {"fn": fn, "weight": weight, "name": name, **options}


class TestComposition:
    def test_every_number_of_the_record_is_the_closed_form(self, logprobs):
        composer = Composer(
            total,
            [
                spec(square, 0.5, "square", params={"scale": 2.0}),
                spec(first_datum_only, -3.0, "first"),
            ],
        )
        composition = composer.compute(DATA, logprobs, step=7)
        x = torch.cat([t.flatten() for t in logprobs]).double()
        first = torch.tensor([1.0, 1, 1, 0, 0, 0, 0], dtype=torch.float64)
        gradient = torch.ones(7) + 0.5 * 4 * x - 3 * first

        assert composition.loss_total == pytest.approx(-28 + 0.5 * 280 - 3 * -6)
        assert torch.cat([g.flatten() for g in composition.gradients]).double() == pytest.approx(
            gradient
        )
        assert [g.shape for g in composition.gradients] == [t.shape for t in logprobs]

        record = composition.record
        assert record["loss_total"] == composition.loss_total
        assert record["regularizer_total"] == pytest.approx(0.5 * 280 + 18)
        assert record["total_grad_norm"] == pytest.approx(float(gradient.norm()))
        assert record["total_grad_rms"] == pytest.approx(float(gradient.square().mean().sqrt()))
        assert (record["schedule_step"], record["logprob_count"], record["datum_count"]) == (
            7,
            7,
            2,
        )

        base = record["base_loss"]
        assert base["value"] == pytest.approx(-28)
        assert base["grad_norm"] == pytest.approx(math.sqrt(7))
        assert base["cosine_to_total"] == pytest.approx(
            float(gradient.sum() / gradient.norm() / math.sqrt(7))
        )

        squares = record["regularizers"]["square"]
        assert squares["value"] == pytest.approx(280)
        assert squares["weight"] == 0.5
        assert squares["contribution"] == pytest.approx(140)
        assert squares["grad_norm"] == pytest.approx(float(4 * x.norm()))
        assert squares["grad_norm_weighted"] == pytest.approx(float(2 * x.norm()))
        assert squares["grad_rms"] == pytest.approx(float(4 * x.norm()) / math.sqrt(7))
        assert squares["custom"] == {"datums": 2.0}
        assert squares["differentiable"] is True
        assert squares["skipped"] is False

        firsts = record["regularizers"]["first"]
        assert firsts["contribution"] == pytest.approx(18)
        # The weight is negative, so the cosine is that of -3·gradient.
        assert firsts["cosine_to_total"] == pytest.approx(
            float(-(first @ gradient) / gradient.norm() / math.sqrt(3))
        )

    def test_async_terms_are_awaited_at_the_same_time(self, logprobs):
        everyone = asyncio.Barrier(3)

        async def meets_the_others(data, logprobs):
            await everyone.wait()  # returns only once all three are here
            return logprobs[0].sum(), {}

        terms = [spec(meets_the_others, 1.0, f"term {i}", timeout=30.0) for i in range(3)]
        composition = Composer(None, terms).compute(DATA, logprobs)
        assert composition.loss_total == -18
        assert composition.gradients[0].tolist() == [3, 3, 3]
        assert composition.gradients[1].tolist() == [[0, 0], [0, 0]]

    def test_threads_run_beside_inline_and_async_terms(self, logprobs):
        everyone = threading.Barrier(3)

        def meets_the_others(data, logprobs):
            everyone.wait(timeout=30)
            return logprobs[0].sum(), {}

        composition = Composer(
            meets_the_others,
            [
                spec(meets_the_others, 1.0, "a", run_in_executor=True),
                spec(meets_the_others, 1.0, "b", run_in_executor=True),
            ],
        ).compute(DATA, logprobs)
        assert composition.loss_total == -18

    def test_the_result_does_not_depend_on_who_ends_first(self, logprobs):
        def composed(order):
            events = [threading.Event() for _ in range(3)]
            following = dict(itertools.pairwise(order))
            events[order[0]].set()

            def term(index):
                def fn(data, logprobs):
                    events[index].wait(30)
                    if index in following:
                        events[following[index]].set()
                    return (logprobs[0] * (0.1 + index / 3)).square().sum(), {}

                return spec(fn, 0.3 * index - 0.4, f"term {index}", run_in_executor=True)

            return Composer(None, [term(i) for i in range(3)]).compute(DATA, logprobs)

        one, other = composed([0, 1, 2]), composed([2, 1, 0])
        assert one.loss_total == other.loss_total
        assert torch.equal(one.gradient.flat, other.gradient.flat)

    def test_a_sync_function_that_returns_an_awaitable_is_awaited(self, logprobs):
        composition = Composer(lambda d, lp: square_async(d, lp)).compute(DATA, logprobs)
        assert composition.loss_total == 140

    def test_it_can_be_awaited_inside_a_running_loop(self, logprobs):
        async def main():
            composer = Composer(square, [spec(square_async, 1.0, "async")])
            inside = composer.compute(DATA, logprobs).loss_total
            return inside, (await composer.compute_async(DATA, logprobs)).loss_total

        assert asyncio.run(main()) == (280, 280)

    def test_a_term_may_compute_in_another_dtype(self, logprobs):
        composition = Composer(in_float64).compute(DATA, logprobs)
        assert composition.gradients[0].dtype == torch.float32
        assert composition.gradients[0].tolist() == [-2, -4, -6]

    @pytest.mark.parametrize(
        "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
    )
    def test_gradients_come_home_in_the_dtype_of_the_logprobs(self, logprobs, dtype):
        given = [t.to(dtype) for t in logprobs]
        assert Composer(square).compute(DATA, given).gradients[1].dtype == dtype

    def test_a_flat_batch_gives_the_bytes_that_a_list_gives(self, logprobs):
        composer = Composer(square, [spec(total, 0.1, "total")])
        batch = TensorBatch.from_tensors(logprobs)
        as_list, as_batch = composer.compute(DATA, logprobs), composer.compute(DATA, batch)
        assert torch.equal(as_list.gradient.flat, as_batch.gradient.flat)

    @pytest.mark.parametrize("number", [-6.0, -6, np.float32(-6), np.array(-6.0)[()]])
    @pytest.mark.parametrize("place", [False, True, "process"])
    def test_a_plain_number_contributes_its_value_and_no_gradient(self, number, place, logprobs):
        term = spec(returns, 2.0, "number", params={"loss": number}, run_in_executor=place)
        composition = Composer(total, [term]).compute(DATA, logprobs)
        record = composition.record["regularizers"]["number"]
        assert (record["contribution"], record["differentiable"]) == (-12, False)
        assert composition.gradient.flat.tolist() == [1.0] * 7

    def test_a_constant_contributes_its_value_and_no_gradient(self, logprobs):
        composition = Composer(total, [spec(constant, 2.0, "constant")]).compute(DATA, logprobs)
        record = composition.record["regularizers"]["constant"]
        assert composition.loss_total == -22
        assert record["differentiable"] is False
        assert record["grad_norm"] == 0.0
        assert record["custom"] == {"checked": 1.0}
        assert composition.gradients[0].tolist() == [1, 1, 1]

    def test_if_no_term_is_differentiable_the_error_says_so(self, logprobs):
        composer = Composer(constant, [spec(constant, 1.0, "also constant")])
        with pytest.raises(TermError, match='no term is differentiable: "base_loss", "also const'):
            composer.compute(DATA, logprobs)
        assert composer.compute_loss(DATA, logprobs).loss_total == 6

    def test_evaluation_without_gradients_has_the_same_keys(self, logprobs):
        composer = Composer(total, [spec(square, 1.0, "square")])
        trained = composer.compute(DATA, logprobs).record
        evaluated = composer.compute_loss(DATA, logprobs)
        assert evaluated.loss_total == trained["loss_total"]
        assert evaluated.record.keys() == trained.keys()
        squares = evaluated.record["regularizers"]["square"]
        assert squares.keys() == trained["regularizers"]["square"].keys()
        assert squares["grad_norm"] is None

    def test_term_gradients_and_their_cosines(self, logprobs):
        opposite = [spec(total, 1.0, "up"), spec(lambda d, x: (-total(d, x)[0], {}), 1.0, "down")]
        composition = Composer(None, opposite).compute(DATA, logprobs, term_gradients=True)
        names, cosines = composition.cosines()
        assert names == ["up", "down"]
        torch.testing.assert_close(cosines, torch.tensor([[1.0, -1], [-1, 1]]).double())
        assert composition.term_gradients["down"].flat.tolist() == [-1] * 7

    def test_term_gradients_stay_when_the_caller_scales_the_total(self, logprobs):
        composition = Composer(total).compute(DATA, logprobs, term_gradients=True)
        composition.gradient.flat.mul_(5)
        assert composition.term_gradients["base_loss"].flat.tolist() == [1] * 7

    def test_weights_follow_a_schedule(self, logprobs):
        composer = Composer(total, [spec(square, lambda step: step / 10, "square")])
        for step in (0, 5):
            record = composer.compute(DATA, logprobs, step=step).record
            assert record["regularizers"]["square"]["weight"] == step / 10

    def test_a_schedule_that_gives_nonsense_is_named(self, logprobs):
        composer = Composer(total, [spec(square, lambda step: math.nan, "square")])
        with pytest.raises(TermError, match='schedule of the term "square" gave nan at step 3'):
            composer.compute(DATA, logprobs, step=3)

    def test_a_disabled_term_has_no_part(self, logprobs):
        composer = Composer(total, [spec(raises, 1.0, "off", enabled=False)])
        assert composer.compute(DATA, logprobs).record["regularizers"] == {}

    def test_it_works_under_no_grad_and_inference_mode(self, logprobs):
        with torch.no_grad():
            one = Composer(square).compute(DATA, logprobs)
        with torch.inference_mode():
            other = Composer(square).compute(DATA, [t.clone() for t in logprobs])
        assert torch.equal(one.gradient.flat, other.gradient.flat)

    def test_cancelling_interrupts_the_wait(self, logprobs):
        cancelled = threading.Event()

        async def cancels_and_waits(data, logprobs):
            cancelled.set()
            await asyncio.Event().wait()

        with pytest.raises(CancelledError):
            Composer(cancels_and_waits).compute(DATA, logprobs, cancelled=cancelled)

    def test_repr_shows_shapes_and_no_data(self, logprobs):
        composition = Composer(total, [spec(square, 1, "square")]).compute(DATA, logprobs)
        assert repr(composition) == (
            "Composition(loss_total=112, gradient=TensorBatch(float32, [[3], [2, 2]]), "
            "regularizers=[square])"
        )


class TestOut:
    """Memory that a caller has for the gradient."""

    @pytest.mark.parametrize("fn", ["l2", "gspo", lambda data, logprobs: (logprobs[0].sum(), {})])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_the_gradient_is_there(self, fn, dtype):
        logprobs = [torch.tensor([-1.0, -2.0], dtype=dtype)]
        inputs = {"logprobs": torch.full((2,), -1.5), "advantages": torch.ones(2)}
        data = [SimpleNamespace(loss_fn_inputs=inputs)]
        expected = Composer(fn).compute(data, logprobs)
        out = torch.full((2,), torch.nan, dtype=dtype)
        composition = Composer(fn).compute(data, logprobs, out=out)
        assert composition.gradient.flat.data_ptr() == out.data_ptr()
        assert torch.equal(out, expected.gradient.flat)
        assert composition.record["total_grad_norm"] == expected.record["total_grad_norm"]
        with torch.inference_mode():
            made_there = torch.empty_like(out)
        Composer(fn).compute(data, logprobs, out=made_there)
        assert torch.equal(made_there, out)

    @pytest.mark.parametrize(
        ("out", "sentence"),
        [
            (torch.zeros(3), "has shape"),
            (torch.zeros(4)[::2], "strides"),
            (torch.zeros(2, dtype=torch.float64), "is of torch.float64 on cpu"),
            (torch.zeros(2, requires_grad=True), "requires a gradient"),
        ],
    )
    def test_what_cannot_hold_it_is_refused(self, out, sentence):
        with pytest.raises(RequestError, match=sentence):
            Composer("l2").compute([None], [torch.zeros(2)], out=out)

    def test_it_is_not_the_memory_of_the_logprobs(self):
        memory = -torch.ones(6)
        batch = TensorBatch(memory[:4], ((4,),))
        for out in (memory[:4], memory[1:5]):
            with pytest.raises(RequestError, match="memory of the logprobs"):
                Composer("l2").compute([None], batch, out=out)
        with pytest.raises(RequestError, match="memory of the logprobs"):
            Composer("l2").compute([None], [memory[::2]], out=memory[3:])
        assert memory.tolist() == [-1.0] * 6


class TestAsCustomLossFn:
    """``composer(data, logprobs)``, as the SDK calls it."""

    def test_backward_gives_each_leaf_its_gradient(self, logprobs):
        leaves = [t.clone().requires_grad_() for t in logprobs]
        composer = Composer(first_datum_only, [spec(square, 0.5, "square")])
        loss, metrics = composer(DATA, leaves)
        loss.backward()
        composition = composer.compute(DATA, logprobs)
        assert loss.item() == composition.loss_total == metrics["loss_total"]
        for leaf, gradient in zip(leaves, composition.gradients, strict=True):
            assert torch.equal(leaf.grad, gradient)

    def test_a_datum_that_no_term_touches_gets_zeros(self, logprobs):
        leaves = [t.clone().requires_grad_() for t in logprobs]
        loss, _ = Composer(None, [spec(first_datum_only, 1.0, "first")])(DATA, leaves)
        loss.backward()
        assert leaves[1].grad.tolist() == [[0, 0], [0, 0]]

    def test_only_a_base_loss_is_that_base_loss(self, logprobs):
        sentinel = {"anything": object()}
        leaves = [t.clone().requires_grad_() for t in logprobs]
        loss, metrics = Composer(lambda d, x: (x[0].sum(), sentinel))(DATA, leaves)
        assert metrics is sentinel
        assert type(loss.grad_fn).__name__ == "SumBackward0"

    def test_a_scaled_loss_scales_the_gradient(self, logprobs):
        leaves = [t.clone().requires_grad_() for t in logprobs]
        loss, _ = Composer(None, [spec(total, 1.0, "total")])(DATA, leaves)
        (2 * loss).backward()
        assert leaves[0].grad.tolist() == [2, 2, 2]


class TestTermsThatFail:
    @pytest.mark.parametrize(
        ("fn", "message"),
        [
            (raises, r"the term \"bad\" raised KeyError: 'no such reward'"),
            (exits, r'the term "bad" raised SystemExit: enough'),
            (returns_vector, r'the term "bad" returned a loss of shape \[3\]; expected a scalar'),
            (returns_text, r'the term "bad" returned .low. \(str\) as its loss; .* or a number'),
            (
                returns_bare_loss,
                r'the term "bad" returned a tensor of shape \[\]; a term returns a',
            ),
            (returns_text_metric, r'the metric "note" of the term "bad" is \'fine\' \(str\)'),
            (changes_in_place, r'the term "bad" changed the logprobs in place'),
        ],
    )
    @pytest.mark.parametrize("place", [False, True])
    def test_the_error_names_the_term(self, logprobs, fn, message, place):
        composer = Composer(total, [spec(fn, 1.0, "bad", run_in_executor=place)])
        with pytest.raises(TermError, match=message) as caught:
            composer.compute(DATA, logprobs)
        assert "bad" in caught.value.term

    def test_it_keeps_type_traceback_and_cause(self, logprobs):
        with pytest.raises(TermError) as caught:
            Composer(raises).compute(DATA, logprobs)
        assert caught.value.term == "base_loss"
        assert caught.value.error_type == "KeyError"
        assert 'raise KeyError("no such reward")' in caught.value.traceback
        assert caught.value.traceback.count("File ") == 1  # the term's own, none of ours
        assert isinstance(caught.value.__cause__, KeyError)

    @pytest.mark.parametrize("fn", [raises, exits, returns_vector])
    def test_a_skipped_term_is_logged_recorded_and_contributes_nothing(self, logprobs, fn, caplog):
        terms = [spec(fn, 5.0, "bad", on_error="skip"), spec(square, 1.0, "good")]
        composition = Composer(total, terms).compute(DATA, logprobs)
        (warning,) = caplog.messages
        assert warning.startswith('the term "bad" ')
        assert warning.endswith("; it is skipped, and contributes 0 to this step")
        alone = Composer(total, terms[1:]).compute(DATA, logprobs)
        assert composition.loss_total == alone.loss_total
        assert torch.equal(composition.gradient.flat, alone.gradient.flat)
        bad = composition.record["regularizers"]["bad"]
        assert bad.keys() == composition.record["regularizers"]["good"].keys()
        assert bad["skipped"] is True
        assert 'the term "bad"' in bad["error"]
        assert (bad["value"], bad["contribution"]) == (None, 0.0)

    @pytest.mark.parametrize("place", [False, True, "process"])
    def test_changing_the_logprobs_cannot_be_skipped(self, logprobs, place):
        terms = [
            spec(changes_in_place, 1.0, "bad", on_error="skip", run_in_executor=place),
            spec(square, 1.0, "good"),
        ]
        with pytest.raises(ChangedLogprobsError, match='"bad" changed the logprobs in place'):
            Composer(None, terms).compute(DATA, logprobs)

    def test_keyboard_interrupt_passes_through(self, logprobs):
        def interrupted(data, logprobs):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Composer(interrupted).compute(DATA, logprobs)

    def test_a_failure_ends_the_wait_for_the_others(self, logprobs):
        abandoned = threading.Event()

        async def waits(data, logprobs):
            try:
                await asyncio.Event().wait()
            finally:
                abandoned.set()

        terms = [spec(waits, 1.0, "waits"), spec(raises, 1.0, "raises", run_in_executor=True)]
        with pytest.raises(TermError, match="no such reward"):
            Composer(None, terms).compute(DATA, logprobs)
        assert abandoned.wait(30)


class TestNonFinite:
    def test_a_gradient_is_located(self, logprobs):
        with pytest.raises(NonFiniteError) as caught:
            Composer(nan_gradient_in_datum_1).compute(DATA, logprobs)
        error = caught.value
        assert (error.term, error.datum, error.token) == ("base_loss", 1, (0, 1))
        assert "datum 1, token [0, 1]" in str(error)

    def test_an_infinite_loss_is_named(self, logprobs):
        with pytest.raises(NonFiniteError, match='the loss of the term "base_loss" is inf'):
            Composer(infinite_loss).compute(DATA, logprobs)

    def test_an_infinite_input_is_told_from_a_bad_loss(self, logprobs):
        logprobs[1][1, 0] = -math.inf
        with pytest.raises(NonFiniteError, match=r"logprobs themselves .* datum 1, token \[1, 0\]"):
            Composer(square).compute(DATA, logprobs)

    def test_skip(self, logprobs, caplog):
        term = spec(nan_gradient_in_datum_1, 1.0, "nan", on_non_finite="skip")
        composition = Composer(total, [term]).compute(DATA, logprobs)
        assert "datum 1" in caplog.text
        assert "it is skipped" in caplog.text
        assert composition.loss_total == -28
        assert composition.gradients[1].tolist() == [[1, 1], [1, 1]]
        assert "datum 1" in composition.record["regularizers"]["nan"]["error"]

    def test_other_infinite_inputs_are_counted_only_where_there_are_any(self):
        def error(values: list[float]) -> str:
            with pytest.raises(NonFiniteError) as raised:
                Composer("nll").compute([None], [torch.tensor(values)])
            return str(raised.value)

        assert "at datum 0, token 1, so mask" in error([-1.0, math.nan, -1.0])
        assert "at datum 0, token 1 (and 1 more), so mask" in error([-1.0, math.nan, math.nan])

    def test_zero_keeps_the_finite_part_and_counts(self, logprobs):
        term = spec(nan_gradient_in_datum_1, 1.0, "nan", on_non_finite="zero")
        composition = Composer(total, [term]).compute(DATA, logprobs)
        record = composition.record["regularizers"]["nan"]
        assert composition.gradients[0].tolist() == [2, 2, 2]
        assert torch.isfinite(composition.gradient.flat).all()
        assert record["non_finite_zeroed"] >= 1
        assert composition.loss_total == pytest.approx(-28 + record["value"])

    def test_zero_leaves_an_infinite_value_out_of_the_total(self, logprobs):
        term = spec(infinite_loss, 1.0, "inf", on_non_finite="zero")
        composition = Composer(total, [term]).compute(DATA, logprobs)
        assert composition.loss_total == -28
        assert composition.record["regularizers"]["inf"]["value"] == math.inf


class TestBadRequests:
    def test_nothing_to_compute(self):
        with pytest.raises(RequestError, match="there is nothing to compute"):
            Composer()
        with pytest.raises(RequestError, match="there is nothing to compute"):
            Composer(None, [spec(square, 1.0, "off", enabled=False)])

    @pytest.mark.parametrize(
        ("data", "count", "message"),
        [
            (DATA[:1], 2, "got 1 datum but 2 logprob tensors"),
            ([], 0, "the batch is empty"),
        ],
    )
    def test_counts(self, logprobs, data, count, message):
        with pytest.raises(RequestError, match=message):
            Composer(total).compute(data, logprobs[:count])

    def test_logprobs_must_be_float_tensors(self, logprobs):
        with pytest.raises(RequestError, match=r"logprobs\[1\] is a list") as caught:
            Composer(total).compute(DATA, [logprobs[0], [1.0]])
        assert caught.value.path == "logprobs[1]"
        with pytest.raises(RequestError, match=r"logprobs\[0\] has dtype int64"):
            Composer(total).compute(DATA, [logprobs[0].long(), logprobs[1]])

    def test_a_composer_goes_on_after_a_failure(self, logprobs):
        fails = [True]

        def fails_once(data, logprobs):
            if fails.pop():
                raise ValueError("once")
            return total(data, logprobs)

        fails[:0] = [False]
        composer = Composer(fails_once)
        with pytest.raises(TermError):
            composer.compute(DATA, logprobs)
        assert composer.compute(DATA, logprobs).loss_total == -28


def test_the_flat_record_is_floats_without_colons(logprobs):
    def with_metrics(data, logprobs):
        return logprobs[0].sum(), {"reward:mean": 0.5, "pass": True}

    composition = Composer(total, [spec(with_metrics, 1.0, "reward")]).compute(DATA, logprobs)
    flat = composition.flat_record
    assert flat["regularizers/reward/custom/reward.mean"] == 0.5
    assert flat["regularizers/reward/custom/pass"] == 1.0
    assert flat["regularizers/reward/differentiable"] == 1.0
    assert flat["base_loss/value"] == -28
    assert not [key for key in flat if ":" in key]
    assert {type(value) for value in flat.values()} == {float}
    assert flat == flatten(composition.record)


@pytest.mark.parametrize(
    "error",
    [
        TermError("it failed", term="a", error_type="KeyError", traceback="…"),
        NonFiniteError("it is nan", term="a", datum=1, token=(2,)),
        RequestError("it is wrong", path="data"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_can_be_pickled(error):
    """Else one that a process raises would break the pool that it runs in."""
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_a_gradient_that_does_not_fit_the_dtype_of_the_logprobs(logprobs):
    composer = Composer(None, [spec(total, 1e6, "total")])
    with pytest.raises(NonFiniteError, match="does not fit into float16"):
        composer.compute(DATA, [t.half() for t in logprobs])
    assert composer.compute(DATA, [t.bfloat16() for t in logprobs]).gradients


def test_a_metric_beyond_all_floats_is_an_error_of_its_term(logprobs):
    with pytest.raises(TermError, match='the term "base_loss" raised OverflowError'):
        Composer(lambda data, x: (x[0].sum(), {"n": 10**400})).compute(DATA, logprobs)


@pytest.mark.parametrize("shape", [[], [1, 1, 2]])
def test_logprobs_of_another_rank_are_refused(shape):
    with pytest.raises(
        RequestError, match=r"logprobs\[1\] has shape .*; expected \[T\] or \[T,K\]"
    ):
        Composer(total).compute(DATA, [torch.zeros(2), torch.zeros(shape)])


@pytest.mark.parametrize("wrong", [None, iter([])])
def test_what_has_no_length_is_refused(logprobs, wrong):
    with pytest.raises(RequestError, match=r"data is a .*; expected a list"):
        Composer(total).compute(wrong, logprobs)
    with pytest.raises(RequestError, match=r"logprobs is a .*; expected a list"):
        Composer(total).compute(DATA, wrong)
