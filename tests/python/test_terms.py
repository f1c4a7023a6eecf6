"""Built-in terms: what all of them promise, then each one's formula."""

from __future__ import annotations

import inspect
import math
import pickle

import numpy as np
import pytest
import tinker
import torch

from tinker_custom_loss import Composer, TensorBatch, TermError
from tinker_custom_loss.terms import CATALOGUE, entropy, l2

SHAPES = {
    "tokens": [(4,), (3,)],
    "alternatives": [(3, 2), (2, 2)],
    "mixed": [(4,), (2, 3), (1,)],
}
REDUCTIONS = ["sum", "mean", "sequence_mean"]
every_term = pytest.mark.parametrize("name", sorted(CATALOGUE))
every_shape = pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


class Rows:
    """Datums of given shapes with logprobs, weights (some zero) and reference logprobs."""

    def __init__(self, shapes, dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def random(shape):
            return -torch.rand(shape, generator=generator, dtype=torch.float64) * 3 - 0.1

        self.logprobs = [random(shape).to(dtype) for shape in shapes]
        self.weights = [(random(shape) < -1).float() * 0.5 for shape in shapes]
        self.references = [random(shape).float() for shape in shapes]
        self.data = [
            tinker.Datum(
                model_input=tinker.ModelInput.from_ints([1] * shape[0]),
                loss_fn_inputs={
                    "weights": tinker.TensorData.from_torch(w),
                    "reference_logprobs": tinker.TensorData.from_torch(r),
                },
            )
            for shape, w, r in zip(shapes, self.weights, self.references, strict=True)
        ]

    def compute(self, name, **params):
        composer = Composer(CATALOGUE[name], base_params=params)
        return composer.compute(self.data, self.logprobs)


@every_term
@every_shape
@every_reduction
class TestPromisesOfEveryTerm:
    def test_flat_and_list_form_agree(self, name, shapes, reduction):
        rows = Rows(shapes)
        leaves = [x.clone().requires_grad_() for x in rows.logprobs]
        loss, metrics = CATALOGUE[name](rows.data, leaves, weights="weights", reduction=reduction)
        loss.backward()
        composition = rows.compute(name, weights="weights", reduction=reduction)
        assert float(loss.detach()) == composition.loss_total
        assert metrics == composition.telemetry["base_loss"]["custom"]
        for leaf, gradient in zip(leaves, composition.gradients, strict=True):
            assert torch.equal(leaf.grad, gradient)

    def test_masked_tokens_get_exactly_zero_even_at_minus_infinity(self, name, shapes, reduction):
        rows = Rows(shapes)
        for logprobs, weights in zip(rows.logprobs, rows.weights, strict=True):
            logprobs[weights == 0] = -math.inf
        composition = rows.compute(name, weights="weights", reduction=reduction)
        for gradient, weights in zip(composition.gradients, rows.weights, strict=True):
            assert (gradient[weights == 0] == 0).all()
            assert torch.isfinite(gradient).all()
        tokens = composition.telemetry["base_loss"]["custom"]["tokens"]
        assert tokens == sum(int((w != 0).sum()) for w in rows.weights)

    def test_permuting_datums_permutes_gradients(self, name, shapes, reduction):
        rows = Rows(shapes)
        forward = rows.compute(name, weights="weights", reduction=reduction)
        rows.data.reverse()
        rows.logprobs.reverse()
        backward = rows.compute(name, weights="weights", reduction=reduction)
        assert backward.loss_total == pytest.approx(forward.loss_total)
        for one, other in zip(forward.gradients, reversed(backward.gradients), strict=True):
            torch.testing.assert_close(one, other)

    def test_a_batch_without_any_weight_is_zero(self, name, shapes, reduction):
        rows = Rows(shapes)
        rows.data = [
            tinker.Datum(
                model_input=datum.model_input,
                loss_fn_inputs={
                    **datum.loss_fn_inputs,
                    "weights": tinker.TensorData.from_torch(torch.zeros(shape)),
                },
            )
            for datum, shape in zip(rows.data, shapes, strict=True)
        ]
        composition = rows.compute(name, weights="weights", reduction=reduction)
        assert composition.loss_total == 0
        assert composition.telemetry["total_grad_norm"] == 0


# Terms whose gradient is that of their value; the others say in their docs what it is instead.
TRUE_GRADIENT = [
    ("nll", "mixed", {}),
    ("l2", "mixed", {}),
    ("l2", "mixed", {"weights": "weights"}),
    ("kl", "mixed", {"estimator": "k2"}),
    ("entropy", "alternatives", {}),
]


@every_reduction
@pytest.mark.parametrize(("name", "kind", "params"), TRUE_GRADIENT)
def test_gradients_equal_finite_differences(name, kind, params, reduction):
    rows = Rows(SHAPES[kind])
    shapes = tuple(tuple(x.shape) for x in rows.logprobs)

    def loss(flat):
        batch = TensorBatch(flat, shapes)
        return CATALOGUE[name].evaluate_flat(rows.data, batch, reduction=reduction, **params)[0]

    flat = TensorBatch.from_tensors(rows.logprobs).flat.requires_grad_()
    assert torch.autograd.gradcheck(loss, (flat,))


@every_reduction
def test_reductions_are_what_their_names_say(reduction):
    rows = Rows([(2,), (3,)])
    weights = [torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0, 2.0])]
    rows.data = [
        tinker.Datum(
            model_input=tinker.ModelInput.empty(),
            loss_fn_inputs={"weights": tinker.TensorData.from_torch(w)},
        )
        for w in weights
    ]
    sums = [float(-(x * w).sum()) for x, w in zip(rows.logprobs, weights, strict=True)]
    expected = {
        "sum": sum(sums),
        "mean": sum(sums) / 8,
        "sequence_mean": (sums[0] / 4 + sums[1] / 4) / 2,
    }
    assert rows.compute("nll", reduction=reduction).loss_total == pytest.approx(expected[reduction])


