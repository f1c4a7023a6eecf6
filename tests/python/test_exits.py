"""However a program ends, terms that are still running neither hold it back nor outlive it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exits import KINDS

ROOT = Path(__file__).parents[2]
START_UP_SECONDS = 120
SECONDS = 2.0


def until(condition, seconds):
    """Whether the condition became true in time."""
    expires = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > expires:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture(scope="module")
def patience():
    """The seconds in which a program has to end: so many more than one takes that runs no term.

    On a busy machine, to end a process that has loaded torch alone takes seconds.
    """
    program = [sys.executable, "-c", "import torch; print('ends', flush=True)"]
    with subprocess.Popen(program, stdout=subprocess.PIPE) as idle:
        idle.stdout.readline()
        ends = time.monotonic()
        idle.wait()
        return SECONDS + time.monotonic() - ends


def group_is_gone(number):
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("normal", 0, ""),
        ("exception", 1, "ValueError: the loop went wrong"),
        ("SIGINT", -signal.SIGINT, "KeyboardInterrupt"),
        ("SIGTERM", -signal.SIGTERM, ""),
    ],
)
def test_an_exit_while_terms_run(how, code, said, tmp_path, patience):
    running = tmp_path / "running"
    running.mkdir()
    program = subprocess.Popen(
        [sys.executable, "-W", "error", ROOT / "tests/python/exits.py", how, running],
        env={**os.environ, "PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # which its children are in, too
    )
    try:
        assert until(
            lambda: program.poll() is not None or len(list(running.iterdir())) == len(KINDS),
            START_UP_SECONDS,
        )
        if how.startswith("SIG"):
            program.send_signal(getattr(signal, how))
        ended = until(lambda: program.poll() is not None, patience)
        assert ended, f"it goes on for more than {patience} s"
        assert until(lambda: group_is_gone(program.pid), SECONDS), "it leaves processes behind"
        stderr = program.communicate()[1]
        assert (program.returncode, said in stderr) == (code, True), stderr
        if not said:
            assert stderr == ""
    finally:
        if not group_is_gone(program.pid):
            os.killpg(program.pid, signal.SIGKILL)
        program.wait()
        program.stderr.close()


LATE = """
import sys, torch
from tinker_custom_loss import Composer, Regularizer

def computes_for_ever(data, logprobs):
    x = torch.rand(10_000)
    while True:
        try:
            x.sort()
        except BaseException:
            pass

terms = [
    Regularizer(
        computes_for_ever, 1.0, "late", run_in_executor=True, timeout=0.05, on_error="skip"
    )
]
Composer(lambda data, logprobs: (logprobs[0].sum(), {}), terms).compute([0], [torch.ones(3)])
sys.exit(3)
"""


def test_a_thread_that_nothing_ends_leaves_the_exit_its_status():
    """It comes back from torch when there is no interpreter any more."""
    done = subprocess.run(
        [sys.executable, "-c", LATE],
        env={**os.environ, "PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=START_UP_SECONDS,
    )
    assert done.returncode == 3, done.stderr
    assert '"late" runs on in its thread' in done.stderr
