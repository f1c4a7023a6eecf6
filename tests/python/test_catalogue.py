"""What every term of the catalogue must do. None can be added without it."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import pytest
import torch

from naive_terms import CASES, CHOSEN, GROUPS, Case
from tinker_custom_loss import Composer, Regularizer, TensorBatch, term
from tinker_custom_loss.terms import CATALOGUE
from tinker_custom_loss.terms.reduction import REDUCTIONS

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


class Rows:
    """Datums of given shapes: random logprobs, every input that a term may read, weights."""

    def __init__(self, shapes, dtype=torch.float64, seed=0, weighted=True):
        self._generator = torch.Generator().manual_seed(seed)
        self.shapes, self.dtype = shapes, dtype
        self.logprobs = [self._logprobs(shape) for shape in shapes]
        self.inputs = [self._inputs(shape) for shape in shapes]
        self.weights = [self._weights(shape, weighted) for shape in shapes]
        for shape, row in zip(shapes, self.inputs, strict=True):
            row["old_logprobs"] = self._logprobs(shape)
        self.groups, self.chosen = GROUPS[: len(shapes)], CHOSEN[: len(shapes)]

    def _random(self, shape):
        return torch.rand(shape, generator=self._generator, dtype=torch.float64)

    def _logprobs(self, shape):
        """Alternatives hold some, but not all, of the mass."""
        if len(shape) == 2 and shape[1] > 1:
            return (torch.log_softmax(2 * self._random(shape), -1) - 0.2).to(self.dtype)
        return (-3 * self._random(shape) - 0.1).to(self.dtype)

    def _inputs(self, shape):
        advantages = (self._random(shape) * 4 - 2).round(decimals=2)
        advantages.view(-1)[-1] = 0.0
        return {
            "reference_logprobs": self._logprobs(shape),
            "teacher_logprobs": self._logprobs(shape),
            "logprobs": self._logprobs(shape),
            "advantages": advantages.to(self.dtype),
        }

    def _weights(self, shape, weighted):
        """Some are 0, some 1, some neither; a position's alternatives have its weight."""
        if not weighted:
            return torch.ones(shape[0], dtype=self.dtype)
        picked = (self._random(shape[:1]) * 3).floor()
        return torch.tensor([0.0, 1.0, 0.5], dtype=self.dtype)[picked.long()]

    @property
    def data(self):
        return [
            SimpleNamespace(
                loss_fn_inputs={"weights": w, "group": group, "chosen": chosen, **inputs}
            )
            for w, group, chosen, inputs in zip(
                self.weights, self.groups, self.chosen, self.inputs, strict=True
            )
        ]

    @property
    def batch(self):
        return TensorBatch.from_tensors(self.logprobs)

    def of(self, made, **params):
        return made.value_and_gradient(self.data, self.batch, **params)

    def to(self, dtype):
        other = Rows(self.shapes, dtype)
        other.logprobs = [x.to(dtype) for x in self.logprobs]
        other.inputs = [{k: v.to(dtype) for k, v in row.items()} for row in self.inputs]
        other.weights = [w.to(dtype) for w in self.weights]
        return other

    def part(self, indices):
        other = Rows([self.shapes[i] for i in indices], self.dtype)
        other.logprobs = [self.logprobs[i] for i in indices]
        other.inputs = [self.inputs[i] for i in indices]
        other.weights = [self.weights[i] for i in indices]
        other.groups = [self.groups[i] for i in indices]
        other.chosen = [self.chosen[i] for i in indices]
        return other

    def permuted(self, flat, order):
        split = self.batch.with_flat(flat).tensors()
        return torch.cat([split[i].reshape(-1) for i in order])

    def parts(self, made):
        """Indices of the datums, apart as far as the term's scope lets them be."""
        if made.scope != "group":
            return [[i] for i in range(len(self.shapes))]
        return [
            [i for i, group in enumerate(self.groups) if group == each]
            for each in sorted({*self.groups})
        ]