class TestKL:
    @pytest.mark.parametrize(
        ("estimator", "value"),
        [("k1", lambda d: d), ("k2", lambda d: d**2 / 2), ("k3", lambda d: np.exp(-d) - 1 + d)],
    )
    def test_estimators_differ_in_value_and_share_the_gradient_of_the_reverse_kl(
        self, estimator, value
    ):
        rows = Rows([(5,)])
        composition = rows.compute("kl", estimator=estimator, weights=None)
        d = (rows.logprobs[0] - rows.references[0].double()).numpy()
        assert composition.loss_total == pytest.approx(value(d).sum())
        assert composition.gradients[0].numpy() == pytest.approx(d)

    def test_alternatives_are_summed_exactly(self):
        logits = torch.randn(3, 4, dtype=torch.float64)
        rows = Rows([(3, 4)])
        rows.logprobs = [torch.log_softmax(logits, -1)]
        p, q = rows.logprobs[0], rows.references[0].double()
        composition = rows.compute("kl", weights=None)
        assert composition.loss_total == pytest.approx(float((p.exp() * (p - q)).sum()))

    def test_an_impossible_alternative_adds_nothing(self):
        rows = Rows([(1, 3), (2,)])
        rows.logprobs[0][0, 1] = -math.inf
        composition = rows.compute("kl", weights=None)
        assert math.isfinite(composition.loss_total)
        assert composition.gradients[0][0, 1] == 0

    def test_the_reference_may_have_any_key(self):
        rows = Rows([(3,)])
        assert rows.compute("kl", reference="weights").loss_total > 0


def test_the_entropy_surrogate_has_the_gradient_of_the_entropy_in_expectation():
    """Summed over all tokens by their probability, the estimate is exact."""
    logits = torch.tensor([0.3, -1.2, 0.7, 0.1], dtype=torch.float64, requires_grad=True)
    log_p = torch.log_softmax(logits, 0)
    (exact,) = torch.autograd.grad((log_p.exp() * log_p).sum(), logits, retain_graph=True)
    expected = torch.zeros(4, dtype=torch.float64)
    for token, probability in enumerate(log_p.exp().detach()):
        sampled = log_p[token : token + 1]
        composition = Composer(entropy, base_params={"weights": None}).compute([None], [sampled])
        (chain,) = torch.autograd.grad(sampled, logits, composition.gradients[0], retain_graph=True)
        expected += probability * chain
    assert expected.numpy() == pytest.approx(exact.numpy())


class TestWhatATermSaysOfBadInput:
    def test_a_datum_without_the_key_is_named(self):
        rows = Rows([(2,), (2,)])
        rows.data[1] = tinker.Datum(model_input=tinker.ModelInput.empty())
        with pytest.raises(TermError, match='datum 1 has no "reference_logprobs"'):
            rows.compute("kl", weights=None)

    @every_term
    def test_a_misspelt_key_is_not_taken_for_weights_of_one(self, name):
        with pytest.raises(TermError, match=r'datum 0 has no "wieghts" .*; it has: reference_lo'):
            Rows([(2,)]).compute(name, weights="wieghts")

    def test_a_shape_that_disagrees_is_named(self):
        rows = Rows([(2,), (3,)])
        rows.logprobs[1] = torch.zeros(4)
        with pytest.raises(TermError, match=r'"weights" of datum 1 has shape \[3\], .* \[4\]'):
            rows.compute("nll")

    def test_weights_of_tokens_serve_their_alternatives(self):
        rows = Rows([(3,)])
        rows.logprobs = [torch.zeros(3, 2)]
        gradient = rows.compute("nll").gradients[0]
        assert torch.equal(gradient, -rows.weights[0][:, None].expand(3, 2))

    @every_term
    def test_an_unknown_reduction_lists_those_that_exist(self, name):
        with pytest.raises(TermError, match="expected one of sum, mean, sequence_mean"):
            Rows([(2,)]).compute(name, reduction="average", weights="weights")

    def test_an_unknown_estimator_lists_those_that_exist(self):
        with pytest.raises(TermError, match="expected one of k1, k2, k3"):
            Rows([(2,)]).compute("kl", estimator="k4")


@every_term
def test_a_term_is_a_documented_function_that_pickles_by_name(name):
    term = CATALOGUE[name]
    assert pickle.loads(pickle.dumps(term)) is term
    assert "reduction" in inspect.signature(term).parameters
    assert "Unit" in term.__doc__
    assert repr(term) == f"<term {name}>"


def test_l2_is_exact_to_float32_at_every_size():
    values = torch.rand(4_000_000)
    want = float(values.double().square().sum())
    composition = Composer(l2).compute([None], [values])
    assert composition.loss_total == pytest.approx(want, rel=1e-6)
    assert torch.equal(composition.gradient.flat, 2 * values)
