"""Terms as users name and write them: the mask, the reductions, what bad input is told."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import pickle
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import pytest
import tinker
import torch

from tinker_custom_loss import Composer, Regularizer, RequestError, TensorBatch, TermError, term
from tinker_custom_loss.port.data import WireData
from tinker_custom_loss.terms import CATALOGUE, Range, columns, entropy, kl, l2, nll

every_term = pytest.mark.parametrize("name", CATALOGUE)


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
            datum(shape[0], weights=w, reference_logprobs=r)
            for shape, w, r in zip(shapes, self.weights, self.references, strict=True)
        ]

    def compute(self, name, **params):
        composer = Composer(CATALOGUE[name], base_params=params)
        return composer.compute(self.data, self.logprobs)


def datum(tokens, **inputs):
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1] * tokens),
        loss_fn_inputs={
            key: tinker.TensorData.from_torch(torch.as_tensor(value))
            for key, value in inputs.items()
        },
    )


class TestReductions:
    @pytest.mark.parametrize(
        ("reduction", "expected"),
        [
            ("token_sum", lambda sums: sum(sums)),
            ("token_mean", lambda sums: sum(sums) / 8),
            ("sequence_mean_token_mean", lambda sums: (sums[0] / 4 + sums[1] / 4) / 2),
            ("sequence_mean_token_sum", lambda sums: sum(sums) / 2),
        ],
    )
    def test_are_what_their_names_say(self, reduction, expected):
        logprobs = [torch.tensor([-1.0, -2.0]), torch.tensor([-0.5, -3.0, -1.5])]
        weights = [torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0, 2.0])]
        data = [datum(len(w), weights=w) for w in weights]
        sums = [float(-(x * w).sum()) for x, w in zip(logprobs, weights, strict=True)]
        loss, metrics = nll(data, logprobs, reduction=reduction)
        assert float(loss) == pytest.approx(expected(sums))
        assert metrics["tokens"] == 4

    @every_term
    def test_an_unknown_one_lists_those_that_exist(self, name):
        with pytest.raises(
            RequestError, match="expected one of token_sum, token_mean, sequence_mean"
        ):
            Rows([(2,)]).compute(name, reduction="average")

    @pytest.mark.parametrize("normalizer", [0, -1, math.nan, math.inf, "8", True])
    def test_a_normalizer_is_a_positive_number(self, normalizer):
        with pytest.raises(RequestError, match="normalizer must be a positive number or None"):
            Rows([(2,)]).compute("nll", normalizer=normalizer)


class TestTheMask:
    def test_is_the_mask_of_an_rl_datum_so_that_its_prompt_does_not_count(self):
        """Sampler's logprobs of a prompt are 0 there; k2 would say ½·6² twice."""
        data = [datum(3, mask=[0.0, 0.0, 1.0], reference_logprobs=[0.0, 0.0, -1.0])]
        logprobs = [torch.tensor([-6.0, -6.0, -1.0])]
        composition = Composer(kl).compute(data, logprobs)
        assert composition.loss_total == 0
        assert composition.record["base_loss"]["custom"]["tokens"] == 1

    def test_is_the_weights_where_a_datum_has_both(self):
        data = [datum(2, weights=[1.0, 0.0], mask=[0.0, 1.0]), datum(1, mask=[0.5])]
        loss, _ = nll(data, [torch.tensor([-1.0, -10.0]), torch.tensor([-4.0])])
        assert float(loss) == 1 + 2

    def test_is_1_where_there_is_neither_which_is_said_once(self, caplog):
        columns._warn_of_ones.cache_clear()
        logprobs = [torch.tensor([-1.0, -2.0])]
        with caplog.at_level(logging.WARNING, logger="tinker_custom_loss"):
            for _ in range(3):
                assert float(nll([datum(2, rewards=[1.0, 1.0])], logprobs)[0]) == 3
        (record,) = caplog.records
        assert 'neither "weights" nor "mask"' in record.getMessage()

    def test_is_1_without_a_word_where_there_are_no_data(self, caplog):
        """Over the port, such a call has datums without inputs."""
        columns._warn_of_ones.cache_clear()
        logprobs = [torch.tensor([-1.0, -2.0])]
        composition = Composer(nll).compute(WireData(1, {}), logprobs)
        assert composition.loss_total == 3
        assert not caplog.records

    def test_is_left_alone_where_weights_is_none(self, caplog):
        columns._warn_of_ones.cache_clear()
        data = [datum(2, weights=[0.0, 0.0])]
        assert float(nll(data, [torch.tensor([-1.0, -2.0])], weights=None)[0]) == 3
        assert not caplog.records

    def test_of_tokens_serves_their_alternatives(self):
        data = [datum(3, weights=[0.0, 1.0, 0.5])]
        gradient = Composer(nll).compute(data, [torch.zeros(3, 2)]).gradients[0]
        assert gradient.tolist() == [[0, 0], [-1, -1], [-0.5, -0.5]]

    def test_of_alternatives_serves_a_value_a_position_only_if_they_are_alike(self):
        logprobs = [torch.full((2, 2), -1.0)]
        alike = [datum(2, weights=[[2.0, 2.0], [0.0, 0.0]])]
        assert float(entropy(alike, logprobs)[0]) == pytest.approx(-4 * math.exp(-1))
        with pytest.raises(ValueError, match='"weights" of datum 0 differs between the alternat'):
            entropy([datum(2, weights=[[2.0, 1.0], [0.0, 0.0]])], logprobs)


