"""Frames over real pipes."""

from __future__ import annotations

import fcntl
import os
import struct
import threading

import numpy as np
import pytest

from tinker_custom_loss.port.frames import (
    FrameReader,
    FrameTooLargeError,
    FrameWriter,
    widen_pipe,
)


@pytest.fixture
def pipe():
    reading, writing = os.pipe()
    open_ends = {reading, writing}

    class Pipe:
        reader = FrameReader(reading, 1 << 26)
        writer = FrameWriter(writing, 1 << 26)
        fd = writing

        @staticmethod
        def close_writer():
            os.close(writing)
            open_ends.discard(writing)

        @staticmethod
        def close_reader():
            os.close(reading)
            open_ends.discard(reading)

    yield Pipe
    for fd in open_ends:
        os.close(fd)


def in_background(function, *args):
    thread = threading.Thread(target=function, args=args)
    thread.start()
    return thread


def test_the_bytes_on_the_wire_are_a_length_and_the_pieces(pipe):
    pipe.writer.write([b"ab", b"", memoryview(b"cde")])
    assert os.read(pipe.reader.fd, 100) == b"\x00\x00\x00\x05abcde"


def test_frames_come_out_as_they_went_in(pipe):
    for frame in (b"", b"x", bytes(range(256)) * 100):
        pipe.writer.write([frame])
        assert pipe.reader.read() == frame


def test_a_frame_larger_than_the_pipe_is_written_in_parts_and_read_whole(pipe):
    tensor = np.random.default_rng(0).bytes(5_000_001)
    thread = in_background(pipe.writer.write, [b"head", tensor, b"tail"])
    frame = pipe.reader.read()
    thread.join()
    assert frame == b"head" + tensor + b"tail"


def test_more_pieces_than_one_system_call_takes(pipe):
    pieces = [b"%d," % number for number in range(6000)]
    thread = in_background(pipe.writer.write, pieces)
    assert pipe.reader.read() == b"".join(pieces)
    thread.join()


def test_threads_do_not_mix_their_frames(pipe):
    frames = [bytes([number]) * 100_000 for number in range(8)]
    threads = [in_background(pipe.writer.write, [frame[:7], frame[7:]]) for frame in frames]
    assert sorted(bytes(pipe.reader.read()) for _ in frames) == frames
    for thread in threads:
        thread.join()


def test_a_frame_is_writable_memory_of_its_own(pipe):
    pipe.writer.write([b"abc"])
    pipe.writer.write([b"def"])
    first, second = pipe.reader.read(), pipe.reader.read()
    first[0] = ord("x")
    assert (bytes(first), bytes(second)) == (b"xbc", b"def")


@pytest.mark.parametrize("left", [b"", b"\x00\x00", b"\x00\x00\x00\x05abc"])
def test_the_end_of_the_stream_is_none_wherever_it_comes(pipe, left):
    os.write(pipe.fd, left)
    pipe.close_writer()
    assert pipe.reader.read() is None


def test_a_frame_over_the_limit_is_refused_before_it_is_read(pipe):
    os.write(pipe.fd, struct.pack(">I", (1 << 26) + 1))
    with pytest.raises(FrameTooLargeError, match=r"67108865 bytes was announced.* limit is 67108"):
        pipe.reader.read()


def test_a_frame_over_the_limit_is_refused_before_it_is_written(pipe):
    writer = FrameWriter(pipe.fd, max_frame=10)
    with pytest.raises(FrameTooLargeError, match="frame of 11 bytes, but the limit is 10"):
        writer.write([b"12345", b"678901"])
    writer.write([b"1234567890"])
    assert pipe.reader.read() == b"1234567890"


def test_a_reader_that_is_gone_is_a_broken_pipe(pipe):
    pipe.close_reader()
    with pytest.raises(BrokenPipeError):
        pipe.writer.write([b"x"])


@pytest.mark.skipif(not hasattr(fcntl, "F_SETPIPE_SZ"), reason="Linux")
def test_a_pipe_is_widened(pipe):
    widen_pipe(pipe.fd)
    assert fcntl.fcntl(pipe.fd, fcntl.F_GETPIPE_SZ) == 1 << 20


def test_what_is_no_pipe_stays_as_it_is(tmp_path):
    with open(tmp_path / "file", "wb") as file:
        widen_pipe(file.fileno())
