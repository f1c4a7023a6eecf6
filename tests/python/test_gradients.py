"""Norms, cosines and sums that hold at every size and scale."""

from __future__ import annotations

import math

import pytest
import torch

from tinker_custom_loss import Composer, Regularizer, RequestError, TensorBatch
from tinker_custom_loss.tensors.gradients import cosine, norm, surrogate, weighted_sum


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 3_000_000])
def test_a_norm_is_that_of_double_precision(size):
    values = torch.rand(size) + 0.5
    assert norm(values) == pytest.approx(float(values.double().norm()), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 3e38])
def test_a_norm_neither_overflows_nor_underflows(scale):
    values = torch.tensor([1.0, -0.5, 0.25]) * scale
    # An absolute tolerance, as approx has of itself, would take 0 for 1e-20.
    assert norm(values) == pytest.approx(float(values.double().norm()), rel=1e-6, abs=0)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_a_norm_in_double_precision_does_neither(scale):
    values = torch.tensor([3.0, -4.0], dtype=torch.float64) * scale
    assert norm(values) == pytest.approx(5 * scale, rel=1e-12, abs=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 70_000])
def test_a_norm_is_finite_only_if_every_entry_is(bad, position):
    values = torch.zeros(100_000)
    values[position] = bad
    assert not math.isfinite(norm(values))


def test_cosine():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    assert cosine(a, b, norm(a), norm(b)) == pytest.approx(math.sqrt(0.5))
    assert cosine(a, -a, 1.0, 1.0) == -1.0
    assert cosine(a, torch.zeros(2), 1.0, 0.0) == 0.0
    huge = torch.full((2,), 3e38)
    assert cosine(huge, huge, norm(huge), norm(huge)) == pytest.approx(1.0)
    assert cosine(huge, -huge, norm(huge), norm(huge)) == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (1e-24, torch.float32),
        (3e-38, torch.float32),
        (1e-200, torch.float64),
        (1e200, torch.float64),
    ],
)
@pytest.mark.parametrize("size", [2, 70_000])
def test_a_cosine_is_that_of_the_directions_at_every_scale(scale, dtype, size):
    a = torch.tensor([1.0, 0.0], dtype=dtype).repeat(size // 2) * scale
    b = torch.tensor([1.0, 1.0], dtype=dtype).repeat(size // 2) * scale
    across = torch.tensor([0.0, 1.0], dtype=dtype).repeat(size // 2) * scale
    assert cosine(a, a, norm(a), norm(a)) == pytest.approx(1.0)
    assert cosine(a, -b, norm(a), norm(b)) == pytest.approx(-math.sqrt(0.5))
    assert cosine(a, across, norm(a), norm(across)) == 0.0
    one = torch.ones_like(a)
    assert cosine(a, one, norm(a), norm(one)) == pytest.approx(math.sqrt(0.5), rel=1e-4)


def test_rounding_takes_no_cosine_beyond_1():
    generator = torch.Generator().manual_seed(0)
    for a in torch.rand(1000, 7, generator=generator):
        assert -1.0 <= cosine(a, -a, norm(a), norm(a)) <= cosine(a, a, norm(a), norm(a)) <= 1.0


def test_a_weighted_sum_leaves_its_terms_alone():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    assert weighted_sum([(2.0, a), (-1.0, b)], a).tolist() == [-8, -16]
    assert (a.tolist(), b.tolist()) == ([1, 2], [10, 20])
    assert weighted_sum([], a).tolist() == [0, 0]
    assert weighted_sum([(3.0, a)], a).tolist() == [3, 6]
    assert weighted_sum([(1.0, a)], a) is not a


def test_a_surrogate_hands_each_leaf_its_gradient_to_keep():
    leaves = [torch.zeros(2, requires_grad=True), torch.zeros(1, 2, requires_grad=True)]
    gradients = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 4.0]])]
    value = 0.1 + 0.2  # not a float32
    loss = surrogate(value, gradients, leaves)
    loss.backward()
    assert loss.item() == value
    leaves[0].grad.zero_()
    assert gradients[0].tolist() == [1, 2]
    assert leaves[1].grad.tolist() == [[3, 4]]