class TestInputs:
    @pytest.mark.parametrize(
        "array",
        [
            lambda x: tinker.TensorData.from_torch(torch.tensor(x)),
            lambda x: np.array(x),
            lambda x: np.array(x, dtype=np.float32),
            lambda x: torch.tensor(x, dtype=torch.bfloat16),
            lambda x: x,
        ],
        ids=["TensorData", "float64 array", "float32 array", "bfloat16 tensor", "list"],
    )
    def test_may_be_any_array(self, array):
        data = [SimpleNamespace(loss_fn_inputs={"advantages": array([1.0, -2.0])})]
        loss, _ = CATALOGUE["reinforce"](data, [torch.tensor([-1.0, -3.0])], weights=None)
        assert float(loss) == 1 - 6

    def test_of_one_number_serve_the_whole_datum(self):
        data = [datum(2, advantages=2.0, weights=[1.0, 1.0])]
        loss, _ = CATALOGUE["reinforce"](data, [torch.tensor([-1.0, -3.0])])
        assert float(loss) == 8

    def test_have_any_key_under_the_name_of_their_argument(self):
        rows = Rows([(3,)])
        assert rows.compute("kl", reference="weights").loss_total > 0

    def test_that_are_optional_must_be_there_once_they_are_named(self):
        with pytest.raises(TermError, match='datum 0 has no "logprosb"'):
            Rows([(2,)]).compute("kl", sampler="logprosb")

    def test_that_are_optional_are_asked_for_when_they_are_needed(self):
        with pytest.raises(TermError, match='"k3_weighted" needs the sampler\'s logprobs'):
            Rows([(2,)]).compute("kl", estimator="k3_weighted")


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
        assert composition.gradients[0][0, 1] == 0
        p, q = rows.logprobs[0][:, [0, 2]], rows.references[0][:, [0, 2]]
        possible = (p.exp() * (p - q)).sum()
        sampled = (rows.logprobs[1] - rows.references[1]).square().sum() / 2
        assert composition.loss_total == pytest.approx(float(possible + sampled))
        composition = rows.compute("entropy", weights=None)
        value = (p.exp() * p).sum() + rows.logprobs[1].sum()
        assert composition.loss_total == pytest.approx(float(value))
        assert composition.gradients[0][0, 1] == 0


@pytest.mark.parametrize("name", ["kl", "entropy"])
def test_one_alternative_a_position_is_a_sampled_token(name):
    rows = Rows([(5,)])
    flat = rows.compute(name, weights=None)
    rows.data[0] = datum(5, reference_logprobs=rows.references[0][:, None])
    rows.logprobs[0] = rows.logprobs[0][:, None]
    column = rows.compute(name, weights=None)
    assert column.loss_total == flat.loss_total
    assert torch.equal(column.gradients[0][:, 0], flat.gradients[0])


@pytest.mark.parametrize("size", [3, 300_000])
def test_l2_can_be_given_to_torch_func_at_every_size(size):
    values = -torch.rand(size)
    gradient = torch.func.grad(lambda x: l2([None], [x], weights=None)[0])(values)
    torch.testing.assert_close(gradient, 2 * values)


