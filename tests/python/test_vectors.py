"""The frames of tests/vectors: what Elixir encodes and decodes, byte for byte."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgpack
import pytest

from tinker_custom_loss.errors import ProtocolError
from tinker_custom_loss.port import messages

VECTORS = Path(__file__).parents[1] / "vectors"
FLOATS = {"nan": math.nan, "infinity": math.inf, "neg_infinity": -math.inf}


def value_of(written: Any) -> Any:
    """The value that a vector's JSON stands for; see tests/vectors/README.md."""
    match written:
        case {"$bin": str(digits)}:
            return bytes.fromhex(digits)
        case {"$float": name}:
            return FLOATS[name]
        case {"$ext": [code, digits]}:
            return msgpack.ExtType(code, bytes.fromhex(digits))
        case {"$timestamp": [seconds, nanoseconds]}:
            return msgpack.Timestamp(seconds, nanoseconds)
        case dict():
            return {key: value_of(inner) for key, inner in written.items()}
        case list():
            return [value_of(inner) for inner in written]
    return written


def comparable(value: Any) -> Any:
    """``value`` such that == tells apart what MessagePack does: 1, 1.0 and True, 0.0 and -0.0."""
    match value:
        case bytes() | bytearray() | memoryview():
            return ("bin", bytes(value))
        case float():
            return ("float", repr(value))
        case dict():
            return {key: comparable(inner) for key, inner in value.items()}
        case list():
            return [comparable(inner) for inner in value]
    return (type(value).__name__, value)


def read(name: str) -> list[dict[str, Any]]:
    vectors: list[dict[str, Any]] = json.loads((VECTORS / name).read_text(encoding="utf-8"))
    return vectors


def read_messages() -> list[dict[str, Any]]:
    return [
        {"name": path.stem, "canonical": True, **json.loads(path.read_text(encoding="utf-8"))}
        for path in sorted((VECTORS / "messages").glob("*.json"))
    ]


FORMATS = read("formats.json")
MESSAGES = read_messages()


def each(vectors: list[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("vector", vectors, ids=lambda vector: vector["name"])


@each(FORMATS + MESSAGES)
def test_a_frame_decodes_to_its_value(vector: dict[str, Any]) -> None:
    decoded = messages.unpack(bytes.fromhex(vector["hex"]))
    assert comparable(decoded) == comparable(value_of(vector["value"]))


@each([vector for vector in FORMATS + MESSAGES if vector["canonical"]])
def test_a_value_encodes_to_its_frame(vector: dict[str, Any]) -> None:
    assert bytes(messages.pack(value_of(vector["value"]))).hex() == vector["hex"]


@each(read("invalid.json"))
def test_an_invalid_frame_is_refused(vector: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        messages.unpack(bytes.fromhex(vector["hex"]))


@each([vector for vector in MESSAGES if vector["value"]["op"] == "compute"])
def test_a_request_is_understood(vector: dict[str, Any]) -> None:
    message = messages.unpack(bytes.fromhex(vector["hex"]))
    request = messages.decode_compute(message)
    _, regularizers = messages.decode_terms(message)
    written = vector["value"]
    assert [list(shape) for shape in request.logprobs.shapes] == written["logprobs"]["shapes"]
    assert [spec.fn for spec in regularizers] == [r["fn"] for r in written["regularizers"]]
    assert (request.step, request.gradients) == (written["step"], written["gradients"])
