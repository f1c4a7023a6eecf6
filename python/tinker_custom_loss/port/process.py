"""The operating system's side of a worker: its descriptors, its group, its end."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import resource
import signal
import stat
import sys
from pathlib import Path
from typing import NoReturn

from .frames import widen_pipe

__all__ = [
    "attached",
    "end",
    "end_if_forked",
    "may_write_any_size",
    "point_at_nothing",
    "resident_bytes",
    "settle",
]

_FROM_HOST, _TO_HOST = 3, 4  # as an Erlang port gives them
_OUT_OF_THE_WAY = 100

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_KEPT_FREE_BYTES = 256 << 20
_LARGEST_MMAP_THRESHOLD = 32 << 20


def attached() -> bool:
    """Whether a host holds the other ends of descriptors 3 and 4."""
    try:
        kinds = [os.fstat(fd).st_mode for fd in (_FROM_HOST, _TO_HOST)]
    except OSError:
        return False
    return all(stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind) for kind in kinds)


def settle() -> tuple[int, int]:
    """Make this process a worker: from here on it ends with its host, whatever it is doing.

    Returns the descriptors from which to read and to which to write. Call it on the main thread,
    before any code of a user runs.
    """
    from_host, to_host = _take_stream()
    _give_terms_their_descriptors()
    # A group of its own, so that the processes a term starts can be ended together with it.
    with contextlib.suppress(PermissionError):  # the host made it a leader already
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a shell is the host's to handle
    signal.signal(signal.SIGTERM, lambda *_: end(0))
    _start_guardian(from_host)
    _keep_freed_memory()
    return from_host, to_host


def end(status: int) -> NoReturn:
    """End now: no handler, no join, no flush. With status 0, take along what the terms started,
    rather than leave it to the guardian; nobody is there to read a status then."""
    if status == 0 and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(status)


def end_if_forked(worker: int) -> None:
    """End the calling process if it is not ``worker`` but a copy of it, which must not answer."""
    if os.getpid() != worker:
        message = (
            "a term forked a process, which came back from the term as if it were the worker: it "
            "is ended; end a process that you fork with os._exit\n"
        )
        os.write(2, message.encode())
        os._exit(70)  # EX_SOFTWARE


def _take_stream() -> tuple[int, int]:
    """Move the stream to where no term hits it by mistake, and keep it from whatever forks.

    A process that a term forks and that outlives the worker would otherwise hold the pipes open,
    and hide from the host that the worker is gone.
    """
    stream = [
        fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _OUT_OF_THE_WAY) for fd in (_FROM_HOST, _TO_HOST)
    ]
    point_at_nothing(_FROM_HOST, _TO_HOST)
    os.register_at_fork(after_in_child=lambda: point_at_nothing(*stream))
    for fd in stream:
        widen_pipe(fd)
    return stream[0], stream[1]


def point_at_nothing(*descriptors: int) -> None:
    """Rather than close them: a closed one would soon be another file's."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in descriptors:
        os.dup2(null, fd, inheritable=False)
    os.close(null)


def may_write_any_size() -> bool:
    """Whether no limit on the size of a file (``ulimit -f``) is on this process, and so, as it
    inherits that, on its host: one that writes beyond it is killed by the kernel."""
    return resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def _start_guardian(from_host: int) -> None:
    """Have a process of this group end the group, when this one cannot or had no time to."""
    if os.getpgrp() != os.getpid():
        return
    script = Path(__file__).with_name("guardian.py")
    command = [sys.executable, "-I", "-S", str(script), str(os.getpid())]
    null = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)
    host = (os.POSIX_SPAWN_DUP2, from_host, 0)
    os.posix_spawn(command[0], command, os.environ, file_actions=[host, null])


def _give_terms_their_descriptors() -> None:
    """0 reads nothing; 1 writes where 2 does: nothing printed, by anyone, reaches the stream."""
    null = os.open(os.devnull, os.O_RDWR)
    try:
        os.fstat(2)
    except OSError:
        os.dup2(null, 2)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _keep_freed_memory() -> None:
    """Have glibc reuse the memory of large frames: fresh pages cost more than reading into them."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - only glibc's mallopt knows these options
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_FREE_BYTES)
        libc.mallopt(_M_ARENA_MAX, 1)  # or every thread would keep free memory of its own


def resident_bytes() -> int:
    """How much memory this process has in RAM; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
