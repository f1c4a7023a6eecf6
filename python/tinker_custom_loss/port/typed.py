"""Values from the wire as the types they should have, or a sentence that ends in a path."""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from ..errors import ProtocolError, RequestError

__all__ = ["read"]

T = TypeVar("T")

_NAMES = {
    "null": "nil",
    "None": "nil",
    "bool": "a bool",
    "int": "an integer",
    "float": "a float",
    "str": "a string",
    "bytes": "a bin",
    "array": "an array",
    "object": "a map",
}


def read(packed: bytes | memoryview | msgspec.Raw, kind: type[T], path: str = "") -> T:
    """MessagePack as ``kind``; keys that ``kind`` does not have are skipped.

    ``path`` is where in the message it lies.

    Raises:
        ProtocolError: it is no MessagePack, or something is missing or of another type.
        RequestError: something of the right type is none of the values that are known.
    """
    try:
        return msgspec.msgpack.decode(packed, type=kind)
    except msgspec.ValidationError as error:
        raise _explained(str(error), path) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ProtocolError(f"the message cannot be unpacked: {what}") from None


def _explained(message: str, path: str) -> ProtocolError | RequestError:
    """msgspec's "Expected `int`, got `str` - at `$.a.b`", in our words."""
    sentence, _, place = message.partition(" - at ")
    inner = re.search(r"`\$\.?(.*)`", place)
    where = _joined(path, inner[1] if inner else "")
    missing = re.fullmatch(r"Object missing required field `(.*)`", sentence)
    if missing:
        where = _joined(where, missing[1])
        return ProtocolError(f'the required key "{missing[1]}" is missing at `{where}`', path=where)
    expected, _, got = re.sub(r"`(.*?)`", _named, sentence).partition(", got ")
    expected = expected[0].lower() + expected[1:]
    if place.startswith("`key`"):
        expected += " as a key"
    elif not where:
        expected += " as the whole message"
    text = f"{expected} at `{where}`" if where else expected
    unknown = expected.startswith(("invalid enum", "invalid value"))
    kind = RequestError if unknown else ProtocolError
    return kind(text + (f", got {got}" if got else ""), path=where or None)


def _named(types: re.Match[str]) -> str:
    return " or ".join(_NAMES.get(name, name) for name in types[1].split(" | "))


def _joined(path: str, inner: str) -> str:
    return f"{path}.{inner}" if path and inner and inner[0] != "[" else path + inner