@pytest.mark.parametrize("name", ["kl", "entropy", "nll", "l2"])
@pytest.mark.parametrize("reduction", ["token_sum", "sequence_mean_token_mean"])
def test_a_default_device_has_no_part_in_a_term(name, reduction):
    rows = Rows([(3, 2), (4,), (2,)])
    rows.data = [
        datum(len(r), reference_logprobs=r, **({} if i else {"weights": torch.ones(3)}))
        for i, r in enumerate(rows.references)  # two have no weights
    ]
    expected = rows.compute(name, reduction=reduction)
    torch.set_default_device("meta")
    try:
        composition = rows.compute(name, reduction=reduction)
    finally:
        torch.set_default_device(None)
    assert composition.loss_total == expected.loss_total
    assert torch.equal(composition.gradient.flat, expected.gradient.flat)


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

    def test_an_unknown_estimator_lists_those_that_exist(self):
        with pytest.raises(RequestError, match="expected one of k1, k2, k3, k3_weighted, exact"):
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


@term(scope="token", inputs=("reference_logprobs",))
def drift(logprob, reference, *, power: float = 2.0):
    """How far the model is from its reference: ``|ℓ-r|^power``."""
    distance = (logprob - reference).abs()
    return distance**power, {"distance": distance}


@term(scope="sequence")
def shortness(logprob, *, sequences, target: float = 2.0):
    """How far a datum's mean logprob is from a target."""
    return (sequences.mean(logprob) - target).square()


@term(scope="group", inputs=("reference_logprobs",))
def preference(logprob, reference, *, groups):
    """The logistic loss of the chosen answer against the rejected one."""
    score = groups.sequences.sum(logprob - reference)
    chosen, rejected = groups.pairs
    return -torch.nn.functional.logsigmoid(score[chosen] - score[rejected])


@term(scope="token", alternatives=True)
def spread(logprob):
    """The distance of the best and the worst alternative; of a token alone it is 0."""
    if logprob.ndim == 1:
        return 0 * logprob
    return logprob.amax(-1) - logprob.amin(-1)


class TestWritingOne:
    def test_a_term_of_tokens(self):
        data = [datum(3, reference_logprobs=[-1.0, -1.0, -1.0], mask=[1.0, 1.0, 0.0])]
        logprobs = [torch.tensor([-3.0, -2.0, -9.0])]
        regularizer = Regularizer(drift, 0.5, "drift", params={"power": 2.0})
        composition = Composer(None, [regularizer]).compute(data, logprobs)
        assert composition.loss_total == 2.5
        assert composition.gradients[0].tolist() == [-2, -1, 0]
        assert composition.record["regularizers"]["drift"]["custom"] == {
            "tokens": 2.0,
            "distance": 3.0,
        }

    def test_a_term_of_sequences(self):
        data = [datum(2, weights=[1.0, 1.0]), datum(3, weights=[1.0, 0.0, 1.0])]
        logprobs = [torch.tensor([-1.0, -3.0]), torch.tensor([-1.0, math.nan, -2.0])]
        loss, _ = shortness(data, logprobs, reduction="sequence_mean_token_sum")
        assert float(loss) == pytest.approx((4**2 + 3.5**2) / 2)

    def test_a_term_of_groups(self):
        data = [
            datum(1, reference_logprobs=[0.0], group=g, chosen=c, weights=[1.0])
            for g, c in [(7, 0), (3, 1), (7, 1), (3, 0), (7, 0)]
        ]
        logprobs = [torch.tensor([x], requires_grad=True) for x in (-1.0, -2.0, -3.0, -4.0, -5.0)]
        margins = [-3 + 1, -2 + 4, -3 + 5]
        values = [math.log1p(math.exp(-m)) for m in margins]
        loss, _ = preference(data, logprobs)
        loss.backward()
        assert loss.item() == pytest.approx(sum(values))
        slopes = [1 / (1 + math.exp(m)) for m in margins]
        expected = [slopes[0], -slopes[1], -slopes[0] - slopes[2], slopes[1], slopes[2]]
        assert [x.grad.item() for x in logprobs] == pytest.approx(expected)
        mean, _ = preference(data, logprobs, reduction="sequence_mean_token_mean")
        assert mean.item() == pytest.approx(sum(values) / 3)

    def test_a_torn_group_is_named(self):
        data = [datum(1, reference_logprobs=[0.0], group=g, chosen=1) for g in (7, 8)]
        with pytest.raises(ValueError, match="group 7 has no rejected datum in this call"):
            preference(data, [torch.zeros(1), torch.zeros(1)], weights=None)

    def test_a_term_of_alternatives_gives_one_value_a_position(self):
        logprobs = [torch.tensor([-1.0]), torch.tensor([[-1.0, -3.0], [-2.0, -2.5]])]
        data = [datum(1, weights=[1.0]), datum(2, weights=[1.0, 2.0])]
        loss, metrics = spread(data, logprobs, reduction="token_mean")
        assert float(loss) == pytest.approx((0 + 2 + 2 * 0.5) / 4)
        assert metrics == {"tokens": 3}

    def test_it_is_described_by_what_it_takes(self):
        assert [*inspect.signature(drift).parameters] == [
            "data",
            "logprobs",
            "reference",
            "power",
            "weights",
            "reduction",
            "normalizer",
        ]
        assert drift.scope == "token"
        assert drift.inputs == {"reference": "reference_logprobs"}

    def test_values_of_another_shape_are_refused(self):
        @term(scope="token")
        def total(logprob):
            return logprob.sum()

        message = r'a tensor of shape \[\]; a term of scope "token" must give \[2\]'
        with pytest.raises(ValueError, match=message):
            total([datum(2)], [torch.zeros(2)], weights=None)

    def test_arguments_without_an_input_are_refused_at_once(self):
        with pytest.raises(TypeError, match=r"takes 2 positional arguments \(logprob, reference\)"):

            @term(scope="token")
            def wrong(logprob, reference):
                return logprob - reference

    def test_a_derivative_that_takes_something_else_is_refused_at_once(self):
        @term(scope="token")
        def squares(logprob, *, power=2):
            return logprob**power

        with pytest.raises(TypeError, match=r"derivative of the term squares takes \(logprob\)"):

            @squares.derivative
            def _(logprob):
                return 2 * logprob

    def test_an_unknown_scope_is_refused_at_once(self):
        with pytest.raises(TypeError, match="unknown scope 'tokens'; expected one of token, seq"):
            term(scope="tokens")


