"""What a term is given decides its number: what is not meant must not become one."""

from __future__ import annotations

import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Literal

import pytest
import torch

from tinker_custom_loss import TensorBatch, term
from tinker_custom_loss.port.data import Column, WireData
from tinker_custom_loss.port.shapes import pack_shapes, read_shapes
from tinker_custom_loss.terms import CATALOGUE, bradley_terry, distill, kl, kto, margin, nll, orpo

PAIR = [torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -0.5])]


def shapes(*each):
    return read_shapes(pack_shapes(each), "shapes")


def datum(**inputs):
    return SimpleNamespace(loss_fn_inputs={"weights": torch.ones(2), **inputs})


class TestGroups:
    def test_an_index_that_is_no_integer_is_not_rounded(self):
        data = [datum(group=0.25, chosen=1), datum(group=0.75, chosen=0)]
        with pytest.raises(ValueError, match=r'"group" of datum 0 is 0\.25; expected an integer'):
            bradley_terry(data, PAIR)

    @pytest.mark.parametrize("chosen", [0.5, -1, math.nan])
    def test_chosen_is_0_or_1(self, chosen):
        data = [
            datum(group=1, chosen=1, reference_logprobs=PAIR[0]),
            datum(group=1, chosen=chosen, reference_logprobs=PAIR[1]),
        ]
        for made in (bradley_terry, kto):
            with pytest.raises(ValueError, match=r'"chosen" of datum 1 is .*; expected 0 or 1'):
                made(data, PAIR)

    def test_a_name_is_not_an_index(self):
        data = [datum(group="a", chosen=1), datum(group="a", chosen=0)]
        with pytest.raises(ValueError, match='"group" of datum 0 is no array of numbers'):
            bradley_terry(data, PAIR)


class TestNegativeWeights:
    """A mean over them would divide by their sum, and turn the sign or blow up."""

    @pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean_token_mean"])
    def test_have_no_mean(self, reduction):
        data = [datum(weights=torch.tensor([-1.0, -2.0])), datum()]
        with pytest.raises(ValueError, match=r'negative weights have no mean.*"token_sum"'):
            nll(data, PAIR, reduction=reduction)

    def test_have_no_mean_within_a_sequence(self):
        own = {"logprobs": PAIR[0], "advantages": 1.0}
        data = [datum(weights=torch.tensor([-1.0, -2.0]), **own), datum(**own)]
        with pytest.raises(ValueError, match="negative weights have no mean"):
            CATALOGUE["gspo"](data, PAIR)

    def test_have_a_sum(self):
        data = [datum(weights=torch.tensor([-1.0, -2.0])), datum()]
        assert float(nll(data, PAIR)[0]) == pytest.approx(-5 + 2)


class TestShapes:
    @pytest.mark.parametrize("made", [kl, distill])
    @pytest.mark.parametrize("shape", [(2,), (1,)])
    def test_alternatives_do_not_share_one_logprob(self, made, shape):
        """A sampled token's logprob says nothing of the other alternatives of its position."""
        key = "reference_logprobs" if made is kl else "teacher_logprobs"
        data = [datum(**{key: -torch.ones(shape)})]
        with pytest.raises(ValueError, match=rf'"{key}" of datum 0 has shape .* have \[2, 3\]'):
            made(data, [-2 * torch.ones(2, 3)])

    def test_alternatives_are_not_the_logprobs_of_a_sampled_token(self):
        data = [datum(reference_logprobs=-torch.ones(2, 3))]
        with pytest.raises(ValueError, match=r'"reference_logprobs" .*\[2, 3\].* have \[2\]'):
            kl(data, [PAIR[0]])

    def test_what_is_no_array_of_numbers_is_named(self):
        for value in (None, ["a", "b"]):
            with pytest.raises(ValueError, match='"advantages" of datum 0 is no array of numbers'):
                CATALOGUE["reinforce"]([datum(advantages=value)], PAIR[:1])


