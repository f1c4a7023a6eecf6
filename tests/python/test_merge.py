"""The record of a step from those of its parts. Elixir reads the same vectors."""

from __future__ import annotations

import pytest
import torch

from splits import MEANS, made_up
from test_vectors import each, read, value_of
from tinker_custom_loss import Composer, RequestError, merge


@each(read("merge.json"))
def test_the_records_of_a_vector_merge_to_its_record(vector):
    records, merged = value_of(vector["records"]), value_of(vector["merged"])
    if merged is None:
        with pytest.raises(RequestError):
            merge(records)
    else:
        assert_same(merge(records), merged)


def assert_same(got, want, key=""):
    """Floats to ten digits, and everything else exactly."""
    assert type(got) is type(want), key
    if isinstance(want, dict):
        assert got.keys() == want.keys(), key
        for inner in want:
            assert_same(got[inner], want[inner], f"{key}/{inner}")
    elif isinstance(want, float):
        assert got == pytest.approx(want, rel=1e-10, abs=0.0, nan_ok=True), key
    else:
        assert got == want, key


class TestMerge:
    data, logprobs = made_up([(2, 3), (3, 1)], alternatives=False)

    def records(self, composer, step=None):
        totals = composer.totals(self.data)
        return [
            composer.compute(self.data[a:b], self.logprobs[a:b], totals=totals, step=step).record
            for a, b in [(0, 2), (2, 5)]
        ]

    def test_of_losses_alone_has_no_gradient_figures(self):
        composer = Composer("nll", MEANS[1:])
        record = composer.compute_loss(self.data, self.logprobs).record
        merged = merge([record, record])
        assert merged["total_grad_norm"] is None
        assert merged["base_loss"]["cosine_to_total"] is None
        assert merged["loss_total"] == 2 * record["loss_total"]

    def test_a_term_skipped_in_a_part_has_no_value_but_what_it_contributed(self):
        logprobs = [x.clone() for x in self.logprobs]
        logprobs[0][:] = torch.nan
        self.data[0].loss_fn_inputs["weights"][:] = 1.0
        skipped = {**MEANS[2], "on_non_finite": "skip"}
        composer = Composer(
            None, [{"fn": "nll", "weight": 1.0, "params": {"weights": "w"}}, skipped]
        )
        for datum, count in zip(self.data, [0.0, 1.0, 1.0, 1.0, 1.0], strict=True):
            datum.loss_fn_inputs["w"] = torch.full_like(datum.loss_fn_inputs["weights"], count)
        totals = composer.totals(self.data)
        first, second = (
            composer.compute(self.data[a:b], logprobs[a:b], totals=totals).record
            for a, b in [(0, 2), (2, 5)]
        )
        term = merge([first, second])["regularizers"]["l2"]
        assert term["value"] is None
        assert term["skipped"] is True
        assert "nan" in term["error"]
        assert term["contribution"] == second["regularizers"]["l2"]["contribution"] != 0

    def test_other_terms_or_weights_are_refused(self):
        one = self.records(Composer(None, MEANS))
        other = self.records(Composer(None, MEANS[:2]))
        with pytest.raises(RequestError, match="record 1 is not of the same step as record 0"):
            merge([one[0], other[0]])
        composer = Composer(None, [{"fn": "nll", "weight": lambda step: 1.0 + step}])
        with pytest.raises(RequestError, match="the same step="):
            merge([self.records(composer, step)[step] for step in (0, 1)])
        with pytest.raises(RequestError, match="with one at least"):
            merge([])

    def test_steps_that_differ_are_not_known(self):
        composer = Composer(None, MEANS)
        parts = [self.records(composer, step)[step] for step in (0, 1)]
        assert merge(parts)["schedule_step"] is None
        assert merge(self.records(composer, 4))["schedule_step"] == 4
