"""A program that ends, in the way that is asked for, while a term of every kind is running.

    python exits.py normal|exception|SIGINT|SIGTERM DIRECTORY

Each term leaves a file in DIRECTORY when it runs; the process of one has its number in it.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from pathlib import Path

import torch

from tinker_custom_loss import Composer

KINDS = ("async", "child", "to_thread", "thread", "process", "inline")


def runs_for_ever(data, logprobs, *, directory, kind):
    says_that_it_runs(directory, kind)
    while True:
        time.sleep(3600)


def computes_for_ever(data, logprobs, *, directory, kind):
    """In torch, whose threads end with the process or not at all."""
    says_that_it_runs(directory, kind)
    while True:
        torch.ones(200, 200) @ torch.ones(200, 200)


async def waits_for_ever(data, logprobs, *, directory, kind):
    says_that_it_runs(directory, kind)
    await asyncio.sleep(3600)


async def waits_for_a_child(data, logprobs, *, directory, kind):
    await asyncio.gather(waits_for_ever(data, logprobs, directory=directory, kind=kind))


async def waits_for_a_thread(data, logprobs, *, directory, kind):
    await asyncio.to_thread(runs_for_ever, data, logprobs, directory=directory, kind=kind)


def says_that_it_runs(directory, kind):
    (Path(directory) / kind).write_text(str(os.getpid()))


def compute(directory):
    terms = {
        "async": (waits_for_ever, False),
        "child": (waits_for_a_child, False),
        "to_thread": (waits_for_a_thread, False),
        "thread": (computes_for_ever, True),
        "process": (runs_for_ever, "process"),
        "inline": (runs_for_ever, False),
    }
    regularizers = [
        {
            "fn": fn,
            "weight": 1.0,
            "name": kind,
            "params": {"directory": directory, "kind": kind},
            "run_in_executor": place,
        }
        for kind, (fn, place) in terms.items()
    ]
    Composer(None, regularizers).compute([None], [torch.zeros(3)])


def main(how, directory):
    if how.startswith("SIG"):
        compute(directory)  # until the signal comes
    threading.Thread(target=compute, args=[directory], daemon=True).start()
    while not all((Path(directory) / kind).exists() for kind in KINDS):
        time.sleep(0.01)
    if how == "exception":
        raise ValueError("the loop went wrong")


if __name__ == "__main__":
    main(*sys.argv[1:])
