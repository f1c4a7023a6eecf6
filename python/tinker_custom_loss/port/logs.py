"""Python's logging, sent to the host as ``log`` messages."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from typing import Any

from ..running.context import current_term
from .cancellation import current_request
from .frames import FrameWriter
from .messagepack import pack

__all__ = ["LEVELS", "LogStream", "shorten"]

LEVELS = ("debug", "info", "warning", "error", "critical")
_LIMIT = 1 << 16
_formatter = logging.Formatter()


class LogStream(logging.Handler):
    """Collects records, and writes them when :meth:`drain` is called or a moment later.

    Logging never waits for the host: records are kept until they can be written, but no more than
    ``capacity`` of them. What is over is dropped and counted, and the count is logged.
    """

    def __init__(self, writer: FrameWriter, capacity: int = 1000) -> None:
        super().__init__()
        self._writer = writer
        self._capacity = capacity
        self._waiting: deque[dict[str, Any]] = deque()
        self._dropped = 0
        self._some = threading.Event()
        self._draining = threading.Lock()
        self._inside = threading.local()

    def install(self, level: str) -> None:
        """Send everything from ``level`` on, of every logger, and the warnings of Python."""
        root = logging.getLogger()
        root.setLevel(level.upper())
        root.addHandler(self)
        logging.captureWarnings(True)
        threading.Thread(target=self._run, name="tinker-custom-loss-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record. Called by ``logging``, with its lock held."""
        if len(self._waiting) >= self._capacity or getattr(self._inside, "emit", False):
            self._dropped += 1
        else:
            self._inside.emit = True  # an argument whose repr logs must not come back here
            try:
                self._waiting.append(_message(record))
            finally:
                self._inside.emit = False
        self._some.set()

    def drain(self) -> None:
        """Write what has been collected so far, and wait for whoever is writing of it."""
        with self._draining:
            if not self._waiting and not self._dropped:
                return
            frames = [pack(self._waiting.popleft()) for _ in range(len(self._waiting))]
            self.acquire()
            dropped, self._dropped = self._dropped, 0
            self.release()
            if dropped:
                frames.append(pack(_drop_notice(dropped)))
            self._writer.write_all(frames)

    def _run(self) -> None:
        while True:
            self._some.wait()
            self._some.clear()
            with contextlib.suppress(BrokenPipeError):  # the host is gone, and so are we soon
                self.drain()


def _message(record: logging.LogRecord) -> dict[str, Any]:
    try:
        text = record.getMessage()
    except Exception as error:
        text = f"{record.msg} (its arguments do not fit: {type(error).__name__}: {error})"
    if record.exc_info and record.exc_info[0] is not None:
        text += "\n" + _formatter.formatException(record.exc_info)
    if record.stack_info:
        text += "\n" + record.stack_info
    request = current_request.get()
    return {
        "op": "log",
        "level": LEVELS[min(max(record.levelno // 10 - 1, 0), len(LEVELS) - 1)],
        "logger": record.name,
        "message": shorten(text),
        "term": current_term.get(),
        "id": None if request is None else request.id,
    }


def _drop_notice(count: int) -> dict[str, Any]:
    return {
        "op": "log",
        "level": "warning",
        "logger": __name__,
        "message": f"{count} log records dropped: more than can be sent, or made by another record",
        "term": None,
        "id": None,
    }


def shorten(text: str) -> str:
    """``text``, or its beginning and how much more there was, if it is very long."""
    more = len(text) - _LIMIT
    return text if more <= 0 else f"{text[:_LIMIT]}… ({more} characters more)"
