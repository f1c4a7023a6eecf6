"""Norms, cosines and sums that hold at every size and scale."""

from __future__ import annotations

import math

import pytest
import torch

from tinker_custom_loss import RequestError, TensorBatch
from tinker_custom_loss.tensors.gradients import cosine, norm, surrogate, weighted_sum


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 3_000_000])
def test_a_norm_is_that_of_double_precision(size):
    values = torch.rand(size) + 0.5
    assert norm(values) == pytest.approx(float(values.double().norm()), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 3e38])
def test_a_norm_neither_overflows_nor_underflows(scale):
    values = torch.tensor([1.0, -0.5, 0.25]) * scale
    assert norm(values) == pytest.approx(float(values.double().norm()), rel=1e-6)


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


def test_a_weighted_sum_leaves_its_terms_alone():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    assert weighted_sum([(2.0, a), (-1.0, b)], a).tolist() == [-8, -16]
    assert (a.tolist(), b.tolist()) == ([1, 2], [10, 20])
    assert weighted_sum([], a).tolist() == [0, 0]


def test_a_carrier_hands_each_leaf_its_gradient_to_keep():
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

    @pytest.mark.parametrize(
        ("position", "where"), [(0, (0, (0,))), (2, (0, (2,))), (3, (2, (0, 0))), (6, (2, (1, 1)))]
    )
    def test_positions_are_located(self, position, where):
        assert TensorBatch(torch.zeros(7), ((3,), (0,), (2, 2))).locate(position) == where

    def test_repr_shows_shapes(self):
        batch = TensorBatch.from_tensors([torch.zeros(2) for _ in range(5)])
        assert repr(batch) == "TensorBatch(float32, [[2], [2], [2], … 5 in all])"
