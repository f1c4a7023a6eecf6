"""A recorded run is there whatever happens to the process that writes it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

from tinker_custom_loss import RequestError
from tinker_custom_loss.insight import Recorder, kept_steps, read_run, read_step
from tinker_custom_loss.insight.report import report_page


def test_a_step_is_a_line_and_the_configuration_stands_beside_it(tmp_path):
    with Recorder(tmp_path / "run", config={"model": "tiny"}) as recorder:
        recorder.log({"loss_total": 2.5, "regularizers/l2/value": 1}, 0)
        recorder.log({"loss_total": 2.0}, 1)

    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 0, "loss_total": 2.5, "regularizers/l2/value": 1.0}
    run = read_run(tmp_path / "run")
    assert run.steps == {
        0: {"loss_total": 2.5, "regularizers/l2/value": 1.0},
        1: {"loss_total": 2.0},
    }
    assert run.config == {"model": "tiny"}
    assert run.torn == 0
    assert repr(run) == f"Run({str(tmp_path / 'run')!r}, 2 steps)"


def test_each_line_is_on_disk_before_log_returns_and_nan_survives(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.log({"loss_total": float("nan")}, 0)
    assert str(read_run(tmp_path).steps[0]["loss_total"]) == "nan"
    recorder.close()


def test_a_torn_last_line_is_survived_and_does_not_run_into_the_next(tmp_path):
    with Recorder(tmp_path) as recorder:
        recorder.log({"loss_total": 3.0}, 0)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 1, "loss_to')
    assert read_run(tmp_path).steps == {0: {"loss_total": 3.0}}

    with Recorder(tmp_path, resume=True) as recorder:
        recorder.log({"loss_total": 1.0}, 1)
    run = read_run(tmp_path)
    assert run.steps == {0: {"loss_total": 3.0}, 1: {"loss_total": 1.0}}
    assert run.torn == 1


def test_a_used_directory_is_refused_at_opening_and_left_as_it_is(tmp_path):
    with Recorder(tmp_path, config={"seed": 1}) as recorder:
        recorder.log({"loss_total": 5.0}, 7)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(
        RequestError, match=r"holds a run already \(1 lines .*overwrite=True.*resume"
    ):
        Recorder(tmp_path, config={"seed": 2})
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert read_run(tmp_path).config == {"seed": 1}
    with pytest.raises(RequestError, match="give one of overwrite, resume and shared"):
        Recorder(tmp_path, overwrite=True, resume=True)


def test_a_run_resumed_from_a_checkpoint_drops_what_came_after_it(tmp_path, caplog):
    with Recorder(tmp_path, resume=True) as recorder:  # there is nothing to go on with yet
        for step in range(6):
            recorder.log({"loss_total": 5.0, "regularizers/kl/value": 1.0}, step)
    with Recorder(tmp_path, resume=True) as recorder:
        for step in (3, 4):
            recorder.log({"loss_total": 4.0}, step)
    first = {"loss_total": 5.0, "regularizers/kl/value": 1.0}
    again = {"loss_total": 4.0}
    assert read_run(tmp_path).steps == {0: first, 1: first, 2: first, 3: again, 4: again}
    assert "goes on at step 3: what it had of that step and later ones, 3 lines" in caplog.text


def test_processes_that_share_a_run_drop_nothing_of_one_another(tmp_path):
    with Recorder(tmp_path, shared=True) as one, Recorder(tmp_path, shared=True) as other:
        one.log({"loss_total": 2.0}, 1)
        other.log({"loss_total": 1.0}, 0)
        one.log({"loss_total": 3.0}, 2)
    assert [m["loss_total"] for m in read_run(tmp_path).steps.values()] == [1.0, 2.0, 3.0]


def test_a_step_that_was_computed_twice_is_the_later_one_and_no_mixture(tmp_path):
    lines = [
        {"step": 0, "loss_total": 2.0, "regularizers/kl/value": 1.0},
        {"step": 0, "eval/accuracy": 0.5},  # others write one step in several lines
        {"step": 1, "loss_total": 2.0, "regularizers/kl/value": 1.0},
        {"step": 1, "loss_total": 3.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_run(tmp_path).steps == {
        0: {"loss_total": 2.0, "regularizers/kl/value": 1.0, "eval/accuracy": 0.5},
        1: {"loss_total": 3.0},
    }


def test_lines_that_are_no_steps_are_counted_and_the_others_read(tmp_path):
    bad = [
        '{"step": 1, "loss',
        "[1]",
        '{"step": 1.5}',
        '{"step": true}',
        "\0\0",
        "{}",
        '{"step": 1e999}',
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "\n".join(['{"step": 0, "a": 1}', *bad, '{"step": 2.0, "a": 2}', ""])
    )
    run = read_run(tmp_path)
    assert run.steps == {0: {"a": 1.0}, 2: {"a": 2.0}}
    assert run.torn == len(bad)


@pytest.mark.parametrize(("text", "said"), [('{"a": ', "is not JSON"), ("[1]", "no JSON object")])
def test_a_configuration_that_cannot_be_read_is_a_sentence(tmp_path, text, said):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss_total": 1}\n')
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RequestError, match=said):
        read_run(tmp_path)


def test_a_run_can_be_begun_anew(tmp_path):
    for step in (3, 0):
        with Recorder(tmp_path, overwrite=True) as recorder:
            recorder.log({"loss_total": 1.0}, step)
    assert list(read_run(tmp_path).steps) == [0]


RECORDS_UNTIL_KILLED = textwrap.dedent(
    """
    import itertools, os, signal, sys
    import torch
    from tinker_custom_loss import Composer, Recorder, flatten

    torch.set_num_threads(1)

    def record(directory):
        recorder = Recorder(directory, config={"a": 1}, keep="all", keep_bytes=300_000)
        for step in itertools.count():
            # The weight, so that config.json is written anew at every step.
            composer = Composer("nll", [{"fn": "l2", "weight": 0.1 + step}], recorder=recorder)
            made = composer.compute([None], [torch.full((900,), -1.0)], step=step)
            recorder.log(flatten(made.record), step)

    for index in range(12):
        directory = os.path.join(sys.argv[1], str(index))
        child = os.fork()
        if child == 0:
            record(directory)
        metrics = os.path.join(directory, "metrics.jsonl")
        while not os.path.exists(metrics) or os.path.getsize(metrics) < 1 + 4_000 * index:
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    """
)


def test_a_process_killed_at_any_moment_leaves_a_readable_run(tmp_path):
    """While it writes metrics, config and kept steps: twelve processes, each a little later."""
    subprocess.run([sys.executable, "-c", RECORDS_UNTIL_KILLED, str(tmp_path)], check=True)
    for index in range(12):
        run = read_run(tmp_path / str(index))
        assert list(run.steps) == list(range(len(run.steps)))
        assert run.steps
        assert run.torn <= 1
        assert len({len(metrics) for metrics in run.steps.values()}) == 1
        assert run.config["a"] == 1
        assert run.composition is not None
        kept = [read_step(file).step for file in kept_steps(run.directory)]
        assert kept == list(range(kept[0], kept[-1] + 1))
        assert kept[-1] in (len(run.steps) - 1, len(run.steps))  # it is kept before it is logged
        report_page([run])


def test_sinks_see_every_step_after_it_is_recorded(tmp_path):
    seen = []

    class Sink:
        def log(self, metrics, step):
            seen.append((step, dict(metrics), len(read_run(tmp_path).steps)))

    sink = Sink()
    with Recorder(tmp_path, sinks=[sink]) as recorder:
        recorder.log({"a": 1.0}, 0)
        recorder.detach(sink)
        recorder.log({"a": 2.0}, 1)
    assert seen == [(0, {"a": 1.0}, 1)]


@pytest.mark.parametrize(
    ("metrics", "step", "message"),
    [
        ({"loss_total": {"a": 1}}, 0, r'the metric "loss_total" is .* flatten\(\) first'),
        ({"step": 3.0}, 0, 'a metric is named "step"'),
        ({}, 1.5, "step must be an int"),
    ],
)
def test_what_is_no_flat_record_is_refused_and_nothing_is_written(tmp_path, metrics, step, message):
    with Recorder(tmp_path) as recorder:
        with pytest.raises(RequestError, match=message):
            recorder.log(metrics, step)
        assert read_run(tmp_path).steps == {}


def test_a_closed_recorder_says_so(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.close()
    with pytest.raises(RequestError, match="is closed"):
        recorder.log({}, 0)


def test_a_configuration_that_is_not_json_is_refused_at_once(tmp_path):
    with pytest.raises(RequestError, match="config is not made of JSON values"):
        Recorder(tmp_path / "run", config={"fn": object()})
    assert not (tmp_path / "run").exists()


def test_a_directory_without_a_run_is_named(tmp_path):
    with pytest.raises(RequestError, match=r"holds no run: it has no metrics\.jsonl"):
        read_run(tmp_path)
