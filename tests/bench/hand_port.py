"""What one would write by hand: float32 logprobs in, mean of squares, loss and gradient out.

No MessagePack, no terms, no record, no errors: what the bridge is measured against. Frames of
``{:packet, 4}`` on descriptors 0 and 1. A request is the logprobs of a batch, one after another;
the reply is the loss as a little-endian float64, then the gradient as little-endian float32.
"""

from __future__ import annotations

import struct
from io import FileIO

import torch


def read(requests: FileIO, size: int) -> bytearray:
    """``size`` bytes, or fewer at the end of the file."""
    body = bytearray(size)
    rest = memoryview(body)
    while rest and (count := requests.readinto(rest)):
        rest = rest[count:]
    return body[: size - len(rest)] if rest else body


def write(replies: FileIO, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[replies.write(rest) :]


def serve(requests: FileIO, replies: FileIO) -> None:
    while len(header := read(requests, 4)) == 4:
        body = read(requests, int.from_bytes(header, "big"))
        logprobs = torch.frombuffer(body, dtype=torch.float32).requires_grad_()
        loss = logprobs.square().mean()
        loss.backward()
        assert logprobs.grad is not None
        gradient = memoryview(logprobs.grad.numpy()).cast("B")
        write(replies, struct.pack(">I", 8 + len(gradient)) + struct.pack("<d", loss.item()))
        write(replies, gradient)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(FileIO(0), FileIO(1, "w"))