class TestNaming:
    def test_a_term_of_the_catalogue_goes_by_its_name(self):
        data = [
            datum(2, mask=[0.0, 1.0], logprobs=[0.0, -1.0], advantages=[0.0, 2.0]) for _ in range(2)
        ]
        logprobs = [torch.tensor([-9.0, -1.0]), torch.tensor([-9.0, -3.0])]
        composition = Composer(
            "reinforce", [{"fn": "l2", "weight": 0.5, "reduction": "token_mean"}]
        ).compute(data, logprobs)
        assert composition.record["base_loss"]["value"] == 8
        assert composition.record["regularizers"]["l2"]["value"] == 5
        assert composition.gradients[1].tolist() == [0, -2 - 1.5]

    def test_a_name_that_there_is_not_is_told_the_nearest(self):
        with pytest.raises(
            RequestError, match='it has no "entorpy"; of 28, the nearest are: entropy, '
        ) as caught:
            Regularizer("entorpy", 1.0)
        assert caught.value.path == "fn"

    def test_a_wrong_value_is_refused_when_it_is_given(self):
        with pytest.raises(RequestError, match="regularizer \"kl\": unknown estimator 'k4' of the"):
            Regularizer(kl, 1.0, params={"estimator": "k4"})
        with pytest.raises(RequestError, match="unknown reduction 'average' of the term kl; expe"):
            Regularizer(kl, 1.0, reduction="average")

    def test_a_reduction_is_given_once(self):
        with pytest.raises(
            RequestError, match="has two reductions, 'token_sum' and, in its params"
        ):
            Regularizer(kl, 1.0, reduction="token_sum", params={"reduction": "token_mean"})
        again = dataclasses.replace(Regularizer(kl, 1.0, reduction="token_mean"), weight=2.0)
        assert again.params == {"reduction": "token_mean"}

    def test_a_plain_function_does_its_own_reduction(self):
        with pytest.raises(RequestError, match="but its function does its own") as caught:
            Regularizer(lambda data, logprobs: (0.0, {}), 1.0, "plain", reduction="token_sum")
        assert caught.value.path == "reduction"