class TestTensorBatch:
    def test_views_share_its_memory(self):
        batch = TensorBatch(torch.arange(7.0), ((3,), (2, 2)))
        first, second = batch.tensors()
        assert second.tolist() == [[3, 4], [5, 6]]
        batch.flat[3] = 9
        assert second[0, 0] == 9
        assert first.data_ptr() == batch.flat.data_ptr()

    def test_shapes_must_fill_the_buffer(self):
        with pytest.raises(RequestError, match="2 tensors hold 7 values, but the buffer has"):
            TensorBatch(torch.zeros(6), ((3,), (2, 2)))

    def test_there_is_nothing_behind_its_end(self):
        with pytest.raises(IndexError):
            TensorBatch(torch.zeros(3), ((3,),)).locate(3)

    @pytest.mark.parametrize(
        ("position", "where"), [(0, (0, (0,))), (2, (0, (2,))), (3, (2, (0, 0))), (6, (2, (1, 1)))]
    )
    def test_positions_are_located(self, position, where):
        assert TensorBatch(torch.zeros(7), ((3,), (0,), (2, 2))).locate(position) == where

    def test_repr_shows_shapes(self):
        batch = TensorBatch.from_tensors([torch.zeros(2) for _ in range(5)])
        assert repr(batch) == "TensorBatch(float32, [[2], [2], [2], … 5 in all])"
        batch = TensorBatch.from_tensors([torch.zeros(1, 2) for _ in range(3)])
        assert repr(batch) == "TensorBatch(float32, [[1, 2], [1, 2], [1, 2]])"


class TestWhatIsComputedOn:
    """Logprobs of any floating type, as tensors or as a batch, in a buffer of one type."""

    @staticmethod
    def seen(logprobs):
        types = []

        def square(data, logprobs):
            types.extend(x.dtype for x in logprobs)
            return sum(x.square().sum() for x in logprobs), {}

        data = [None] * len(logprobs)
        composition = Composer(None, [Regularizer(square, 1.0, "square")]).compute(data, logprobs)
        return set(types), composition

    @pytest.mark.parametrize(
        ("given", "computed"),
        [
            (["float32", "float32"], "float32"),
            (["float16", "bfloat16"], "float32"),
            (["float32", "float64"], "float64"),
            (["float64", "bfloat16"], "float64"),
        ],
    )
    def test_the_widest_type_decides(self, given, computed):
        types, _ = self.seen([torch.zeros(2, dtype=getattr(torch, name)) for name in given])
        assert types == {getattr(torch, computed)}

    @pytest.mark.parametrize(
        ("given", "computed"),
        [("float16", "float32"), ("float32", "float32"), ("float64", "float64")],
    )
    def test_a_batch_is_widened_too_and_its_gradient_comes_home(self, given, computed):
        given, computed = getattr(torch, given), getattr(torch, computed)
        types, composition = self.seen(TensorBatch(torch.ones(3, dtype=given), ((1,), (2,))))
        assert types == {computed}
        assert composition.gradient.flat.dtype == given
        assert composition.gradient.flat.tolist() == [2, 2, 2]

    def test_a_batch_that_was_made_in_inference_mode_is_computed(self):
        with torch.inference_mode():
            batch = TensorBatch(torch.ones(3), ((1,), (2,)))
        assert self.seen(batch)[1].gradient.flat.tolist() == [2, 2, 2]

    def test_a_batch_of_integers_is_refused(self):
        with pytest.raises(RequestError, match="has dtype int64; expected a floating point type"):
            self.seen(TensorBatch(torch.ones(3, dtype=torch.int64), ((1,), (2,))))
