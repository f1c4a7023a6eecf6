"""MessagePack, bounded on the way in and canonical on the way out.

The decoder is our own because a frame may hold hundreds of megabytes of tensors: it hands out every
*bin* as a view of the frame, where the C extension of ``msgpack`` copies it (1.5 ms for 16 MB) into
bytes that torch cannot write to; and it keeps limits that the extension does not have. The encoder
is the extension, given sorted keys, except that large bins are left where they are.
"""

from __future__ import annotations

import os
import struct
from typing import Any

import msgpack

from ..errors import ProtocolError

__all__ = ["MAX_DEPTH", "MAX_VALUES", "Buffer", "pack", "pack_pieces", "unpack"]

Buffer = bytes | bytearray | memoryview

MAX_DEPTH = 64
"""Most levels of arrays and maps in a message, the outermost one included."""

MAX_VALUES = 1 << 20
"""Most values in a message (a tensor is one): a byte of MessagePack can claim 64 of Python's."""


_TIMESTAMP = -1  # the one ext type that MessagePack defines
_LARGE = 1 << 16  # from this size on, bytes are worth leaving where they are

_NUMBERS: dict[int, struct.Struct] = {
    0xCA: struct.Struct(">f"),
    0xCB: struct.Struct(">d"),
    0xCC: struct.Struct(">B"),
    0xCD: struct.Struct(">H"),
    0xCE: struct.Struct(">I"),
    0xCF: struct.Struct(">Q"),
    0xD0: struct.Struct(">b"),
    0xD1: struct.Struct(">h"),
    0xD2: struct.Struct(">i"),
    0xD3: struct.Struct(">q"),
}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_LENGTHS = [struct.Struct(">B"), struct.Struct(">H"), struct.Struct(">I")]


def unpack(frame: Buffer) -> Any:
    """The one value that ``frame`` holds; every *bin* in it is a ``memoryview`` of ``frame``.

    Maps become dicts (string keys only, none twice), arrays lists, ext types ``msgpack.ExtType``,
    except that of timestamps, ``msgpack.Timestamp``.

    Raises:
        ProtocolError: this is not exactly one value within the limits.
    """
    reader = _Reader(frame)
    size = len(reader.view)
    try:
        value = reader.value(0)
    except (IndexError, struct.error):
        raise ProtocolError(f"the message is cut short: its {size} bytes end in a value") from None
    except UnicodeDecodeError as error:
        raise ProtocolError(
            f"a string of the message, before byte {reader.at}, is not UTF-8: {error.reason}"
        ) from None
    if reader.at > size:
        raise ProtocolError(f"the message is cut short: its {size} bytes end in a value")
    if reader.at < size:
        raise ProtocolError(f"{size - reader.at} bytes follow the message in its frame")
    return value


