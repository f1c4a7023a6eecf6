"""The log stream, when the host does not read."""

from __future__ import annotations

import logging
import os
import threading

import pytest

from tinker_custom_loss.port.frames import FrameReader, FrameWriter
from tinker_custom_loss.port.logs import LogStream, shorten
from tinker_custom_loss.port.messagepack import unpack


@pytest.fixture
def pipe():
    reading, writing = os.pipe()
    yield FrameReader(reading), FrameWriter(writing)
    os.close(reading)
    os.close(writing)


def record(text: str, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("name", level, __file__, 1, text, (), None)


def test_logging_never_waits_and_keeps_no_more_than_its_capacity(pipe):
    reader, writer = pipe
    logs = LogStream(writer, capacity=100)
    stuck = threading.Thread(target=logs.drain)
    for number in range(100):
        logs.handle(record(f"{number} " + "x" * 2000))
    stuck.start()  # on a pipe of 64 KiB that nobody reads
    for number in range(100, 5000):
        logs.handle(record(f"{number} " + "x" * 2000))
        assert len(logs._waiting) <= 100
    drain = threading.Thread(target=logs.drain)
    drain.start()
    records = dropped = 0
    while records + dropped < 5000:
        message = unpack(reader.read()).fields
        if message["logger"] == "name":
            records += 1
        else:
            assert message["level"] == "warning"
            assert "log records dropped" in message["message"]
            dropped += int(message["message"].split()[0])
    stuck.join()
    drain.join()
    assert records <= 200
    assert records + dropped == 5000


def test_what_another_thread_is_about_to_write_is_before_what_is_written_after_draining(pipe):
    reader, writer = pipe

    class Slow(FrameWriter):
        def write_all(self, frames):
            answering.start()  # the records are out of the queue, and not yet in the pipe
            answering.join(0.2)
            super().write_all(frames)

    logs = LogStream(Slow(writer._fd))

    def answer():
        logs.drain()
        writer.write([b"the answer"])

    answering = threading.Thread(target=answer)
    logs.handle(record("before the answer"))
    logs.drain()
    answering.join()
    assert unpack(reader.read()).fields["message"] == "before the answer"
    assert bytes(reader.read()) == b"the answer"


@pytest.mark.parametrize(
    ("level", "name"),
    [(5, "debug"), (10, "debug"), (25, "info"), (30, "warning"), (40, "error"), (99, "critical")],
)
def test_levels_between_the_named_ones_are_rounded_down(pipe, level, name):
    reader, writer = pipe
    logs = LogStream(writer)
    logs.handle(record("text", level))
    logs.drain()
    assert unpack(reader.read()).fields["level"] == name


def test_a_record_whose_arguments_do_not_fit_is_sent_all_the_same(pipe):
    reader, writer = pipe
    logs = LogStream(writer)
    logs.handle(logging.LogRecord("name", 20, __file__, 1, "%d of %d", ("x",), None))
    logs.drain()
    text = unpack(reader.read()).fields["message"]
    assert text.startswith("%d of %d (its arguments do not fit: ")


def test_what_is_cut_says_so():
    assert shorten("x" * 65_536) == "x" * 65_536
    assert shorten("x" * 65_540) == "x" * 65_536 + "… (4 characters more)"
