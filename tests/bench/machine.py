"""What this machine can do at best: what the figures of the bridge and of the terms are made of.

    machine_memcpy        GB/s of a copy within memory that is there, 16 MB at a time
    machine_fresh_pages   GB/s of a copy to pages that the kernel has yet to give
    machine_pipe          GB/s through a pipe to another process
    machine_tmpfs_write   GB/s to a file of pages that are there, in shared memory
    machine_tmpfs_read    GB/s from it
    machine_torch_pass    GB/s read by a sum of two tensors into a third that is there, one thread
    machine_round_trip    microseconds of one byte to another process and back, through two pipes

None has a target. The median of 15.
"""

from __future__ import annotations

import mmap
import os
import statistics
import tempfile
from collections.abc import Callable

import numpy as np
import torch
from figures import figure, milliseconds

SIZE = 16 << 20
SHARED = "/dev/shm"


def rate(name: str, function: Callable[[], object], size: int = SIZE) -> None:
    function()
    ms = statistics.median(milliseconds(function) for _ in range(15))
    figure(f"machine_{name}", size / ms / 1e6)


def memory() -> None:
    source, target = np.ones(SIZE, np.uint8), np.ones(SIZE, np.uint8)
    rate("memcpy", lambda: np.copyto(target, source))
    rate("fresh_pages", lambda: fresh(source))
    x, y, out = (torch.ones(SIZE // 4) for _ in range(3))
    rate("torch_pass", lambda: torch.add(x, y, out=out), 2 * SIZE)


def fresh(source: np.ndarray) -> None:
    with mmap.mmap(-1, SIZE) as pages:
        pages.write(source)


def shared_memory() -> None:
    data, back = memoryview(bytes(SIZE)), bytearray(SIZE)
    with tempfile.TemporaryFile(dir=SHARED, buffering=0) as file:
        rate("tmpfs_write", lambda: os.pwrite(file.fileno(), data, 0))
        rate("tmpfs_read", lambda: os.preadv(file.fileno(), [back], 0))


def pipes() -> None:
    """Frames of a size are answered by one byte."""
    (theirs, to_them), (ours, to_us) = os.pipe(), os.pipe()
    if os.fork() == 0:
        os.close(to_them)
        buffer = bytearray(1 << 16)
        while size := int.from_bytes(os.read(theirs, 4), "big"):
            while size:
                size -= os.readv(theirs, [memoryview(buffer)[: min(size, len(buffer))]])
            os.write(to_us, b"x")
        os._exit(0)

    def send(data: memoryview) -> None:
        os.write(to_them, len(data).to_bytes(4, "big"))
        while data:
            data = data[os.write(to_them, data) :]
        os.read(ours, 1)

    rate("pipe", lambda: send(memoryview(bytes(SIZE))))
    trips = [milliseconds(lambda: send(memoryview(b"x"))) for _ in range(2000)]
    figure("machine_round_trip", statistics.median(trips) * 1e3)
    os.write(to_them, bytes(4))
    os.wait()


if __name__ == "__main__":
    torch.set_num_threads(1)
    pipes()  # before torch has threads, which a fork does not copy
    memory()
    shared_memory()
