"""What one would write by hand: float32 arrays in, one loss and its gradient out.

No MessagePack, no terms, no record, no errors: what the bridge is measured against. Frames of
``{:packet, 4}`` on descriptors 0 and 1. A request is the arrays of a batch, one after another; the
reply is the loss as a little-endian float64, then the gradient as little-endian float32.

    hand_port.py l2     the logprobs: the sum of their squares
    hand_port.py work   logprobs, weights, reference logprobs: nll + l2 + entropy + kl in one sum
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from io import FileIO

import torch
from torch import Tensor


def l2(logprobs: Tensor) -> Tensor:
    return logprobs.square().sum()


def work(logprobs: Tensor, weights: Tensor, reference: Tensor) -> Tensor:
    """Of sampled tokens, whose entropy is estimated; what trains it is differentiated."""
    squares = logprobs.square()
    surrogate = (squares - squares.detach()) / 2 + logprobs.detach()
    kl = (logprobs - reference).square() / 2
    return (weights * (0.1 * squares + 0.01 * surrogate + 0.1 * kl - logprobs)).sum()


LOSSES: dict[str, tuple[Callable[..., Tensor], int]] = {"l2": (l2, 1), "work": (work, 3)}


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


def serve(requests: FileIO, replies: FileIO, fn: Callable[..., Tensor], arrays: int) -> None:
    while len(header := read(requests, 4)) == 4:
        body = read(requests, int.from_bytes(header, "big"))
        logprobs, *others = torch.frombuffer(body, dtype=torch.float32).view(arrays, -1)
        logprobs.requires_grad_()
        loss = fn(logprobs, *others)
        loss.backward()
        assert logprobs.grad is not None
        gradient = memoryview(logprobs.grad.numpy()).cast("B")
        write(replies, struct.pack(">I", 8 + len(gradient)) + struct.pack("<d", loss.item()))
        write(replies, gradient)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(FileIO(0), FileIO(1, "w"), *LOSSES[sys.argv[1]])