# --- The naive side ------------------------------------------------------------------------


def total(values, weights):
    """``Σ w·v`` of a datum, and ``Σ w``: both over the values, of which there may be K a weight."""
    pairs = []
    for value, weight in zip(values, weights, strict=True):
        pairs += [(v, weight) for v in (value if isinstance(value, list) else [value])]
    return sum(w * v for v, w in pairs if w != 0), sum(w for _, w in pairs)


def naive_loss(case: Case, rows: Rows, now, reduction):
    inputs = [{key: x.tolist() for key, x in row.items()} for row in rows.inputs]
    then = [x.tolist() for x in rows.logprobs]
    weights = [
        w.tolist() if len(shape) == 1 else [[each] * shape[1] for each in w.tolist()]
        for w, shape in zip(rows.weights, rows.shapes, strict=True)
    ]
    lengths = [float(torch.tensor(w).sum()) for w in weights]
    if CATALOGUE[case.name].scope == "group":
        values = case.naive(now, then, inputs, weights, rows.groups, rows.chosen, **case.params)
        divisor = {"token_sum": 1.0, "token_mean": sum(lengths)}.get(reduction, len(values))
        return sum(values) / divisor
    sums = []
    for i, args in enumerate(zip(now, then, inputs, weights, strict=True)):
        values = case.naive(*args, **case.params)
        if isinstance(values, list):  # of tokens
            values, lengths[i] = total(values, rows.weights[i].tolist())
        sums.append(values)
    if reduction == "sequence_mean_token_mean":
        return sum(s / n for s, n in zip(sums, lengths, strict=True) if n) / len(sums)
    divisor = {"token_sum": 1.0, "token_mean": sum(lengths)}.get(reduction, len(sums))
    return sum(sums) / divisor


def finite_differences(case, rows, reduction, eps=1e-6):
    gradient = []
    for i, tensor in enumerate(rows.logprobs):
        for position in range(tensor.numel()):
            losses = []
            for step in (eps, -eps):
                moved = [x.clone() for x in rows.logprobs]
                moved[i].view(-1)[position] += step
                losses.append(naive_loss(case, rows, [x.tolist() for x in moved], reduction))
            gradient.append((losses[0] - losses[1]) / (2 * eps))
    return torch.tensor(gradient, dtype=torch.float64)


def remade(made, fn):
    """The same term over another function, and without a derivative."""
    return term(
        scope=made.scope,
        inputs=[*made.inputs.values()],
        optional=[*made.optional.values()],
        alternatives=made.alternatives,
        importance=made.has_importance,
    )(fn)


def check_value_and_gradient(made, case, reduction):
    rows = Rows(case.shapes)
    evaluated = rows.of(made, reduction=reduction, **case.params)
    expected = naive_loss(case, rows, [x.tolist() for x in rows.logprobs], reduction)
    assert float(evaluated.loss) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert evaluated.gradient is not None, "the loss does not depend on the logprobs"
    torch.testing.assert_close(
        evaluated.gradient, finite_differences(case, rows, reduction), rtol=1e-6, atol=1e-7
    )


# --- The suite -----------------------------------------------------------------------------


def test_every_term_has_a_case():
    assert {case.name for case in CASES} == CATALOGUE.keys()


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_term_of_tokens_or_sequences_knows_its_derivative(name):
    assert CATALOGUE[name].has_derivative or CATALOGUE[name].scope == "group"


