"""The frames of tests/vectors: what Elixir encodes and decodes, byte for byte."""

from __future__ import annotations

import contextlib
import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tinker_custom_loss.errors import ProtocolError
from tinker_custom_loss.port.messagepack import pack, unpack
from tinker_custom_loss.port.messages import Terms, decode_compute, decode_totals
from tinker_custom_loss.port.shapes import pack_shapes
from tinker_custom_loss.port.typed import read as typed

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
            return msgspec.msgpack.Ext(code, bytes.fromhex(digits))
        case {"$timestamp": [seconds, nanoseconds]}:
            whole = datetime.fromtimestamp(seconds, UTC)
            return whole + timedelta(microseconds=round(nanoseconds / 1000))
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


def in_order(value: Any) -> Any:
    """``value`` with the keys of every map ascending, as the frames of the vectors have them."""
    match value:
        case dict():
            return {key: in_order(value[key]) for key in sorted(value)}
        case list():
            return [in_order(inner) for inner in value]
    return value


def writable(vector: dict[str, Any]) -> bool:
    """Python reads a timestamp to the microsecond, and never has one to write."""
    return vector["canonical"] and "$timestamp" not in json.dumps(vector["value"])


class Format(msgspec.Struct):
    """A message that has a value of any type."""

    v: Any


def payload_of(vector: dict[str, Any]) -> bytes:
    return bytes.fromhex(vector.get("payload", ""))


def framed(vector: dict[str, Any]) -> bytes:
    """A format of MessagePack is a value; a message is a map that has it."""
    return (b"" if "from" in vector else b"\x81\xa1v") + bytes.fromhex(vector["hex"])


@each(FORMATS + MESSAGES)
def test_a_frame_decodes_to_its_value(vector: dict[str, Any]) -> None:
    message = unpack(framed(vector))
    value = message.fields["v"] if vector in FORMATS else message.fields
    assert comparable(value) == comparable(value_of(vector["value"]))
    assert message.payload == payload_of(vector)


@each([*filter(writable, FORMATS + MESSAGES)])
def test_a_value_encodes_to_its_frame(vector: dict[str, Any]) -> None:
    value = in_order(value_of(vector["value"]))
    packed = pack({"v": value} if vector in FORMATS else value)
    payload = payload_of(vector)
    header = b"\xc6" + len(payload).to_bytes(4, "big") if payload else b""
    assert (header + payload + packed).hex() == framed(vector).hex()


@each(read("invalid.json"))
def test_an_invalid_frame_is_refused(vector: dict[str, Any]) -> None:
    taken = vector.get("taken_by_the_worker")
    with contextlib.nullcontext() if taken else pytest.raises(ProtocolError):
        typed(unpack(framed(vector)).packed, Format)


@each([vector for vector in MESSAGES if vector["value"]["op"] == "compute"])
def test_a_request_is_understood(vector: dict[str, Any]) -> None:
    message = unpack(bytes.fromhex(vector["hex"]))
    request = decode_compute(message)
    terms = typed(message.packed, Terms)
    written = vector["value"]
    shapes = pack_shapes(request.logprobs.shapes)
    assert shapes.hex() == written["logprobs"]["shapes"]["$bin"]
    assert pack_shapes([*request.logprobs.shapes]) == shapes  # written anew
    assert [spec.fn for spec in terms.regularizers] == [r["fn"] for r in written["regularizers"]]
    assert (request.step, request.gradients) == (written["step"], written["gradients"])
    assert request.totals == written.get("totals")


@each([vector for vector in MESSAGES if vector["value"]["op"] == "totals"])
def test_a_request_of_totals_is_understood(vector: dict[str, Any]) -> None:
    message = unpack(bytes.fromhex(vector["hex"]))
    request, terms, written = decode_totals(message), typed(message.packed, Terms), vector["value"]
    assert len(request.data) == written["data"]["count"]
    assert request.totals == written.get("totals")
    assert terms.base_loss is not None
    assert terms.base_loss.fn == written["base_loss"]["fn"]
