"""What is seen while a run goes on: plain lines where there is no terminal, else a table."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
import textwrap

import pytest
import torch

from tinker_custom_loss import Composer, RequestError, flatten
from tinker_custom_loss.insight import Recorder, live, watch


def base(data, logprobs):
    return -torch.cat(logprobs).sum(), {}


def square(data, logprobs):
    return torch.cat(logprobs).square().sum(), {}


def records(steps, names=("l2",)):
    terms = [{"fn": square, "weight": 0.1, "name": name} for name in names]
    composer = Composer(base, terms)
    for step in range(steps):
        yield composer.compute([None], [torch.tensor([-2.0, -1.0]) / (1 + step)], step=step).record


def test_without_a_terminal_there_are_plain_lines_and_the_table_at_the_end():
    out = io.StringIO()
    seen = list(watch(records(24), total=24, file=out))
    assert [record["loss_total"] for record in seen] == [
        record["loss_total"] for record in records(24)
    ]
    lines = out.getvalue().splitlines()
    assert lines[0] == "    0  loss 3.5 = base_loss 3 + l2 0.5"
    assert len([line for line in lines if "loss" in line and "=" in line]) == 12
    assert [line.split()[0] for line in lines[-3:]] == ["term", "base_loss", "l2"]
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize(
    ("columns", "scale", "shown"),
    [(80, 1, ["share", "trend"]), (80, 1e-105, ["share"]), (60, 1, ["trend"])],
)
def test_what_has_no_room_is_left_out_so_that_no_number_is_cut_short(
    columns, scale, shown, monkeypatch
):
    """Bars and trends, which the report has, too."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich, a terminal
    monkeypatch.setenv("COLUMNS", str(columns))
    term = {"value": 1.234, "weight": 0.1234, "contribution": 0.1234, "grad_norm_weighted": 0.4321}
    metrics = {f"regularizers/{'n' * 16}/{key}": -scale * x for key, x in term.items()}
    metrics |= {"loss_total": 1.0, f"regularizers/{'n' * 16}/cosine_to_total": -0.5}
    out = io.StringIO()
    with live(file=out) as table:
        table.log(metrics, 0)
    heads, row = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).splitlines()[-2:]
    assert len(row) <= columns
    assert "…" not in heads + row
    assert [word for word in heads.split() if word in ("share", "trend")] == shown
    assert float(row.split()[1]) == pytest.approx(-1.234 * scale, rel=0.01)


@pytest.mark.parametrize("count", [1, 4, 12])
def test_no_line_is_longer_than_80_columns_and_what_is_left_out_is_counted(count):
    names = [f"a_regularizer_with_a_long_name_{index}" for index in range(count)]
    out = io.StringIO()
    list(watch(records(3, names), total=3, file=out))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    if count == 12:
        shown = lines[0].count("a_regularizer")
        assert f"+ {count - shown} more" in lines[0]


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    ("encoding", "heads", "name"),
    [
        ("ascii", "w*value w*|g|", "gr??e_?"),
        ("latin-1", "w*value w*|g|", "größe_?"),
        ("cp437", "w*value w*|g|", "größe_π"),
        ("utf-8", "w·value w·|∇|", "größe_π"),
    ],
)
def test_an_output_that_cannot_show_the_bars_gets_others_of_the_same_width(
    tmp_path, encoding, heads, name, terminal, monkeypatch
):
    """A character that a log file lacks ended the training."""
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")  # to rich

    def shown(encoding):
        file = tmp_path / encoding
        with file.open("w", encoding=encoding) as out:
            list(watch(records(24, ["größe_π"]), file=out))
        return file.read_text(encoding=encoding)

    text = shown(encoding)
    assert all(word in text for word in [*heads.split(), name])
    assert ("█" in text) == (encoding == "utf-8") == ("#" not in text)
    assert [*map(len, text.splitlines())] == [*map(len, shown("utf-8").splitlines())]


def test_a_recorder_feeds_it_for_the_extent_of_the_block(tmp_path):
    out = io.StringIO()
    first, second = (flatten(record) for record in records(2))
    with Recorder(tmp_path) as recorder:
        with live(recorder, file=out):
            recorder.log(first, 0)
        shown = out.getvalue()
        recorder.log(second, 1)
    assert "base_loss" in shown
    assert out.getvalue() == shown


def test_a_schedule_that_stands_still_is_named_by_the_table_too(tmp_path):
    terms = [{"fn": square, "weight": lambda step: 0.1 + step, "name": "ramped"}]
    out = io.StringIO()
    with Recorder(tmp_path) as recorder, live(recorder, file=out):
        for step in range(20):
            composer = Composer(base, terms, recorder=recorder)
            made = composer.compute([None], [torch.tensor([-2.0, -1.0]) / (1 + step)], step=0)
            recorder.log(flatten(made.record), step)
    assert 'so the weight of "ramped" stands still' in said(out)

    out = io.StringIO()
    records = [composer.compute([None], [torch.tensor([-2.0])], step=0).record for _ in range(20)]
    list(watch(records, composition=composer.describe(), file=out))
    assert 'so the weight of "ramped" stands still' in said(out)


def said(out):
    return " ".join(out.getvalue().split())


def test_a_term_that_is_there_no_more_shows_no_number_of_an_earlier_step():
    out = io.StringIO()
    with_both, with_one = next(records(1, ["first", "second"])), next(records(1, ["first"]))
    list(watch([with_both, with_one], total=2, file=out))
    lines = out.getvalue().splitlines()
    assert "second" not in lines[1]
    (row,) = [line for line in lines if line.startswith("second")]
    assert row.split()[1:4] == ["-", "-", "-"]


def test_keys_may_have_a_prefix():
    out = io.StringIO()
    with live(prefix="custom", file=out) as table:
        table.log(flatten(next(records(1)), prefix="custom"), 0)
    assert "loss 3.5 = base_loss 3" in out.getvalue()


def test_a_total_below_one_is_refused():
    with pytest.raises(RequestError, match="total must be a positive number"):
        live(total=0)


PROGRAM = textwrap.dedent(
    """
    import torch
    from tinker_custom_loss import Composer
    from tinker_custom_loss.insight import watch

    def base(data, logprobs):
        return -torch.cat(logprobs).sum(), {}

    def against(data, logprobs):
        return torch.cat(logprobs).sum(), {}

    terms = [{"fn": against, "weight": 0.4, "name": "a_term_with_a_long_name"}]
    composer = Composer(base, terms)
    steps = (composer.compute([None], [torch.tensor([-2.0, -1.0])], step=s) for s in range(9))
    for _ in watch((step.record for step in steps), total=9):
        pass
    """
)


@pytest.mark.parametrize("columns", [80, 120])
def test_on_a_terminal_every_row_is_whole(columns):
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=slave,
        stdout=slave,
        env=os.environ | {"COLUMNS": str(columns), "LINES": "30", "TERM": "xterm-256color"},
    )
    os.close(slave)
    shown = b""
    while True:
        select.select([master], [], [], 60)
        try:
            piece = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(master)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    screen = text[text.rindex("9/9 steps") :].splitlines()
    assert max(len(line) for line in screen) <= columns
    rows = [line for line in screen if line.startswith(("base_loss", "a_term"))]
    assert len(rows) == 2
    for row in rows:
        assert re.search(r"[+-]\d\.\d\d [▁▂▃▄▅▆▇█]+", row), row
    assert '! "a_term_with_a_long_name" pulled against the step' in " ".join(screen)