@every_case
@every_reduction
class TestReduced:
    def test_value_and_gradient_are_those_of_the_formula(self, case, reduction):
        check_value_and_gradient(CATALOGUE[case.name], case, reduction)

    def test_a_normalizer_divides(self, case, reduction):
        rows, made = Rows(case.shapes), CATALOGUE[case.name]
        plain = rows.of(made, reduction=reduction, **case.params)
        divided = rows.of(made, reduction=reduction, normalizer=8, **case.params)
        assert float(divided.loss) * 8 == pytest.approx(float(plain.loss))
        torch.testing.assert_close(divided.gradient * 8, plain.gradient)

    def test_parts_of_a_step_add_up_with_its_totals(self, case, reduction):
        rows, made = Rows(case.shapes), CATALOGUE[case.name]
        options = {"reduction": reduction, **case.params}
        whole = rows.of(made, **options)
        first, *others = rows.parts(made)
        rest = [index for indices in others for index in indices]
        order = [*rest, *first]
        parts = [rows.part(rest), rows.part(first)]
        totals = made.totals(rows.data, rows.batch, **options)
        each = [part.of(made, totals=totals, **options) for part in parts]
        assert sum(float(x.loss) for x in each) == pytest.approx(float(whole.loss))
        joined = torch.cat([x.gradient for x in each])
        torch.testing.assert_close(joined, rows.permuted(whole.gradient, order))
        own = [made.totals(part.data, part.batch, **options) for part in parts]
        assert {key: own[0][key] + own[1][key] for key in totals} == pytest.approx(totals)

    def test_contributions_add_up_to_the_loss(self, case, reduction):
        rows, made = Rows(case.shapes), CATALOGUE[case.name]
        options = {"reduction": reduction, **case.params}
        parts = made.contributions(rows.data, rows.logprobs, **options)
        assert sum(float(x.sum()) for x in parts) == pytest.approx(
            float(rows.of(made, **options).loss)
        )
        assert made.scope == "group" or len(parts) == len(rows.data)


