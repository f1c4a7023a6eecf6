"""Every finding is provoked through real steps; steps in which nothing is odd have none."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import tinker
import torch

from tinker_custom_loss import Composer, Recorder, flatten, with_regularizers
from tinker_custom_loss.insight import diagnose, read_run
from tinker_custom_loss.insight.series import History
from tinker_custom_loss.sandbox import SandboxServer

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"

DATA = [None, None]


def base(data, logprobs):
    return -torch.cat(logprobs).sum(), {}


def square(data, logprobs):
    return torch.cat(logprobs).square().sum(), {}


def run(regularizer, steps=24, *, frozen=False, scale=lambda step: 1.0 - step / 100):
    composer = Composer(base, [{"weight": 0.5, "name": "term"} | regularizer])
    logprobs = [torch.tensor([-0.5, -1.5, -0.2]), torch.tensor([-0.7, -2.0])]
    return [
        composer.compute(
            DATA, [x * scale(step) for x in logprobs], step=0 if frozen else step
        ).record
        for step in range(steps)
    ]


def kinds(records):
    return {(finding.kind, finding.term) for finding in diagnose(records)}


def test_steps_in_which_nothing_is_odd_have_no_findings():
    assert diagnose(run({"fn": square, "weight": 0.2})) == []


def test_a_term_that_trains_nothing():
    def flat(data, logprobs):
        return (torch.cat(logprobs) * 0.0).sum() + 3.0, {}

    (finding,) = diagnose(run({"fn": flat}, steps=6))
    assert (finding.kind, finding.term) == ("zero_gradient", "term")
    assert "exactly 0 in the last 6 steps" in finding.message
    assert str(finding) == f"{finding.message}; {finding.advice}"


def test_a_term_that_is_often_skipped(caplog):
    calls = []

    def fails_at_times(data, logprobs):
        calls.append(1)
        if len(calls) % 3 == 0:
            raise ValueError("no")
        return square(data, logprobs)

    records = run({"fn": fails_at_times, "weight": 0.2, "on_error": "skip"}, steps=9)
    (finding,) = diagnose(records)
    assert finding.kind == "skipped"
    assert '"term" was skipped in 3 of 9 steps' in finding.message


def test_values_that_were_not_finite_and_were_zeroed():
    def infinite_at_first(data, logprobs):
        bad = torch.zeros(5)
        bad[0] = torch.inf
        return (torch.cat(logprobs) * bad).sum() + square(data, logprobs)[0], {}

    records = run({"fn": infinite_at_first, "on_non_finite": "zero"}, steps=4)
    (finding,) = [f for f in diagnose(records) if f.kind == "non_finite"]
    assert "in 4 of 4 steps" in finding.message


def test_a_term_that_is_nearly_all_of_the_gradient():
    assert ("dominant", "term") in kinds(run({"fn": square, "weight": 1000.0}))


def test_a_term_that_has_nothing_to_share_the_gradient_with_is_not_said_to_dominate():
    alone = Composer(None, [{"fn": square, "weight": 2.0, "name": "term"}])
    logprobs = [torch.tensor([-0.5, -1.5])]
    records = [alone.compute([None], logprobs, step=step).record for step in range(8)]
    assert diagnose(records) == []


def test_nor_is_one_beside_a_base_loss_that_the_server_computes():
    records = run({"fn": square}, steps=8)
    for record in records:  # as those of a client whose base loss is one of the server's
        record["base_loss"] |= {"grad_norm": None, "grad_rms": None, "cosine_to_total": None}
    assert diagnose(records) == []


def test_terms_that_come_and_go_are_compared_within_the_same_steps():
    """A term that has a part in every second step has the larger norm in each of those."""
    logprobs = [torch.tensor([-0.5, -1.5])]
    records = []
    for step in range(24):
        small = 0.001 if step % 2 else 1.0
        terms = [{"fn": square, "weight": 100.0 * small, "name": "always"}]
        if step % 2:
            terms.append({"fn": square, "weight": 50.0, "name": "late"})
        composer = Composer(lambda data, xs: (-torch.cat(xs).sum() * 1e-6, {}), terms)
        records.append(composer.compute([None], logprobs, step=step).record)
    history = History()
    for step, record in enumerate(records):
        history.add(flatten(record), step)
    assert [bool(row) for row in history.terms["late"].rows] == [bool(s % 2) for s in range(24)]
    assert kinds(records) == {("dominant", "late")}  # of the 12 steps in which it had a part


def test_a_term_that_is_there_no_more_is_not_said_to_train_nothing():
    def flat(data, logprobs):
        return (torch.cat(logprobs) * 0.0).sum() + 3.0, {}

    records = run({"fn": flat}, steps=6)
    logprobs = [torch.tensor([-0.5, -1.5])]
    later = [Composer(base).compute([None], logprobs, step=6 + n).record for n in range(6)]
    assert diagnose(records + later) == []


def test_a_healthy_run_of_the_demo_has_no_findings(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import demo

    text = (EXAMPLES.parents[1] / "LICENSE").read_bytes()
    rng = random.Random(0)
    with SandboxServer(seed=0) as server, Recorder(tmp_path) as recorder:
        service = tinker.ServiceClient(base_url=server.url, api_key="tml-sandbox")
        client = with_regularizers(
            service.create_lora_training_client("sandbox").result(),
            base_loss=demo.base_loss,
            regularizers=demo.REGULARIZERS,
            recorder=recorder,
        )
        for step in range(30):
            output = client.forward_backward_custom(demo.batch_of(text, rng))
            client.optim_step(tinker.AdamParams(learning_rate=0.01)).result()
            recorder.log(flatten(output.result().record), step)
    run = read_run(tmp_path)
    assert run.steps[29]["loss_total"] < run.steps[0]["loss_total"]
    assert diagnose(run.steps.values(), composition=run.composition) == []


def test_a_term_that_keeps_pulling_against_the_step():
    def against(data, logprobs):
        return torch.cat(logprobs).sum(), {}

    records = run({"fn": against, "weight": 0.4}, scale=lambda step: 1.0)
    assert kinds(records) == {("conflict", "term")}


def test_a_schedule_that_stands_still():
    records = run({"fn": square, "weight": lambda step: 0.1 + step / 1000}, frozen=True)
    (finding,) = diagnose(records)
    assert (finding.kind, finding.term) == ("stuck_schedule", None)
    assert "24 steps were all computed as step 0" in finding.message


def test_a_schedule_that_stands_still_is_named_where_the_composition_is_known():
    composer = Composer(base, [{"fn": square, "weight": lambda step: 0.1 + step, "name": "term"}])
    records = run({"fn": square, "weight": lambda step: 0.1 + step}, frozen=True)
    (finding,) = diagnose(records, composition=composer.describe())
    assert (finding.kind, finding.term) == ("stuck_schedule", "term")
    assert 'the weight of "term" stands still' in finding.message


def test_a_schedule_that_is_still_at_its_start_is_named():
    def in_epochs(step):  # it is given steps
        return 0.1 + step // 1000

    composer = Composer(base, [{"fn": square, "weight": in_epochs, "name": "term"}])
    records = run({"fn": square, "weight": in_epochs})
    (finding,) = diagnose(records, composition=composer.describe())
    assert (finding.kind, finding.term) == ("stuck_schedule", "term")
    assert 'the schedule of "term" is still at its start: it gave 0.1 in each' in finding.message
    moves = run({"fn": square, "weight": lambda step: 0.1 + step / 1000})
    assert diagnose(moves, composition=composer.describe()) == []
    constant = Composer(base, [{"fn": square, "weight": 0.1, "name": "term"}])
    assert diagnose(run({"fn": square, "weight": 0.1}), composition=constant.describe()) == []


def test_prompt_tokens_that_a_term_counted_though_the_datums_have_a_mask():
    prompt = [0.0, 0.0, 1.0, 1.0, 1.0]
    data = [SimpleNamespace(loss_fn_inputs={"weights": torch.tensor(prompt)})] * 2

    def records(weights):
        terms = [{"fn": "l2", "weight": 0.01, "params": {"weights": weights}}]
        composer = Composer("nll", terms)
        return [
            composer.compute(data, [torch.full((5,), -1.0 / n)] * 2).record for n in range(1, 7)
        ]

    (finding,) = diagnose(records(None))
    assert (finding.kind, finding.term) == ("prompt_counted", "l2")
    assert (
        'counted every logprob in 6 of 6 steps, 10 in the last, of which "base_loss" left out 4'
        in (finding.message)
    )
    assert diagnose(records("auto")) == []


def test_a_value_that_only_grows():
    records = run({"fn": square, "weight": 0.1}, scale=lambda step: 1.0 + step / 10)
    assert ("growing", "term") in kinds(records)


@pytest.mark.parametrize("steps", [0, 1])
def test_too_few_steps_say_nothing(steps):
    assert diagnose(run({"fn": square, "weight": 0.2}, steps=steps)) == []
