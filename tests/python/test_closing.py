"""Terms that are objects: set up before they are called, closed with their composer or at exit."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from tinker_custom_loss import Composer, Regularizer, RequestError

DATA = [None]


class Session:
    """An async term with something open that belongs to one loop."""

    def __init__(self):
        self.log = []

    async def setup(self):
        self.log.append(("setup", asyncio.get_running_loop()))

    async def __call__(self, data, logprobs):
        self.log.append(("call", asyncio.get_running_loop()))
        return logprobs[0].sum(), {}

    async def aclose(self):
        self.log.append(("aclose", asyncio.get_running_loop()))


class File:
    """A sync term that writes down what happens to it, in whichever process and thread."""

    def __init__(self, path):
        self.path = path

    def note(self, what):
        with open(self.path, "a") as file:
            file.write(f"{what} {os.getpid()}\n")

    def setup(self):
        self.note("setup")

    def __call__(self, data, logprobs):
        self.note("call")
        return logprobs[0].sum(), {}

    def close(self):
        self.note("close")


@pytest.fixture
def logprobs():
    return [torch.linspace(-3, -1, 5)]


def test_an_async_one_lives_on_the_loop_that_runs_it(logprobs):
    term = Session()
    with Composer(None, [Regularizer(term, 1.0, "t")]) as composer:
        for _ in range(2):
            composer.compute(DATA, logprobs)
    whats, loops = zip(*term.log, strict=True)
    assert whats == ("setup", "call", "call", "aclose")
    assert len(set(loops)) == 1


def test_on_the_callers_loop_it_lives_there(logprobs):
    term = Session()

    async def main():
        async with Composer(None, [Regularizer(term, 1.0, "t")]) as composer:
            await composer.compute_async(DATA, logprobs)
            with pytest.raises(RequestError, match="await aclose"):
                composer.close()
        return asyncio.get_running_loop()

    loop = asyncio.run(main())
    assert term.log == [("setup", loop), ("call", loop), ("aclose", loop)]


def test_after_the_end_of_its_loop_it_is_set_up_on_the_next(logprobs):
    term = Session()
    composer = Composer(term)
    for _ in range(2):
        asyncio.run(composer.compute_async(DATA, logprobs))
    (_, first), (_, second) = term.log[0], term.log[2]
    assert term.log == [("setup", first), ("call", first), ("setup", second), ("call", second)]
    assert first is not second


@pytest.mark.parametrize("place", [False, True, "process"])
def test_a_sync_one_lives_where_it_runs(logprobs, tmp_path, place):
    path = tmp_path / "log"
    term = Regularizer(File(str(path)), 1.0, "t", run_in_executor=place)
    with Composer(None, [term]) as composer:
        composer.compute(DATA, logprobs)
    lines = path.read_text().splitlines()
    pids = {int(line.split()[1]) for line in lines}
    assert [line.split()[0] for line in lines] == ["setup", "call", "close"]
    assert (pids == {os.getpid()}) == (place != "process")


def test_used_again_it_is_set_up_again(logprobs):
    term = Session()
    composer = Composer(None, [Regularizer(term, 1.0, "t")])
    for _ in range(2):
        composer.compute(DATA, logprobs)
        composer.close()
    assert [what for what, _ in term.log] == 2 * ["setup", "call", "aclose"]


def test_steps_at_the_same_time_set_it_up_once(logprobs):
    term = Session()
    composer = Composer(None, [Regularizer(term, 1.0, "t")])

    async def main():
        await asyncio.gather(*(composer.compute_async(DATA, logprobs) for _ in range(4)))

    asyncio.run(main())
    assert [what for what, _ in term.log] == ["setup"] + 4 * ["call"]


def test_a_setup_that_fails_is_the_terms_failure_and_tried_again(logprobs):
    ready = threading.Event()

    class Fails(Session):
        async def setup(self):
            if not ready.is_set():
                ready.set()
                raise OSError("no route to the judge")

    term = Regularizer(Fails(), 1.0, "t", on_error="skip")
    composer = Composer(lambda data, logprobs: (logprobs[0].sum(), {}), [term])
    records = [composer.compute(DATA, logprobs).record["regularizers"]["t"] for _ in range(2)]
    assert "no route to the judge" in records[0]["error"]
    assert records[1]["error"] is None


def test_what_nobody_closed_is_closed_at_exit(tmp_path):
    program = """
import sys, torch
from test_closing import File, Session
from tinker_custom_loss import Composer

class Prints(Session):
    async def aclose(self):
        print("aclose", flush=True)

terms = [
    {"fn": Prints(), "weight": 1.0, "name": "session"},
    {"fn": File(sys.argv[1]), "weight": 1.0, "name": "file"},
]
Composer(None, terms).compute([0], [torch.ones(2)])
"""
    path = tmp_path / "log"
    here = Path(__file__)
    done = subprocess.run(
        [sys.executable, "-c", program, path],
        env={**os.environ, "PYTHONPATH": f"{here.parents[2] / 'python'}:{here.parent}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "aclose\n", done.stderr
    assert path.read_text().splitlines()[-1].startswith("close")
