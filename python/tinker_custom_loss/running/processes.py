"""Processes for terms that need one of their own.

Every worker process serves one term at a time over its own pipe. So one that is killed, by a
deadline or by the kernel, costs the term it was running and nothing else; a
``concurrent.futures.ProcessPoolExecutor`` would fail every other term with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

import torch

from ..errors import TermError, TermTimeoutError
from .evaluation import RemoteCall, RemoteReply, evaluate_remote
from .threads import THREADS

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

__all__ = ["ProcessRun", "die_with_parent", "warm"]

_START_UP_SECONDS = 120.0  # importing torch from a cold disk, with room
_LOOK_EVERY_SECONDS = 1.0

_alive: set[_Worker] = set()
_idle: list[_Worker] = []
_lock = threading.Lock()


def _forget_after_fork() -> None:
    """The processes are the parent's: two of us on one pipe would read each other's replies."""
    global _lock
    _alive.clear()
    _idle.clear()
    _lock = threading.Lock()  # another thread may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)


def die_with_parent(expected_parent: int) -> None:
    """Have the kernel kill this process when its parent ends (Linux); exit if it already has."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != expected_parent:
        os._exit(1)


def warm(count: int) -> None:
    """Start processes until there are ``count``: importing torch takes one about two seconds."""
    with _lock:
        missing = count - len(_alive)
    _idle.extend(_spawn() for _ in range(missing))


def _spawn() -> _Worker:
    """A new process, started by a thread that never ends.

    Linux counts the *thread* that started a process as its parent: with ``PR_SET_PDEATHSIG`` a
    process dies when that thread does.
    """
    worker: _Worker = THREADS.submit(_Worker).result()
    return worker


def end_all() -> None:
    """End every process: the interpreter ends."""
    with _lock:
        workers = list(_alive)
    for worker in workers:
        worker.process.kill()


class ProcessRun:
    """One term in a process: :meth:`run` blocks for the evaluation, :meth:`kill` ends it early."""

    def __init__(self, remote_call: RemoteCall, timeout: float | None) -> None:
        self._name = remote_call.call.name
        self._call = remote_call
        self._timeout = timeout
        self._worker: _Worker | None = None
        self._killed = False
        self._guard = threading.Lock()

    def run(self) -> RemoteReply:
        """Send the term to a process and wait.

        Raises:
            TermTimeoutError: it outlived its timeout, and its process was ended.
            TermError: its process died, or its work cannot be pickled.
        """
        name = self._name
        try:
            work = pickle.dumps(self._call, protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise TermError.from_exception(name, error) from error
        worker = self._take_worker()
        try:
            worker.await_ready(name)
            reply = worker.ask(work, self._timeout, name)
        except BaseException:
            with self._guard:
                self._worker = None
            worker.end()
            raise
        with self._guard:
            self._worker = None  # from here on it may be running somebody else's term
        if self._killed:
            worker.end()
        else:
            with _lock:
                _idle.append(worker)
        if reply.failure is not None and reply.failure["term"] is None:
            raise TermError(
                f'the process of the term "{name}" cannot load it: {reply.failure["message"]}; '
                "its function must be at the top level of a module that can be imported there",
                term=name,
                error_type=reply.failure["error_type"],
                traceback=reply.failure["traceback"],
            )
        return reply

    def kill(self) -> None:
        """End the process of this run, if it has one."""
        with self._guard:
            self._killed = True
            if self._worker is not None:
                self._worker.process.kill()  # run() sees it, and tidies up

    def _take_worker(self) -> _Worker:
        worker = None
        with _lock:
            while _idle and worker is None:
                candidate = _idle.pop()
                if candidate.process.is_alive():
                    worker = candidate
                else:
                    _alive.discard(candidate)
        worker = worker or _spawn()
        with self._guard:
            self._worker = worker
            if self._killed:
                worker.process.kill()
        return worker


class _Worker:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(
            target=_serve, args=(theirs, os.getpid()), name="tinker-custom-loss-term", daemon=True
        )
        self.process.start()
        theirs.close()
        self._ready = False
        with _lock:
            _alive.add(self)

    def await_ready(self, name: str) -> None:
        if not self._ready:
            self._receive(_START_UP_SECONDS, name, "did not start")
            self._ready = True

    def ask(self, work: bytes, timeout: float | None, name: str) -> RemoteReply:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # seen again in receive
            self._pipe.send_bytes(work)
        reply: RemoteReply = pickle.loads(self._receive(timeout, name, "ran out of time"))
        return reply

    def end(self) -> None:
        """Kill it and close what belongs to it. No other thread may be using it."""
        with _lock:
            _alive.discard(self)
        self.process.kill()
        self.process.join()
        self._pipe.close()

    def _receive(self, timeout: float | None, name: str, late: str) -> bytes:
        expires = float("inf") if timeout is None else time.monotonic() + timeout
        while not wait([self._pipe, self.process.sentinel], self._patience(expires)):
            if time.monotonic() >= expires:
                raise TermTimeoutError(
                    f'the term "{name}" {late} in its process: {timeout:g} s have passed; '
                    "the process was ended",
                    term=name,
                )
            # What the term itself forked may hold both descriptors open after its process is gone.
            if not self.process.is_alive() and not self._pipe.poll():
                raise TermError(self._obituary(name), term=name)
        try:
            return self._pipe.recv_bytes()
        except (EOFError, OSError):
            self.process.join()
            raise TermError(self._obituary(name), term=name) from None

    @staticmethod
    def _patience(expires: float) -> float:
        return max(0.0, min(_LOOK_EVERY_SECONDS, expires - time.monotonic()))

    def _obituary(self, name: str) -> str:
        code = self.process.exitcode or 0
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        advice = ""
        if not self._ready:
            advice = (
                "; it never started: if this is a script, its top level must be guarded by "
                '`if __name__ == "__main__":`'
            )
        elif code == -signal.SIGKILL:
            advice = "; the kernel's out-of-memory killer is the usual sender"
        return f'the process of the term "{name}" ended with {how} in mid-term{advice}'


def _serve(pipe: Connection, parent: int) -> None:
    """The worker process: one call at a time until the parent closes the pipe."""
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(1)
    pipe.send_bytes(b"ready")
    while True:
        try:
            work = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        pipe.send_bytes(pickle.dumps(_answer(work), protocol=pickle.HIGHEST_PROTOCOL))


def _answer(work: bytes) -> RemoteReply:
    try:
        remote_call: RemoteCall = pickle.loads(work)
    except Exception as error:  # whose term it is, only the parent knows
        return RemoteReply(
            None,
            {
                "message": str(error),
                "term": None,
                "error_type": type(error).__qualname__,
                "traceback": "".join(traceback.format_exception(error)),
            },
        )
    return evaluate_remote(remote_call)
