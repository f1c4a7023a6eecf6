"""What is logged arrives in the loggers that people have, under its own keys and steps."""

from __future__ import annotations

import math

import pytest

from tinker_custom_loss import Recorder
from tinker_custom_loss.insight import adapters, read_run

METRICS = {"loss_total": 2.5, "regularizers/kl/value": math.nan, "schedule_step": 3.0}


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = adapters.TensorBoard(tmp_path / "board")
    with Recorder(tmp_path / "run", sinks=[sink]) as recorder:
        for step in (4, 7):
            recorder.log(METRICS, step)
    sink.writer.close()
    read = EventAccumulator(str(tmp_path / "board"))
    read.Reload()
    assert set(read.Tags()["scalars"]) == set(METRICS)
    assert [(e.step, e.value) for e in read.Scalars("loss_total")] == [(4, 2.5), (7, 2.5)]
    assert math.isnan(read.Scalars("regularizers/kl/value")[0].value)


def test_wandb(tmp_path):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: make test-loggers")
    run = wandb.init(mode="offline", dir=tmp_path, project="test")
    sink = adapters.WandB(run)
    sink.log(METRICS, 4)
    sink.log(METRICS, 7)
    assert run.step == 7
    summary = dict(run.summary)  # of what is complete: the step before
    run.finish()
    assert summary["_step"] == 4
    assert set(METRICS) <= set(summary)
    assert summary["loss_total"] == 2.5


def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio", reason="trackio is not installed: make test-loggers")
    from trackio.sqlite_storage import SQLiteStorage

    run = trackio.init(project="test", name="first")
    sink = adapters.Trackio(run)
    sink.log(METRICS, 4)
    sink.log(METRICS, 7)
    trackio.finish()
    logs = SQLiteStorage.get_logs("test", "first")
    assert [(log["step"], log["loss_total"]) for log in logs] == [(4, 2.5), (7, 2.5)]
    assert math.isnan(logs[0]["regularizers/kl/value"])


def test_the_logger_of_the_cookbook(tmp_path):
    ml_log = pytest.importorskip(
        "tinker_cookbook.utils.ml_log", reason="tinker-cookbook is not installed"
    )
    adapters.CookbookLogger(ml_log.JsonLogger(tmp_path)).log({"loss_total": 2.5}, 4)
    assert read_run(tmp_path).steps == {4: {"loss_total": 2.5}}
