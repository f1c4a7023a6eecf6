"""Frames: a 4-byte big-endian length and that many bytes, as ``{:packet, 4}`` ports have them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import threading
from collections.abc import Iterable, Sequence

import numpy as np

from ..errors import ProtocolError
from .messagepack import PAYLOAD_AT, Buffer

__all__ = ["MAX_FRAME", "FrameReader", "FrameTooLargeError", "FrameWriter", "widen_pipe"]

MAX_FRAME = 1 << 30
"""The largest frame, unless an option says otherwise, in bytes without its header."""

_LEAD = -PAYLOAD_AT % 16
_PIPE_BYTES = 1 << 20
_COPIED = 1 << 14  # a frame of fewer bytes is joined sooner than it is written piece by piece
_MAX_PIECES = os.sysconf("SC_IOV_MAX")


class FrameTooLargeError(ProtocolError):
    """A frame is larger than the limit. One that was to be read leaves the stream unusable."""


class FrameReader:
    """Reads frames from a blocking file descriptor. One thread at a time."""

    def __init__(self, fd: int, max_frame: int = MAX_FRAME) -> None:
        self.fd = fd
        self.max_frame = max_frame

    def read(self) -> memoryview | None:
        """The next frame, or None when the writer is gone.

        Every frame has memory of its own, writable, so that tensors may be views of it. A length
        alone costs nothing: the memory is not touched before the bytes are there.

        Raises:
            FrameTooLargeError: the frame is over the limit. No further frame can be found.
        """
        header = memoryview(bytearray(4))
        if not self._fill(header):
            return None
        size = int.from_bytes(header, "big")
        if size > self.max_frame:
            raise FrameTooLargeError(
                f"a frame of {size} bytes was announced, but the limit is {self.max_frame}; "
                "raise --max-frame, or send fewer datums at a time"
            )
        # A bytearray would be zeroed first. The payload, which has the tensors, is aligned.
        frame = np.empty(size + _LEAD, np.uint8).data[_LEAD:]
        return frame if self._fill(frame) else None

    def _fill(self, view: memoryview) -> bool:
        while view:
            count = os.readv(self.fd, [view])
            if count == 0:
                return False
            view = view[count:]
        return True


class FrameWriter:
    """Writes frames to a blocking file descriptor, from any thread."""

    def __init__(self, fd: int, max_frame: int = MAX_FRAME) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self.max_frame = max_frame

    def check(self, size: int) -> None:
        """Check the size of an answer.

        Raises:
            FrameTooLargeError: it is over the limit.
        """
        if size > self.max_frame:
            raise FrameTooLargeError(
                f"the answer is a frame of {size} bytes, but the limit is {self.max_frame}; "
                "raise --max-frame, or send fewer datums at a time"
            )

    def write(self, pieces: Sequence[Buffer]) -> None:
        """Write one frame whose bytes are ``pieces`` one after another; large ones are not joined.

        Raises:
            FrameTooLargeError: they are over the limit; nothing was written.
            BrokenPipeError: the reader is gone.
        """
        size = sum(map(len, pieces))
        self.check(size)
        header = size.to_bytes(4, "big")
        if size < _COPIED:
            self._write([memoryview(b"".join([header, *pieces]))])
        else:
            self._write([memoryview(piece) for piece in [header, *pieces] if len(piece)])

    def write_all(self, frames: Iterable[bytes]) -> None:
        """Write small frames at once. Every system call lets go of the interpreter, and it takes
        5 ms to get it back from a term that computes.

        Raises:
            BrokenPipeError: the reader is gone.
        """
        self._write([memoryview(b"".join(len(f).to_bytes(4, "big") + f for f in frames))])

    def _write(self, views: list[memoryview]) -> None:
        with self._lock:
            while views:
                _drop(views, os.writev(self._fd, views[:_MAX_PIECES]))


def _drop(views: list[memoryview], written: int) -> None:
    """Remove the first ``written`` bytes of ``views``."""
    whole = 0
    while whole < len(views) and written >= len(views[whole]):
        written -= len(views[whole])
        whole += 1
    del views[:whole]
    if written:
        views[0] = views[0][written:]


def widen_pipe(fd: int) -> None:
    """Let a pipe hold 1 MiB (Linux), so that a large frame takes few system calls.

    The kernel may refuse: the pipe then stays as it is, which is slower and nothing worse.
    """
    if hasattr(fcntl, "F_SETPIPE_SZ") and stat.S_ISFIFO(os.fstat(fd).st_mode):
        with contextlib.suppress(OSError):  # EPERM: over the user's share; EBUSY: it holds data
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
