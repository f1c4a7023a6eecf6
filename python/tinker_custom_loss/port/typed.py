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
    "bool": "a bool",
    "int": "an integer",
    "float": "a float",
    "str": "a string",
    "bytes": "a bin",
    "array": "an array",
    "object": "a map",
}


def read(value: object, kind: type[T], path: str = "") -> T:
    """``value`` as ``kind``; keys that ``kind`` does not have are ignored.

    ``path`` is where ``value`` lies in the message.

    Raises:
        ProtocolError: something is missing or of another type.
        RequestError: something of the right type is none of the values that are known.
    """
    try:
        return msgspec.convert(value, kind, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        raise _explained(str(error), path) from None


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
    text = f"{expected} at `{where}`" + (f", got {got}" if got else "")
    kind = RequestError if expected.startswith("invalid") else ProtocolError
    return kind(text, path=where)


def _named(types: re.Match[str]) -> str:
    return " or ".join(_NAMES.get(name, name) for name in types[1].split(" | "))


def _joined(path: str, inner: str) -> str:
    return f"{path}.{inner}" if path and inner and inner[0] != "[" else path + inner
