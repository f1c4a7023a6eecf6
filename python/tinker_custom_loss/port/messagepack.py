"""What is in a frame: a message, which is a map, and before it the bytes of its tensors.

Both are MessagePack, the tensors as one *bin*, the ``payload``, and a batch in the message says
where in it its bytes lie. So the C extension reads and writes what is small, and tensors are left
where they are, in both directions. In place of the payload there may be a :class:`Place`: it lies
in shared memory then.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Any

import msgpack
import numpy as np
import torch

from ..errors import ProtocolError
from ..tensors.batch import TensorBatch
from .shapes import pack_shapes

__all__ = [
    "PAYLOAD_AT",
    "Buffer",
    "Message",
    "Payload",
    "Place",
    "frame_pieces",
    "pack",
    "pack_apart",
    "pack_pieces",
    "unpack",
]

Buffer = bytes | bytearray | memoryview

PAYLOAD_AT = 5
"""Where in a frame its payload begins: its header is always that of a *bin 32*."""

_BIN_32 = b"\xc6"
_PLACE = struct.Struct(">3sIQQ")
_PLACE_HEADER = b"\xc7\x14\x01"  # an ext 8 of 20 bytes, type 1
_ALIGNMENT = 8
_MOST_ITEMS = 1 << 20  # of one array or map: no length claims memory that no bytes fill


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes of a shared file."""

    file: int
    at: int
    size: int


@dataclass(frozen=True, slots=True)
class Message:
    """The keys and values of a message, and the memory in which its batches lie.

    With a ``place``, that is where the payload is, until the message is answered.
    """

    fields: dict[str, Any]
    payload: memoryview
    place: Place | None = None

    def with_own_payload(self) -> Message:
        """The same, with a payload that nobody else writes to."""
        own = np.empty(len(self.payload), np.uint8)  # a bytearray would be zeroed first
        own.data[:] = self.payload
        return replace(self, payload=own.data)


def unpack(frame: Buffer) -> Message:
    """The message of a frame; its payload is a view of the frame.

    Raises:
        ProtocolError: the frame does not hold what this module says.
    """
    message = memoryview(frame)
    payload, place = message[:0], None
    if message[:3] == _PLACE_HEADER and len(message) >= _PLACE.size:
        _, *numbers = _PLACE.unpack_from(message)
        place, message = Place(*numbers), message[_PLACE.size :]
    elif message[:1] == _BIN_32:
        end = PAYLOAD_AT + int.from_bytes(message[1:PAYLOAD_AT], "big")
        payload, message = message[PAYLOAD_AT:end], message[end:]
    try:
        fields = msgpack.unpackb(message, max_array_len=_MOST_ITEMS, max_map_len=_MOST_ITEMS)
    except ValueError as error:  # such are all that it raises
        what = f"{type(error).__name__}: {error}".rstrip(": ")
        raise ProtocolError(f"the message cannot be unpacked: {what}") from None
    if not isinstance(fields, dict):
        raise ProtocolError(f"a message is a map, but the frame holds a {type(fields).__name__}")
    return Message(fields, payload, place)


def pack(message: dict[str, Any]) -> bytes:
    """The frame of a message, in which every :class:`TensorBatch` becomes a batch.

    Raises:
        TypeError: something in it is no MessagePack value, such as an integer of over 64 bits.
        ValueError: it is nested too deeply.
    """
    return b"".join(pack_pieces(message))


def pack_pieces(message: dict[str, Any]) -> list[Buffer]:
    """``pack(message)`` in pieces, of which every tensor on a CPU is one: its own memory."""
    return frame_pieces(*pack_apart(message))


def pack_apart(message: dict[str, Any]) -> tuple[Payload, bytes]:
    """The payload and the message of a frame."""
    payload = Payload()
    # A lone surrogate (a file name in an error message) must not stop the message.
    packed = msgpack.packb(message, default=payload.place, unicode_errors="backslashreplace")
    return payload, packed


def frame_pieces(payload: Payload, packed: bytes, place: Place | None = None) -> list[Buffer]:
    """The frame of a message whose payload goes along, or is at a ``place``."""
    if place is not None:
        return [_PLACE.pack(_PLACE_HEADER, place.file, place.at, place.size), packed]
    if not payload.size:
        return [packed]
    return [_BIN_32 + payload.size.to_bytes(4, "big"), *payload.pieces, packed]


class Payload:
    """Collects the bytes of batches, each at a multiple of the largest size of a value."""

    def __init__(self) -> None:
        self.size = 0
        self.pieces: list[Buffer] = []

    def place(self, value: object) -> dict[str, Any]:
        if not isinstance(value, TensorBatch):
            raise TypeError(f"MessagePack has no form for this {type(value).__name__}")
        flat = value.flat.detach().cpu().contiguous()
        data = flat.view(torch.uint8).numpy().data
        padding = -self.size % _ALIGNMENT
        at = self.size + padding
        self.pieces += [bytes(padding), data]
        self.size = at + len(data)
        dtype = str(flat.dtype).removeprefix("torch.")
        return {"data": [at, len(data)], "dtype": dtype, "shapes": pack_shapes(value.shapes)}
