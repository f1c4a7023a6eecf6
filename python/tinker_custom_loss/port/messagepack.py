"""What is in a frame: a message, which is a map, and before it the bytes of its tensors.

Both are MessagePack, the tensors as one *bin*, the ``payload``, and a batch in the message says
where in it its bytes lie. So tensors are left where they are, in both directions, and what is small
is read where its types are known, straight from its bytes (:mod:`.typed`). In place of the payload
there may be a :class:`Place`: it lies in shared memory then.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import numpy as np
import torch

from ..tensors.batch import TensorBatch
from .shapes import pack_shapes
from .typed import read

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


class Place(msgspec.Struct, frozen=True):
    """Bytes of a shared file."""

    file: int
    at: int
    size: int


class Message(msgspec.Struct, frozen=True):
    """A map that is still ``packed``, but for what every message has, and its batches' memory.

    With a ``place``, that is where the payload is, until the message is answered.
    """

    op: object
    id: object
    packed: memoryview
    payload: memoryview
    place: Place | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """All keys and values, whatever their types.

        Raises:
            ProtocolError: there is something in it that is no MessagePack.
        """
        return read(self.packed, dict[str, Any])

    def with_payload(self, payload: memoryview) -> Message:
        """The same, with the payload that is at its place."""
        return msgspec.structs.replace(self, payload=payload)

    def with_own_payload(self) -> Message:
        """The same, with a payload that nobody else writes to."""
        own = np.empty(len(self.payload), np.uint8)  # a bytearray would be zeroed first
        own.data[:] = self.payload
        return self.with_payload(own.data)


class _Head(msgspec.Struct):
    op: Any = None
    id: Any = None


def unpack(frame: Buffer) -> Message:
    """The message of a frame; its payload is a view of the frame.

    Raises:
        ProtocolError: the frame does not hold what this module says.
    """
    message = memoryview(frame)
    payload, place = message[:0], None
    if message[:1] == _BIN_32:
        end = PAYLOAD_AT + int.from_bytes(message[1:PAYLOAD_AT], "big")
        payload, message = message[PAYLOAD_AT:end], message[end:]
    elif message[:3] == _PLACE_HEADER and len(message) >= _PLACE.size:
        _, *numbers = _PLACE.unpack_from(message)
        place, message = Place(*numbers), message[_PLACE.size :]
    head = read(message, _Head)
    return Message(head.op, head.id, message, payload, place)


def pack(message: dict[str, Any]) -> bytes:
    """The frame of a message, in which every :class:`TensorBatch` at its top becomes a batch.

    Raises:
        TypeError, OverflowError: something in it is no MessagePack value, such as an integer of
            over 64 bits.
        RecursionError: it is nested too deeply.
    """
    return b"".join(pack_pieces(message))


def pack_pieces(message: dict[str, Any]) -> list[Buffer]:
    """``pack(message)`` in pieces, of which every tensor on a CPU is one: its own memory."""
    return frame_pieces(*pack_apart(message))


def pack_apart(message: dict[str, Any]) -> tuple[Payload, bytes]:
    """The payload and the message of a frame."""
    payload = Payload()
    placed = {
        key: payload.place(value) if isinstance(value, TensorBatch) else value
        for key, value in message.items()
    }
    try:
        return payload, msgspec.msgpack.encode(placed, enc_hook=_plain)
    except UnicodeEncodeError:  # a lone surrogate, of a file's name in an error message, say
        return payload, msgspec.msgpack.encode(_without_surrogates(placed), enc_hook=_plain)


def _plain(value: object) -> str | float | int:
    """What is in a value of a class of its own, as torch's version and numpy's numbers are."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, int):
        return int.__int__(value)
    raise TypeError(f"MessagePack has no form for this {type(value).__name__}")


def _without_surrogates(value: Any) -> Any:
    match value:
        case str():
            return value.encode(errors="backslashreplace").decode()
        case dict():
            return {_without_surrogates(key): _without_surrogates(value[key]) for key in value}
        case list() | tuple():
            return [*map(_without_surrogates, value)]
    return value


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

    def place(self, value: TensorBatch) -> dict[str, Any]:
        """What stands for a batch in its message."""
        flat = value.flat.detach() if value.flat.requires_grad else value.flat
        numbers = flat.view(torch.int16) if flat.dtype is torch.bfloat16 else flat
        data = np.ascontiguousarray(numbers.cpu().numpy()).view(np.uint8).data
        padding = -self.size % _ALIGNMENT
        at = self.size + padding
        self.pieces += [bytes(padding), data]
        self.size = at + len(data)
        dtype = str(flat.dtype).removeprefix("torch.")
        return {"data": [at, len(data)], "dtype": dtype, "shapes": pack_shapes(value.shapes)}
