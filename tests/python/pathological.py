"""Terms that do what terms should not, each named after what it does."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import itertools
import logging
import os
import subprocess
import sys
import threading
import time
import warnings

from tinker_custom_loss import term

_calls = itertools.count()


def harmless(data, logprobs, *, scale: float = 1.0):
    """The sum of the logprobs, scaled."""
    return scale * sum(t.sum() for t in logprobs), {"datums": len(data)}


def raises(data, logprobs):
    raise LookupError("the moon is missing")


def exits(data, logprobs):
    sys.exit(3)


def interrupts(data, logprobs):
    raise KeyboardInterrupt


async def interrupts_while_awaited(data, logprobs):
    raise KeyboardInterrupt


def cancels(data, logprobs):
    raise asyncio.CancelledError


class Catastrophe(BaseException):
    """Derives from nothing that anybody catches."""


def raises_base_exception(data, logprobs):
    raise Catastrophe("quite unusual")


def prints(data, logprobs):
    print("printed by Python")
    os.write(1, b"written to descriptor 1\n")
    libc = ctypes.CDLL(None)
    libc.puts(b"put by C")
    libc.fflush(None)
    subprocess.run(["echo", "echoed by a subprocess"], check=True)
    return harmless(data, logprobs)


def floods(data, logprobs):
    for number in range(100_000):
        os.write(1, b"flood %d\n" % number)
    return harmless(data, logprobs)


def logs(data, logprobs):
    logging.getLogger("my.term").warning("watch %s", "out")
    warnings.warn(f"this is deprecated, call {next(_calls)}", stacklevel=1)
    try:
        raise ValueError("inner")
    except ValueError:
        logging.getLogger("my.term").exception("it failed")
    return harmless(data, logprobs)


def floods_log(data, logprobs):
    for number in range(20_000):
        logging.getLogger("flood").info("record %d", number)
    return harmless(data, logprobs)


class LogsWhenShown:
    def __str__(self):
        logging.getLogger("inner").info("shown: %s", self)
        return "shown"


def logs_recursively(data, logprobs):
    logging.getLogger("outer").info("%s", LogsWhenShown())
    return harmless(data, logprobs)


def reads_stdin(data, logprobs):
    return harmless(data, logprobs)[0], {"read": len(sys.stdin.read())}


def loops(data, logprobs):
    logging.getLogger("loops").info("looping")
    while True:
        pass


@term(scope="token")
def loops_over_tokens(logprob):
    return loops(None, logprob)


@term(scope="token")
def loops_in_its_derivative(logprob):
    return logprob


@loops_in_its_derivative.derivative
def _(logprob):
    return loops(None, logprob)


def swallows_everything(data, logprobs):
    logging.getLogger("loops").info("looping")
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(0.01)


def sleeps(data, logprobs):
    logging.getLogger("sleeps").info("sleeping")
    time.sleep(3600)


def holds_the_interpreter(data, logprobs):
    logging.getLogger("holds").info("about to hold")
    time.sleep(0.2)  # the record must get out first
    ctypes.PyDLL(None).sleep(3600)


def crashes(data, logprobs):
    ctypes.string_at(0)


async def waits_for_ever(data, logprobs):
    logging.getLogger("waits").info("waiting")
    await asyncio.sleep(3600)


async def waits(data, logprobs, *, seconds: float):
    await asyncio.sleep(seconds)
    return harmless(data, logprobs)


def starts_a_child(data, logprobs):
    child = subprocess.Popen(["sleep", "3600"])
    return harmless(data, logprobs)[0], {"pid": child.pid}


def shows_its_descriptors(data, logprobs):
    os.system("ls -l /proc/self/fd 1>&2")  # unlike subprocess, it closes nothing by itself
    return harmless(data, logprobs)


def counts_what_is_never_collected(data, logprobs):
    """The objects that no collection looks at; and whether there are collections."""
    counted = {"kept": gc.get_freeze_count(), "collects": gc.isenabled()}
    return sum(t.sum() for t in logprobs), counted


def remembers(data, logprobs, *, seen: list):
    seen.append("me")
    return harmless(data, logprobs)[0], {"seen": len(seen)}


def looks_at_data(data, logprobs):
    tokens = [d.model_input.to_ints() for d in data]
    weights = [d.loss_fn_inputs["weights"].to_torch() for d in data]
    loss = sum((w * t).sum() for w, t in zip(weights, logprobs, strict=True))
    return loss, {"tokens": sum(map(len, tokens)), "first": tokens[0][0]}


def nan_gradient(data, logprobs):
    last = logprobs[-1]
    return sum(t.sum() for t in logprobs[:-1]) + (last - last.detach()).sqrt().sum(), {}


def no_number(data, logprobs):
    return "low", {}


def no_scalar(data, logprobs):
    return logprobs[0] * 1, {}


def bad_metrics(data, logprobs):
    return harmless(data, logprobs)[0], {"text": "no number"}


def slow(data, logprobs, *, seconds: float):
    time.sleep(seconds)
    return harmless(data, logprobs)


def _private(data, logprobs):
    return harmless(data, logprobs)


def takes_one_argument(data):
    return data


def daemonizes_and_crashes(data, logprobs):
    """Leaves a process in a session of its own behind, as daemons are made."""
    ready, steady = os.pipe()
    if os.fork() == 0:
        os.setsid()
        os.write(steady, b"!")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    os._exit(3)


def returns_twice(data, logprobs):
    """``fork``, and back into whoever called, in both processes."""
    pid = os.fork()
    status = 0 if pid == 0 else os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return harmless(data, logprobs)[0], {"status": status}


def raises_twice(data, logprobs):
    pid = os.fork()
    if pid == 0:
        raise LookupError("in the child")
    os.waitpid(pid, 0)
    raise LookupError("in the parent")


async def returns_twice_async(data, logprobs):
    return returns_twice(data, logprobs)


def writes_to_descriptor_4(data, logprobs):
    """As a library does that once opened a file and believes that it still has it."""
    os.write(4, b"\x00\x00\x00\x04junk")
    return harmless(data, logprobs)


class CannotBeShown(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def raises_what_cannot_be_shown(data, logprobs):
    raise CannotBeShown


async def raises_what_cannot_be_shown_async(data, logprobs):
    raise CannotBeShown


def breaks_the_package(data, logprobs):
    """From now on every request of this process fails by a bug of the package.

    The thread that answers this one goes on only after two others have answered.
    """
    from tinker_custom_loss.port import frames, service

    write = frames.FrameWriter.write
    others = threading.Semaphore(0)

    def write_this_one(*args):
        frames.FrameWriter.write = write_another
        write(*args)
        for _ in range(2):
            others.acquire(timeout=10)

    def write_another(*args):
        write(*args)
        others.release()

    def broken(*_):
        raise RuntimeError("broken by a test")

    frames.FrameWriter.write = write_this_one
    service.Service.compute = broken
    return harmless(data, logprobs)