class TestImportanceWeights:
    """Of ppo, on one datum whose weights are exp(1), exp(-1) and 1."""

    def run(self, **params):
        inputs = {
            "logprobs": torch.tensor([-3.0, -1.0, -2.0]),
            "old_logprobs": torch.tensor([-2.0, -2.0, -2.0]),
            "advantages": torch.ones(3),
        }
        data = [SimpleNamespace(loss_fn_inputs=inputs)]
        batch = TensorBatch.from_tensors([torch.full((3,), -2.0)])
        return CATALOGUE["ppo"].value_and_gradient(data, batch, weights=None, **params)

    def test_are_truncated_at_the_cap(self):
        evaluated = self.run(importance="token_truncated")
        expected = -torch.tensor([2.0, math.exp(-1), 1.0])
        torch.testing.assert_close(evaluated.gradient, expected)
        assert evaluated.metrics["importance_truncated"] == 1.0
        assert evaluated.metrics["importance_weight"] == pytest.approx(3 + math.exp(-1))

    def test_mask_what_is_out_of_bounds_and_leave_denominators_alone(self):
        evaluated = self.run(
            importance="token_masked", importance_floor=0.5, reduction="token_mean"
        )
        assert evaluated.gradient.tolist() == pytest.approx([0.0, 0.0, -1 / 3])
        assert evaluated.metrics["importance_masked"] == pytest.approx(2 / 3)

    def test_of_a_sequence_are_the_product_of_its_tokens(self):
        evaluated = self.run(importance="sequence_truncated", importance_cap=5.0)
        assert evaluated.gradient.tolist() == pytest.approx([-1.0, -1.0, -1.0])

    @pytest.mark.parametrize(
        ("name", "params", "message"),
        [
            ("ppo", {"importance_cap": 2.0}, "has no meaning without importance weights"),
            ("ppo", {"importance": "tis"}, "unknown importance 'tis' of the term ppo"),
            ("ppo", {"importance": "token_masked", "old": "logprobs"}, 'compare the key "logpro'),
            ("ppo", {"importance": "token_truncated", "importance_floor": 0.5}, 'use "token_mas'),
            (
                "ppo",
                {"importance": "token_masked", "importance_floor": 2.5},
                "in \\[0, importance",
            ),
            ("gspo", {"importance": "token_masked"}, 'a whole sequence; use "sequence_masked"'),
            ("reinforce", {"old": "logprobs"}, 'the term reinforce has no parameter "old"'),
        ],
    )
    def test_that_make_no_sense_are_refused_when_given(self, name, params, message):
        with pytest.raises(RequestError, match=message):
            Regularizer(name, 1.0, params=params)


class TestRanges:
    @pytest.mark.parametrize(
        ("name", "params", "message"),
        [
            (
                "ppo",
                {"clip_low": 1.5},
                '"clip_low" of the term ppo must be a number in \\[0, 1',
            ),
            (
                "ppo",
                {"dual_clip": 1.0},
                '"dual_clip" of the term ppo must be a number > 1, or',
            ),
            (
                "cispo",
                {"low": 5.0},
                '"low" of the term cispo must be a number in \\[0, high',
            ),
            ("dpo", {"beta": 0.0}, '"beta" of the term dpo must be a number > 0, got 0.0'),
            ("dpo", {"beta": "0.1"}, "\"beta\" of the term dpo must be a number > 0, got '0.1'"),
            (
                "focal",
                {"gamma": math.nan},
                '"gamma" of the term focal must be a number >= 0',
            ),
            (
                "margin",
                {"label": 0.5},
                '"label" of the term margin must be an integer >= 0',
            ),
            ("dpo", {"bta": 0.1}, 'the term dpo has no parameter "bta"; known are: beta'),
        ],
    )
    def test_a_parameter_out_of_its_range_is_refused_when_given(self, name, params, message):
        with pytest.raises(RequestError, match=message):
            Regularizer(name, 1.0, params=params)

    def test_a_term_of_ones_own_declares_its_ranges_in_its_types(self):
        @term(scope="token")
        def drift(logprob, *, power: Annotated[float, Range(above=0)] = 2.0):
            return logprob.abs() ** power

        with pytest.raises(RequestError, match='"power" of the term drift must be a number > 0'):
            Regularizer(drift, 1.0, params={"power": 0})