def test_a_datum_that_came_over_the_wire_is_weighted_as_any_other():
    """Where one has weights and all have a mask, its weights count."""
    flat = torch.tensor
    wire = WireData(
        2,
        {
            "weights": Column(flat([0.0, 1.0]), shapes((2,), None)),
            "mask": Column(flat([1.0, 1.0, 1.0, 0.0]), shapes((2,), (2,))),
        },
        Column(torch.zeros(4, dtype=torch.int64), shapes((2,), (2,))),
    )
    inputs = [{"weights": flat([0.0, 1.0]), "mask": torch.ones(2)}, {"mask": flat([1.0, 0.0])}]
    local = [SimpleNamespace(loss_fn_inputs=each) for each in inputs]
    assert float(nll(wire, PAIR)[0]) == float(nll(local, PAIR)[0]) == 3.5


class TestPrecision:
    """Single precision must give what double precision gives."""

    @pytest.mark.parametrize(("c", "r"), [(-1e-8, -1e-8), (-1e-5, -2e-5), (-1e-7, -1.0)])
    def test_orpo_of_answers_that_are_all_but_certain(self, c, r):
        data = [datum(group=1, chosen=i, weights=torch.ones(1)) for i in (1, 0)]

        def evaluated(dtype):
            logprobs = [torch.tensor([x], dtype=dtype) for x in (c, r)]
            return orpo.value_and_gradient(data, TensorBatch.from_tensors(logprobs))

        single, double = evaluated(torch.float32), evaluated(torch.float64)
        assert float(single.loss) == pytest.approx(float(double.loss), rel=1e-4, abs=1e-8)
        torch.testing.assert_close(single.gradient.double(), double.gradient, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("support", ["tail", "renormalize"])
    def test_jsd_of_what_is_all_but_impossible(self, support):
        model, teacher = [-110.0, -120.0, -0.5], [-111.0, -105.0, -0.6]

        def evaluated(dtype):
            data = [datum(teacher_logprobs=torch.tensor([teacher], dtype=dtype), weights=[1.0])]
            batch = TensorBatch.from_tensors([torch.tensor([model], dtype=dtype)])
            return distill.value_and_gradient(data, batch, direction="jsd", support=support)

        single, double = evaluated(torch.float32), evaluated(torch.float64)
        assert float(single.loss) == pytest.approx(float(double.loss), rel=1e-4, abs=1e-7)
        torch.testing.assert_close(single.gradient.double(), double.gradient, rtol=1e-4, atol=1e-6)


def test_a_teacher_of_logits_is_refused():
    """Their 'probabilities' add up to more than 1, and the rest would be below zero."""
    logits = torch.tensor([[3.0, 1.0, 0.0], [2.0, -1.0, 0.5]])
    model = [torch.log_softmax(logits, -1) - 0.1]
    with pytest.raises(ValueError, match=r"teacher.* add up to .*logits"):
        distill([datum(teacher_logprobs=logits)], model)
    distill([datum(teacher_logprobs=logits)], model, support="renormalize")
    masked = datum(teacher_logprobs=logits, weights=torch.zeros(2))
    assert float(distill([masked], model)[0]) == 0


def test_a_margin_that_is_just_kept_pulls_no_more_by_autograd_either():
    leaf = torch.tensor([[-0.5, -1.5]], requires_grad=True)
    margin([datum(weights=[1.0])], [leaf])[0].backward()
    assert leaf.grad.tolist() == [[0.0, 0.0]]


class TestAFunctionOfOnesOwn:
    def test_that_gives_no_tensor(self):
        @term(scope="token")
        def half(logprob):
            return 0.5

        with pytest.raises(TypeError, match="it returned a float; expected a tensor"):
            half([datum()], PAIR[:1])

    def test_that_sums_by_itself(self):
        @term(scope="token")
        def summed(logprob):
            return logprob.sum()

        with pytest.raises(ValueError, match=r'of shape \[\]; a term of scope "token" must give'):
            summed([datum()], PAIR[:1])

    def test_with_metrics_that_are_no_mapping_or_no_tensor(self):
        @term(scope="token")
        def listed(logprob):
            return logprob, [logprob]

        with pytest.raises(TypeError, match=r"its metrics are a list; expected a mapping"):
            listed([datum()], PAIR[:1])

        @term(scope="token")
        def tripled(logprob):
            return logprob, {}, {}

        with pytest.raises(TypeError, match="it returned 3 things; expected values, or values and"):
            tripled([datum()], PAIR[:1])

    def test_whose_input_is_misspelt_hears_what_there_is(self):
        @term(scope="token", inputs=("advantage",))
        def of(logprob, advantage):
            return -logprob * advantage

        with pytest.raises(ValueError, match=r'has no "advantage".*it has: advantages, weights'):
            of([datum(advantages=1.0)], PAIR[:1])

    def test_that_asks_for_what_its_scope_has_not(self):
        with pytest.raises(TypeError, match=r'sequences.*scope "sequence"'):

            @term(scope="token")
            def far(logprob, *, sequences):
                return logprob

    def test_that_must_be_given_what_its_scope_has(self):
        with pytest.raises(TypeError, match="takes no keyword argument sequences"):

            @term(scope="sequence")
            def near(logprob):
                return logprob

    def test_whose_parameter_has_the_name_of_one_that_all_terms_have(self):
        with pytest.raises(TypeError, match=r"reduction.*has a meaning for all terms"):

            @term(scope="token")
            def mine(logprob, *, reduction="token_sum"):
                return logprob

    def test_whose_inputs_are_one_string(self):
        with pytest.raises(TypeError, match="inputs is the string"):

            @term(scope="token", inputs="mu")
            def mine(logprob, a, b):
                return logprob

    def test_whose_types_are_there_for_a_type_checker_only(self):
        def typed(logprob: NotImported, *, kind: Literal["a", "b"] = "a"):  # noqa: F821
            return -logprob

        made = term(scope="token")(typed)
        with pytest.raises(ValueError, match="unknown kind 'c' of the term typed; expected one o"):
            made([datum()], PAIR[:1], kind="c")

    def test_that_takes_whatever_it_is_given(self):
        with pytest.raises(TypeError, match=r"takes \*\*params; name its arguments one by one"):

            @term(scope="token")
            def loose(logprob, **params):
                return logprob


@pytest.mark.parametrize("name", ["entropy", "kl", "distill", "dft", "gspo"])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.0, 1.0], [0.5, 1.0]])
def test_torch_func_differentiates_a_term(name, weights):
    params = {"kl": {"estimator": "k3"}, "distill": {"direction": "reverse"}}.get(name, {})
    keys = ("logprobs", "reference_logprobs", "teacher_logprobs", "advantages")
    data = [datum(weights=torch.tensor(weights), **dict.fromkeys(keys, PAIR[1]))]
    made = CATALOGUE[name]
    gradient = torch.func.grad(lambda x: made(data, [x], **params)[0])(PAIR[0])
    closed = made.value_and_gradient(data, TensorBatch.from_tensors(PAIR[:1]), **params).gradient
    torch.testing.assert_close(gradient, closed)


@pytest.mark.parametrize("names", [(), ("rewards",), ("logprobs", "advantages")])
def test_data_of_the_port_without_weights_need_no_datum(names):
    """Building them takes longer than most terms, and the first time it imports the SDK."""
    source = f"""
import sys

import torch

from tinker_custom_loss import Composer
from tinker_custom_loss.port.data import Column, WireData
from tinker_custom_loss.port.shapes import pack_shapes, read_shapes

shapes = read_shapes(pack_shapes([(2,), (1,)]), "shapes")
column = Column(torch.tensor([0.0, -1.0, -1.0]), shapes)
data = WireData(2, dict.fromkeys({names}, column))
composition = Composer("nll").compute(data, [torch.tensor([-5.0, -2.0]), torch.tensor([-1.0])])
print(composition.loss_total, "tinker" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3.0" if "advantages" in names else "8.0", "False"]
