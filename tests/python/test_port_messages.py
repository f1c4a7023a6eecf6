"""MessagePack within limits, and messages as typed requests over views of their frame."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import threading

import msgpack
import numpy as np
import pytest
import tinker
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from port_client import batch, compute
from tinker_custom_loss import ProtocolError, RequestError, TensorBatch
from tinker_custom_loss.port.messagepack import MAX_VALUES, pack, pack_pieces, unpack
from tinker_custom_loss.port.messages import (
    DTYPES,
    decode_batch,
    decode_compute,
    decode_data,
    decode_terms,
    encode_batch,
)

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


class TestMessagePack:
    @given(values)
    def test_what_is_packed_is_unpacked(self, value):
        assert unpack(pack(value)) == value

    @given(values)
    def test_it_agrees_with_the_reference_implementation(self, value):
        assert msgpack.unpackb(pack(value)) == value
        assert unpack(msgpack.packb(value)) == value

    @settings(max_examples=20)  # large ones
    @given(st.dictionaries(st.text(), values))
    def test_pieces_joined_are_the_packed_value(self, value):
        value["large"] = bytes(70_000)
        value["inner"] = {"array": [1, {"too": bytearray(65_536)}], "small": b"x" * 65_535}
        assert b"".join(pack_pieces(value)) == pack(value)

    @given(st.binary(max_size=200))
    def test_junk_is_a_value_or_a_protocol_error(self, junk):
        with contextlib.suppress(ProtocolError):
            unpack(junk)

    @given(values, st.data())
    def test_a_mutated_value_is_a_value_or_a_protocol_error(self, value, data):
        frame = bytearray(pack(value))
        for _ in range(data.draw(st.integers(1, 4))):
            frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
        with contextlib.suppress(ProtocolError):
            unpack(frame)

    @given(values)
    def test_no_beginning_of_a_value_is_a_value(self, value):
        frame = pack(value)
        for end in range(len(frame)):
            with pytest.raises(ProtocolError):
                unpack(frame[:end])

    @pytest.mark.parametrize(
        ("value", "frame"),
        [
            ({"b": 1, "a": {"d": 2, "c": 3}}, b"\x82\xa1a\x82\xa1c\x03\xa1d\x02\xa1b\x01"),
            ({"é": 1, "z": 2}, b"\x82\xa1z\x02\xa2\xc3\xa9\x01"),
            (1.0, b"\xcb\x3f\xf0\x00\x00\x00\x00\x00\x00"),
            ([127, 128, -32, -33, 65536], b"\x95\x7f\xcc\x80\xe0\xd0\xdf\xce\x00\x01\x00\x00"),
            ("x" * 32, b"\xd9\x20" + b"x" * 32),
            (b"ab", b"\xc4\x02ab"),
        ],
    )
    def test_the_canonical_form(self, value, frame):
        assert pack(value) == frame

    @pytest.mark.parametrize(
        ("frame", "value"),
        [
            (b"\xca\x3f\x80\x00\x00", 1.0),
            (b"\xd3" + b"\xff" * 8, -1),
            (b"\xda\x00\x01x", "x"),
            (b"\xdb\x00\x00\x00\x01x", "x"),
            (b"\xc6\x00\x00\x00\x01x", b"x"),
            (b"\xdd\x00\x00\x00\x01\xc0", [None]),
            (b"\xdf\x00\x00\x00\x01\xa1a\xc3", {"a": True}),
            (b"\xd4\x05x", msgpack.ExtType(5, b"x")),
            (b"\xc7\x00\x05", msgpack.ExtType(5, b"")),
            (b"\xd6\xff\x00\x00\x00\x01", msgpack.Timestamp(1, 0)),
            (b"\xd4\xfe\x07", (-2, b"\x07")),
        ],
    )
    def test_every_format_is_read(self, frame, value):
        assert unpack(frame) == value

    def test_non_finite_floats_are_legal(self):
        assert unpack(pack([math.inf, -math.inf])) == [math.inf, -math.inf]
        assert math.isnan(unpack(pack(math.nan)))

    @pytest.mark.parametrize("depth", [64, 65])
    def test_nesting_is_bounded_on_both_ways(self, depth):
        frame = b"\x91" * depth + b"\x01"
        if depth == 64:
            assert pack(unpack(frame)) == frame
            return
        with pytest.raises(ProtocolError, match="nested deeper than 64"):
            unpack(frame)
        with pytest.raises(ValueError, match="nested deeper than 64"):
            pack(msgpack.unpackb(frame))

    @pytest.mark.parametrize("tag", [b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9"])
    def test_a_length_that_the_frame_cannot_hold_is_refused(self, tag):
        with pytest.raises(ProtocolError, match="cut short"):
            unpack(tag + b"\xff\xff\xff\xff" + bytes(5))

    def test_the_number_of_values_is_bounded(self):
        with pytest.raises(ProtocolError, match="more than 1048576 values"):
            unpack(b"\xdd" + (MAX_VALUES + 1).to_bytes(4, "big") + b"\x90" * (MAX_VALUES + 1))

    def test_a_key_twice_is_refused(self):
        with pytest.raises(ProtocolError, match="a key twice"):
            unpack(b"\x82\xa1a\x01\xa1a\x02")

    @pytest.mark.parametrize("value", [{1: 2}, {"a": object()}, object()])
    def test_what_is_no_value_is_a_type_error(self, value):
        with pytest.raises(TypeError):
            pack(value)

    def test_an_integer_over_64_bits_is_a_value_error(self):
        with pytest.raises(ValueError, match="64 bits"):
            pack({"a": 2**64})

    def test_a_lone_surrogate_does_not_stop_a_message(self):
        assert unpack(pack("bad \udc80 name")) == "bad \\udc80 name"

    def test_a_large_bin_is_written_from_where_it_lies(self):
        tensor = bytearray(100_000)
        pieces = pack_pieces({"data": tensor})
        tensor[0] = 7
        assert [bytes(piece[:1]) for piece in pieces if len(piece) == 100_000] == [b"\x07"]


class TestBatch:
    @pytest.mark.parametrize("name", DTYPES)
    @pytest.mark.parametrize("offset", range(9))
    def test_every_dtype_goes_there_and_back_at_any_alignment(self, name, offset):
        tensors = [torch.tensor([1, -2]), torch.tensor([[3], [4]]), torch.empty(0)]
        tensors = [tensor.to(DTYPES[name]) for tensor in tensors]
        message = {"a": "x" * offset, "b": encode_batch(TensorBatch.from_tensors(tensors))}
        frame = bytearray(b"".join(pack_pieces(message)))
        flat, shapes = decode_batch(unpack(frame)["b"], "b")
        assert shapes == ((2,), (2, 1), (0,))
        assert flat.dtype == DTYPES[name]
        for got, sent in zip(TensorBatch(flat, shapes).tensors(), tensors, strict=True):
            assert torch.equal(got, sent)

    def test_a_tensor_is_a_view_of_its_frame(self):
        frame = bytearray(pack(batch(torch.tensor([1.0, 2.0]))))
        flat, _ = decode_batch(unpack(frame), "b")
        flat[0] = 7.0
        assert decode_batch(unpack(frame), "b")[0].tolist() == [7.0, 2.0]

    def test_a_frame_of_bytes_is_copied_since_torch_would_write_to_it(self):
        frame = pack(batch(torch.tensor([1.0])))
        flat, _ = decode_batch(unpack(frame), "b")
        flat[0] = 7.0
        assert decode_batch(unpack(frame), "b")[0].tolist() == [1.0]

    def test_a_gradient_that_is_no_contiguous_cpu_buffer_is_made_one(self):
        flat = torch.arange(6.0)[::2].requires_grad_()
        assert decode_batch(encode_batch(TensorBatch(flat, ((3,),))), "")[0].tolist() == [0, 2, 4]

    @pytest.mark.parametrize("shape", [[2**62, 4], [2**64 - 1], [0, 2**60]])
    def test_sizes_that_overflow_claim_nothing(self, shape):
        value = {"dtype": "float32", "shapes": [shape], "data": memoryview(b"")}
        if 0 in shape:
            assert decode_batch(value, "b")[1] == (tuple(shape),)
        else:
            with pytest.raises(RequestError, match=r"but `b\.data` has 0"):
                decode_batch(value, "b")


def request(**fields):
    return unpack(bytearray(pack(compute("l2", **fields))))


class TestCompute:
    def test_defaults(self):
        decoded = decode_compute(request())
        assert (decoded.step, decoded.gradients) == (0, True)
        base_loss, (term,) = decode_terms(request())
        assert base_loss is None
        assert (term.fn, term.params) == ("l2", {})
        assert term.options == {
            "name": "term",
            "weight": 1.0,
            "run_in_executor": False,
            "timeout": None,
            "on_error": "raise",
            "on_non_finite": "raise",
            "enabled": True,
        }

    def test_bins_in_params_are_bytes_of_their_own(self):
        _, (term,) = decode_terms(request(params={"a": [b"x"], "b": {"c": b"y"}}))
        params = term.params
        assert params == {"a": [b"x"], "b": {"c": b"y"}}
        assert type(params["a"][0]) is type(params["b"]["c"]) is bytes

    def test_keys_that_are_not_known_are_ignored(self):
        decode_compute({**request(), "colour": "blue"})

    @pytest.mark.parametrize(
        ("chunk", "error", "path"),
        [
            (7, ProtocolError, "data.chunks[0][0]"),
            ({}, ProtocolError, "data.chunks[0][0].type"),
            ({"type": "video"}, RequestError, "data.chunks[0][0].type"),
            ({"type": "encoded_text"}, ProtocolError, "data.chunks[0][0].tokens"),
            (
                {"type": "encoded_text", "tokens": batch(torch.tensor([1.0]))},
                RequestError,
                "data.chunks[0][0].tokens.dtype",
            ),
            (
                {"type": "image", "data": b"", "format": "gif"},
                RequestError,
                "data.chunks[0][0].format",
            ),
        ],
    )
    def test_a_bad_chunk(self, chunk, error, path):
        with pytest.raises(error) as caught:
            decode_compute(request(data={"count": 1, "chunks": [[chunk]]}))
        assert caught.value.path == path
        assert f"`{path}`" in str(caught.value)


def wire_data(**fields):
    return decode_data(unpack(bytearray(pack({"count": 2, **fields}))), 2)


@pytest.fixture
def data():
    return wire_data(
        tokens=batch(torch.tensor([1, 2, 3]), torch.tensor([4]).long()),
        inputs={
            "weights": batch(torch.tensor([1.0, 0.5]), torch.tensor([2.0])),
            "target_tokens": batch(
                torch.tensor([[5, 6]], dtype=torch.int32), torch.tensor([7], dtype=torch.int32)
            ),
            "some": {"dtype": "float16", "shapes": [None, [1]], "data": b"\x00\x3c"},
        },
    )


class TestData:
    def test_datums_are_what_the_sdk_would_have_built(self, data):
        first, second = data
        assert isinstance(first, tinker.Datum)
        assert first.model_input == tinker.ModelInput.from_ints([1, 2, 3])
        assert second.model_input.to_ints() == [4]
        assert first.loss_fn_inputs["weights"].dtype == "float32"
        assert first.loss_fn_inputs["weights"].data == [1.0, 0.5]
        assert first.loss_fn_inputs["target_tokens"].dtype == "int64"
        assert first.loss_fn_inputs["target_tokens"].shape == [1, 2]
        assert torch.equal(second.loss_fn_inputs["target_tokens"].to_torch(), torch.tensor([7]))
        assert "some" not in first.loss_fn_inputs
        assert second.loss_fn_inputs["some"].data == [1.0]

    def test_a_column_is_a_view_and_builds_no_datum(self, data):
        weights = data.column("weights")
        assert weights.shapes == ((2,), (1,))
        assert data._built is None
        weights.flat[0] = 9.0
        assert data[0].loss_fn_inputs["weights"].data == [9.0, 0.5]

    def test_a_column_has_the_type_that_the_datums_show(self, data):
        assert data.column("target_tokens").flat.dtype == torch.int64

    def test_a_column_that_not_every_datum_has_is_none(self, data):
        assert data.column("some") is None
        assert data.column("nothing") is None

    def test_it_is_used_like_a_list(self, data):
        plain = list(data)
        assert len(data) == 2
        assert data == plain
        assert plain == data
        assert data != plain[:1]
        assert data[-1] is plain[1]
        assert data[:1] == plain[:1]
        assert data + plain == plain + data == plain * 2
        assert plain[0] in data
        assert data.index(plain[1]) == 1
        assert [*reversed(data)] == plain[::-1]
        assert type(data.copy()) is list
        with pytest.raises(IndexError):
            data[2]

    def test_it_shows_no_numbers(self, data):
        assert repr(data) == ("WireData(2 datums, loss_fn_inputs: some, target_tokens, weights)")
        assert data._built is None

    def test_it_pickles_and_copies_as_a_plain_list(self, data):
        for there in (pickle.loads(pickle.dumps(data)), copy.deepcopy(data)):
            assert type(there) is list
            assert there[0].model_input == data[0].model_input

    def test_threads_that_touch_it_at_once_see_the_same_datums(self, data):
        seen: list[object] = []
        threads = [threading.Thread(target=lambda: seen.append(data[0])) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(seen) == 8
        assert len(set(map(id, seen))) == 1

    def test_without_data_the_datums_are_empty(self):
        data = decode_data(None, 3)
        assert len(data) == 3
        assert data[2].model_input == tinker.ModelInput.empty()
        assert data[2].loss_fn_inputs == {}

    def test_chunks_of_every_kind(self):
        image = {"type": "image", "data": b"png", "format": "png", "expected_tokens": 3}
        pointer = {"type": "image_asset_pointer", "location": "a/b", "format": "jpeg"}
        text = {"type": "encoded_text", "tokens": batch(torch.tensor([1, 2]))}
        first, second = wire_data(
            tokens={"dtype": "int64", "shapes": [None, [1]], "data": bytes(8)},
            chunks=[[text, image, pointer], None],
        )
        assert [type(chunk).__name__ for chunk in first.model_input.chunks] == [
            "EncodedTextChunk",
            "ImageChunk",
            "ImageAssetPointerChunk",
        ]
        assert first.model_input.chunks[0].tokens == [1, 2]
        assert first.model_input.chunks[1].data == b"png"
        assert first.model_input.chunks[1].expected_tokens == 3
        assert first.model_input.chunks[2].location == "a/b"
        assert second.model_input.to_ints() == [0]

    def test_numpy_sees_the_frame_too(self, data):
        array = data[0].loss_fn_inputs["weights"].to_numpy()
        assert isinstance(array, np.ndarray)
        assert array.base is not None