class _Reader:
    """Steps over a frame. ``at`` may pass the end (a slice is then short): ``unpack`` looks."""

    __slots__ = ("at", "data", "values_left", "view")

    def __init__(self, frame: Buffer) -> None:
        self.view = memoryview(frame)
        # Text comes twice as fast out of bytes; a large frame is not worth the copy.
        self.data = bytes(frame) if len(self.view) < _LARGE else self.view
        self.at = 0
        self.values_left = MAX_VALUES

    def value(self, depth: int) -> Any:
        at = self.at
        tag = self.data[at]
        self.at = at + 1
        if tag < 0x80:
            return tag
        if tag < 0x90:
            return self.map(tag & 0x0F, depth + 1)
        if tag < 0xA0:
            return self.array(tag & 0x0F, depth + 1)
        if tag < 0xC0:
            return self.text(tag & 0x1F)
        if tag >= 0xE0:
            return tag - 0x100
        number = _NUMBERS.get(tag)
        if number is not None:
            self.at += number.size
            return number.unpack_from(self.data, at + 1)[0]
        if tag in _CONSTANTS:
            return _CONSTANTS[tag]
        if 0xC4 <= tag <= 0xC6:
            return self.bin(self.length(tag - 0xC4))
        if 0xD9 <= tag <= 0xDB:
            return self.text(self.length(tag - 0xD9))
        if tag in (0xDC, 0xDD):
            return self.array(self.length(tag - 0xDC + 1), depth + 1)
        if tag in (0xDE, 0xDF):
            return self.map(self.length(tag - 0xDE + 1), depth + 1)
        if 0xC7 <= tag <= 0xC9:
            return self.ext(self.length(tag - 0xC7))
        if 0xD4 <= tag <= 0xD8:
            return self.ext(1 << tag - 0xD4)
        raise ProtocolError(f"byte {at} of the message is 0x{tag:02x}, which MessagePack never has")

    def length(self, width: int) -> int:
        form = _LENGTHS[width]
        length: int = form.unpack_from(self.data, self.at)[0]
        self.at += form.size
        return length

    def text(self, size: int) -> str:
        start = self.at
        self.at = end = start + size
        return str(self.data[start:end], "utf-8")

    def bin(self, size: int) -> memoryview:
        start = self.at
        self.at = end = start + size
        return self.view[start:end]

    def ext(self, size: int) -> msgpack.ExtType | msgpack.Timestamp:
        (code,) = _NUMBERS[0xD0].unpack_from(self.data, self.at)
        self.at += 1
        data = bytes(self.bin(size))
        if code != _TIMESTAMP:
            return msgpack.ExtType._make((code, data))  # its own constructor refuses code < 0
        try:
            return msgpack.Timestamp.from_bytes(data)
        except ValueError as error:
            raise ProtocolError(
                f"the timestamp of the message, before byte {self.at}, is none: {error}"
            ) from None

    def array(self, count: int, depth: int) -> list[Any]:
        self.check(count, depth)
        value = self.value
        return [value(depth) for _ in range(count)]

    def map(self, count: int, depth: int) -> dict[str, Any]:
        self.check(2 * count, depth)
        value = self.value
        result: dict[str, Any] = {}
        for _ in range(count):
            start = self.at
            key = value(depth)
            if type(key) is not str:
                raise ProtocolError(f"the map key at byte {start} of the message is not a string")
            result[key] = value(depth)
        if len(result) != count:
            raise ProtocolError(f"a map of the message, before byte {self.at}, has a key twice")
        return result

    def check(self, count: int, depth: int) -> None:
        """Refuse a container of ``count`` values before any is read."""
        if depth > MAX_DEPTH:
            raise ProtocolError(f"the message is nested deeper than {MAX_DEPTH} levels")
        left = len(self.view) - self.at
        if count > left:
            raise ProtocolError(
                f"the message is cut short: {count} values begin at byte {self.at}, "
                f"but {left} bytes are left"
            )
        self.values_left -= count
        if self.values_left < 0:
            raise ProtocolError(
                f"the message holds more than {MAX_VALUES} values; numbers travel as a batch"
            )


def pack(value: object) -> bytes:
    """``value`` in canonical form (see docs/protocol.md, "MessagePack").

    Raises:
        TypeError: something in it is no MessagePack value.
        ValueError: an integer needs more than 64 bits, or it is nested too deeply.
    """
    return _packed(_sorted(value, 1, None))


def pack_pieces(message: dict[str, Any]) -> list[Buffer]:
    """``pack(message)`` in pieces, of which every large *bin* is one: the very memory it lay in."""
    bins: list[memoryview] = []
    packed = _packed(_sorted(message, 1, bins)).split(_HOLE)
    pieces: list[Buffer] = [packed[0]]
    for view, following in zip(bins, packed[1:], strict=True):
        pieces += [b"\xc6" + len(view).to_bytes(4, "big"), view, following]
    return pieces


_HOLE = msgpack.packb(msgpack.ExtType(0, os.urandom(16)))
_HOLE_VALUE = msgpack.unpackb(_HOLE)
_STRINGS = {str}
_SCALARS = {float, int, str, bool, type(None)}


def _sorted(value: Any, depth: int, bins: list[memoryview] | None) -> Any:
    """``value`` with the keys of every map in order, and large bins moved to ``bins``, if given."""
    kind = type(value)
    if kind in _SCALARS:
        return value
    if issubclass(kind, dict):
        _check_depth(depth)
        if not _STRINGS.issuperset(map(type, value)):
            _check_keys(value)
        # Code points and UTF-8 bytes sort alike.
        return {
            key: inner if type(inner := value[key]) in _SCALARS else _sorted(inner, depth + 1, bins)
            for key in sorted(value)
        }
    if kind in (list, tuple):
        _check_depth(depth)
        if _SCALARS.issuperset(map(type, value)):
            return value
        return [_sorted(inner, depth + 1, bins) for inner in value]
    if bins is not None and issubclass(kind, (bytes, bytearray, memoryview)):
        view = memoryview(value).cast("B")
        if len(view) >= _LARGE:
            bins.append(view)
            return _HOLE_VALUE
    return value


def _check_keys(value: dict[Any, Any]) -> None:
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"a map key must be a string, got {key!r}")


def _check_depth(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"the value is nested deeper than {MAX_DEPTH} levels")


def _packed(value: object) -> bytes:
    # A lone surrogate (a file name in an error message) must not stop the message.
    try:
        packed: bytes = msgpack.packb(value, unicode_errors="backslashreplace")
    except OverflowError:
        raise ValueError("an integer does not fit in 64 bits, or a string in 4 GiB") from None
    return packed
