"""The short form of ``make fuzz``: no frame is anything but a message or an error value."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tinker_custom_loss.errors import ProtocolError
from tinker_custom_loss.port.messagepack import pack, unpack

_spec = importlib.util.spec_from_file_location(
    "fuzz_frames", Path(__file__).parents[1] / "fuzz" / "frames.py"
)
fuzz_frames = importlib.util.module_from_spec(_spec)
sys.modules["fuzz_frames"] = fuzz_frames
_spec.loader.exec_module(fuzz_frames)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def test_mutated_and_random_frames_are_messages_or_errors():
    outcomes, spike = fuzz_frames.fuzz(20_000, seed=5)
    assert outcomes.total() == 20_000
    assert {"computable", "another message", "protocol", "request"} == set(outcomes)
    assert spike < fuzz_frames.MEMORY_LIMIT


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_bytes_are_a_message_or_a_protocol_error(frame):
    with contextlib.suppress(ProtocolError):
        unpack(frame)


@settings(max_examples=100, deadline=None)
@given(VALUES, st.data())
def test_a_message_that_is_cut_short_is_a_protocol_error(value, data):
    frame = pack({"value": value})
    cut = data.draw(st.integers(0, len(frame) - 1))
    try:
        unpack(frame[:cut])
    except ProtocolError:
        return
    raise AssertionError("a part of a message was taken for a message")