@every_case
class TestEvery:
    def test_permuting_datums_permutes_gradients(self, case):
        rows, made = Rows(case.shapes), CATALOGUE[case.name]
        order = [*reversed(range(len(rows.shapes)))]
        options = {"reduction": "sequence_mean_token_mean", **case.params}
        forward, backward = rows.of(made, **options), rows.part(order).of(made, **options)
        assert float(backward.loss) == pytest.approx(float(forward.loss))
        torch.testing.assert_close(backward.gradient, rows.permuted(forward.gradient, order))

    def test_the_weight_of_the_term_scales_its_gradient(self, case):
        rows, made = Rows(case.shapes), CATALOGUE[case.name]

        def gradient(weight):
            regularizer = Regularizer(made, weight, case.name, params=case.params)
            return Composer(None, [regularizer]).compute(rows.data, rows.logprobs).gradient.flat

        torch.testing.assert_close(gradient(-2.5), -2.5 * gradient(1.0))

    def test_the_composer_gets_the_same_from_lists_and_buffers(self, case):
        rows, made = Rows(case.shapes), CATALOGUE[case.name]
        evaluated = rows.of(made, **case.params)
        leaves = [x.clone().requires_grad_() for x in rows.logprobs]
        loss, metrics = made(rows.data, leaves, **case.params)
        loss.backward()
        assert float(loss.detach()) == float(evaluated.loss)
        assert metrics == evaluated.metrics
        by_autograd = torch.cat([x.grad.reshape(-1) for x in leaves])
        torch.testing.assert_close(by_autograd, evaluated.gradient, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("poison", [-math.inf, math.inf, math.nan])
    def test_what_is_masked_has_no_part_whatever_it_holds(self, case, poison):
        rows, made = Rows(case.shapes, seed=1), CATALOGUE[case.name]
        options = {"reduction": "sequence_mean_token_mean", **case.params}
        clean = rows.of(made, **options)
        masked = [
            w == 0 if len(shape) == 1 else (w == 0)[:, None].expand(shape)
            for w, shape in zip(rows.weights, rows.shapes, strict=True)
        ]
        assert sum(int(x.sum()) for x in masked)
        for logprobs, inputs, mask in zip(rows.logprobs, rows.inputs, masked, strict=True):
            for tensor in (logprobs, *inputs.values()):
                tensor[mask] = poison
        for each in (made, remade(made, made.__wrapped__)):
            poisoned = rows.of(each, **options)
            assert float(poisoned.loss) == pytest.approx(float(clean.loss))
            torch.testing.assert_close(poisoned.gradient, clean.gradient)
            flat = torch.cat([x.reshape(-1) for x in masked])
            assert (poisoned.gradient[flat] == 0).all()
        tokens = sum(int((w != 0).sum()) for w in rows.weights)
        entries = int((~flat).sum())
        assert poisoned.metrics["tokens"] == (tokens if made.alternatives else entries)

    def test_a_batch_without_any_weight_is_zero(self, case):
        rows, made = Rows(case.shapes), CATALOGUE[case.name]
        rows.weights = [torch.zeros_like(w) for w in rows.weights]
        for reduction in REDUCTIONS:
            evaluated = rows.of(made, reduction=reduction, **case.params)
            assert float(evaluated.loss) == 0 or made.scope == "group"
            assert (evaluated.gradient == 0).all()

    @pytest.mark.parametrize("extreme", [0.0, -1e-8, -50.0, -math.inf])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_at_the_ends_nothing_is_nan_and_autograd_agrees(self, case, extreme, dtype):
        made = CATALOGUE[case.name]
        for datum in range(len(case.shapes)):
            rows = Rows(case.shapes, dtype, weighted=False)
            rows.logprobs[datum].view(-1)[0] = extreme
            closed = rows.of(made, **case.params)
            assert not math.isnan(float(closed.loss))
            assert not closed.gradient.isnan().any()
            graph = rows.of(remade(made, made.__wrapped__), **case.params)
            assert float(graph.loss) == float(closed.loss)
            torch.testing.assert_close(graph.gradient, closed.gradient, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("distance", [-60.0, -8.0, 8.0, 60.0])
    def test_far_from_the_sampler_and_the_reference_autograd_agrees(self, case, distance):
        made = CATALOGUE[case.name]
        rows = Rows(case.shapes, weighted=False)
        for inputs, logprobs in zip(rows.inputs, rows.logprobs, strict=True):
            for key in ("logprobs", "reference_logprobs"):
                inputs[key] = logprobs - distance * torch.where(inputs["advantages"] > 0, 1, -1)
        closed = rows.of(made, **case.params)
        graph = rows.of(remade(made, made.__wrapped__), **case.params)
        assert math.isfinite(float(closed.loss))
        assert float(graph.loss) == float(closed.loss)
        torch.testing.assert_close(graph.gradient, closed.gradient)

    def test_single_precision_is_double_precision_to_its_digits(self, case):
        made = CATALOGUE[case.name]
        single = Rows(case.shapes, torch.float32)
        low, high = single.of(made, **case.params), single.to(torch.float64).of(made, **case.params)
        assert float(low.loss) == pytest.approx(float(high.loss), rel=1e-5, abs=1e-5)
        torch.testing.assert_close(low.gradient.double(), high.gradient, rtol=1e-5, atol=1e-5)

    def test_each_datum_or_group_alone_is_what_it_is_in_the_batch(self, case):
        rows, made = Rows(case.shapes), CATALOGUE[case.name]
        together = rows.of(made, **case.params).gradient
        for indices in rows.parts(made):
            alone = rows.part(indices).of(made, **case.params)
            torch.testing.assert_close(alone.gradient, rows.permuted(together, indices))

    def test_a_detached_value_does_not_pass(self, case):
        made = CATALOGUE[case.name]

        @functools.wraps(made.__wrapped__)
        def detached(*args, **params):
            returned = made.__wrapped__(*args, **params)
            return (returned[0] if isinstance(returned, tuple) else returned).detach()

        with pytest.raises(AssertionError, match="does not depend on the logprobs"):
            check_value_and_gradient(remade(made, detached), case, "token_sum")
