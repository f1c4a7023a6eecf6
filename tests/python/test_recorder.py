"""A recorded run is there whatever happens to the process that writes it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from tinker_custom_loss import RequestError
from tinker_custom_loss.insight import Recorder, read_run


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

    with Recorder(tmp_path) as recorder:
        recorder.log({"loss_total": 1.0}, 1)
    run = read_run(tmp_path)
    assert run.steps == {0: {"loss_total": 3.0}, 1: {"loss_total": 1.0}}
    assert run.torn == 1


def test_a_step_that_is_logged_again_after_a_restart_replaces_the_earlier_one(tmp_path):
    for loss in (5.0, 4.0):
        with Recorder(tmp_path) as recorder:
            recorder.log({"loss_total": loss}, 7)
    assert read_run(tmp_path).steps == {7: {"loss_total": 4.0}}


def test_a_run_can_be_begun_anew(tmp_path):
    for step in (3, 0):
        with Recorder(tmp_path, overwrite=True) as recorder:
            recorder.log({"loss_total": 1.0}, step)
    assert list(read_run(tmp_path).steps) == [0]


def test_a_process_killed_while_it_records_leaves_a_readable_run(tmp_path):
    program = (
        "import sys, itertools\n"
        "from tinker_custom_loss.insight import Recorder\n"
        "recorder = Recorder(sys.argv[1], config={'a': 1})\n"
        "for step in itertools.count():\n"
        "    recorder.log({f'key{i}': i * 0.1 for i in range(200)}, step)\n"
        "    if step == 50: print('going', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "going\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()

    run = read_run(tmp_path)
    assert list(run.steps) == list(range(len(run.steps)))
    assert len(run.steps) > 50
    assert run.torn <= 1
    assert all(len(metrics) == 200 for metrics in run.steps.values())
    assert run.config == {"a": 1}


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
