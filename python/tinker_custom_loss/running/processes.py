"""Processes for terms that need one of their own.

Every worker process serves one term at a time over its own pipe. So one that is killed, by a
deadline or by the kernel, costs the term it was running and nothing else; a
``concurrent.futures.ProcessPoolExecutor`` would fail every other term with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import multiprocessing.process
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

import torch

from ..errors import TermError, TermTimeoutError
from .evaluation import RemoteCall, RemoteReply, evaluate_remote
from .lifetimes import close_all
from .shipping import ShippedCall, UnknownFunctionError
from .threads import THREADS

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

__all__ = ["ProcessRun", "warm"]

_START_UP_SECONDS = 120.0  # importing torch from a cold disk, with room
_LOOK_EVERY_SECONDS = 1.0

_alive: set[_Worker] = set()
_idle: list[_Worker] = []
_lock = threading.Lock()


def _forget_after_fork() -> None:
    """The processes are the parent's: two of us on one pipe would read each other's replies."""
    global _lock
    # Or multiprocessing would terminate them when the child exits, in mid-term of the parent.
    children: set[object] = multiprocessing.process._children  # type: ignore[attr-defined]
    children.difference_update(worker.process for worker in _alive)
    _alive.clear()
    _idle.clear()
    _lock = threading.Lock()  # another thread may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)


def _die_with_parent(expected_parent: int) -> None:
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


def end_idle(seconds: float = 1.0) -> None:
    """End the processes that run no term, once they have closed what terms have open there."""
    with _lock:
        workers = list(_idle)
        _idle.clear()
    for worker in workers:
        worker.hang_up()
    expires = time.monotonic() + seconds
    for worker in workers:
        worker.process.join(max(0.0, expires - time.monotonic()))
        worker.end()


def end_all() -> None:
    """End every process: the interpreter ends."""
    end_idle(0.5)
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
        worker = self._take_worker()
        try:
            worker.await_ready(name)
            reply = worker.ask(self._call, self._timeout)
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
        # Ctrl-C reaches every process of the terminal, and theirs while it still starts.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self._ready = False
        self._functions: set[str] = set()  # that were sent to it
        with _lock:
            _alive.add(self)

    def await_ready(self, name: str) -> None:
        if not self._ready:
            self._receive(_START_UP_SECONDS, name, "did not start")
            self._ready = True

    def ask(self, call: RemoteCall, timeout: float | None) -> RemoteReply:
        """Have a term evaluated. Its function is sent the first time only."""
        shipped, name = call.call, call.call.name
        if isinstance(shipped, ShippedCall) and shipped.digest in self._functions:
            reply = self._exchange(replace(call, call=shipped.without_function()), timeout, name)
            if reply is not None:
                return reply
        reply = self._exchange(call, timeout, name)
        assert reply is not None
        if isinstance(shipped, ShippedCall):
            self._functions.add(shipped.digest)
        return reply

    def _exchange(self, call: RemoteCall, timeout: float | None, name: str) -> RemoteReply | None:
        try:
            work = pickle.dumps(call, protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise TermError.from_exception(name, error) from error
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # seen again in receive
            self._pipe.send_bytes(work)
        reply: RemoteReply | None
        reply = pickle.loads(self._receive(timeout, name, "ran out of time"))
        if reply is not None and reply.failure is not None and reply.failure["term"] is None:
            message = f'the term "{name}" was not run: {reply.failure["message"]}'
            kind, trace = reply.failure["error_type"], reply.failure["traceback"]
            raise TermError(message, term=name, error_type=kind, traceback=trace)
        return reply

    def hang_up(self) -> None:
        """Let it end by itself."""
        self._pipe.close()

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
    _die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    torch.set_num_threads(1)
    pipe.send_bytes(b"ready")
    while True:
        try:
            work = pipe.recv_bytes()
        except (EOFError, OSError):
            close_all(1.0)
            return
        pipe.send_bytes(pickle.dumps(_answer(work), protocol=pickle.HIGHEST_PROTOCOL))


def _answer(work: bytes) -> RemoteReply | None:
    """None: the function has to be sent again."""
    try:
        call: RemoteCall = pickle.loads(work)
    except Exception as error:
        failure = {
            "message": f"its process cannot load the data: {error}; their types must be "
            "importable there",
            "term": None,  # which one it is, only the parent knows
            "error_type": type(error).__qualname__,
            "traceback": "".join(traceback.format_exception(error)),
        }
        return RemoteReply(None, None, failure)
    try:
        return evaluate_remote(call)
    except UnknownFunctionError:
        return None
