"""MessagePack within limits, and messages as typed requests over views of their frame."""

from __future__ import annotations

import contextlib
import copy
import pickle
import struct
import threading
from typing import Literal

import msgspec
import numpy as np
import pytest
import tinker
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import port_client
from port_client import batch, compute, ragged
from tinker_custom_loss import ProtocolError, RequestError, TensorBatch
from tinker_custom_loss.port.frames import FrameReader, FrameWriter
from tinker_custom_loss.port.messagepack import pack, pack_pieces, unpack
from tinker_custom_loss.port.messages import (
    DTYPES,
    Batch,
    Data,
    Regularizer,
    Terms,
    decode_batch,
    decode_compute,
    decode_data,
)
from tinker_custom_loss.port.shapes import pack_shapes
from tinker_custom_loss.port.typed import read

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
    @given(st.dictionaries(st.text(), values))
    def test_what_is_packed_is_unpacked(self, value):
        message = unpack(pack(value))
        assert message.fields == value
        assert len(message.payload) == 0

    @settings(max_examples=20)  # large ones
    @given(st.dictionaries(st.text(), values))
    def test_pieces_joined_are_the_packed_value(self, value):
        value["batch"] = batch(torch.arange(100_000))
        assert b"".join(pack_pieces(value)) == pack(value)

    @given(st.binary(max_size=200))
    def test_junk_is_a_message_or_a_protocol_error(self, junk):
        with contextlib.suppress(ProtocolError):
            unpack(junk)

    @given(st.dictionaries(st.text(), values), st.data())
    def test_a_mutated_message_is_a_message_or_a_protocol_error(self, value, data):
        frame = bytearray(pack(value))
        for _ in range(data.draw(st.integers(1, 4))):
            frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
        with contextlib.suppress(ProtocolError):
            unpack(frame)

    @given(st.dictionaries(st.text(), values))
    def test_no_beginning_of_a_frame_is_a_message(self, value):
        frame = pack({**value, "batch": batch(torch.tensor([1]))})
        for end in range(len(frame)):
            with pytest.raises(ProtocolError):
                unpack(frame[:end])

    @pytest.mark.parametrize("tag", [b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9"])
    def test_a_length_that_the_frame_cannot_hold_is_refused(self, tag):
        with pytest.raises(ProtocolError, match="truncated"):
            unpack(b"\x81\xa1a" + tag + b"\xff\xff\xff\xff" + bytes(5))

    @pytest.mark.parametrize(
        ("value", "error"), [(object(), TypeError), (2**64, OverflowError), (1j, TypeError)]
    )
    def test_what_is_no_value_is_an_error(self, value, error):
        with pytest.raises(error):
            pack({"a": value})

    def test_a_value_of_a_class_of_its_own_is_what_it_is_derived_from(self):
        count = type("Count", (int,), {})(3)
        value = {np.str_("key"): np.float64(0.5), "version": torch.__version__, "count": count}
        written = {"key": 0.5, "version": str(torch.__version__), "count": 3}
        assert unpack(pack(value)).fields == written

    def test_a_lone_surrogate_does_not_stop_a_message(self):
        assert unpack(pack({"a": "bad \udc80 name"})).fields == {"a": "bad \\udc80 name"}

    def test_a_tensor_is_written_from_where_it_lies(self):
        tensor = torch.zeros(100_000, dtype=torch.int32)
        pieces = pack_pieces({"data": TensorBatch(tensor, ((100_000,),))})
        tensor[0] = 7
        assert [bytes(piece[:1]) for piece in pieces if len(piece) == 400_000] == [b"\x07"]


def sent(*batches):
    """The batches of a message, as they arrive: ``decode_batch`` of each."""
    message = unpack(bytearray(pack(dict(zip("abcdef", batches, strict=False)))))
    return [
        decode_batch(read(pack(value), Batch, key), message.payload, key)
        for key, value in message.fields.items()
    ]


class TestBatch:
    @pytest.mark.parametrize("name", DTYPES)
    @pytest.mark.parametrize("before", range(9))
    def test_every_dtype_goes_there_and_back_behind_any_other(self, name, before):
        tensors = [torch.tensor([1, -2]), torch.tensor([[3], [4]]), torch.empty(0)]
        tensors = [tensor.to(DTYPES[name]) for tensor in tensors]
        other = batch(torch.zeros(before, dtype=torch.float16))
        _, (flat, shapes) = sent(other, batch(*tensors))
        assert shapes == ((2,), (2, 1), (0,))
        assert flat.dtype == DTYPES[name]
        for got, tensor in zip(TensorBatch(flat, shapes).tensors(), tensors, strict=True):
            assert torch.equal(got, tensor)

    def test_a_tensor_is_a_view_of_its_frame_and_aligned(self, tmp_path):
        path = tmp_path / "frame"
        with path.open("wb", buffering=0) as file:
            FrameWriter(file.fileno()).write(pack_pieces({"a": batch(torch.tensor([1.0, 2.0]))}))
        with path.open("rb", buffering=0) as file:
            message = unpack(FrameReader(file.fileno()).read())
        flat, _ = decode_batch(read(pack(message.fields["a"]), Batch), message.payload, "a")
        assert flat.data_ptr() % 8 == 0
        flat[0] = 7.0
        assert message.payload[:4] == struct.pack("<f", 7.0)

    def test_a_frame_of_bytes_is_copied_since_torch_would_write_to_it(self):
        message = unpack(pack({"a": batch(torch.tensor([1.0]))}))
        flat, _ = decode_batch(read(pack(message.fields["a"]), Batch), message.payload, "a")
        flat[0] = 7.0
        assert message.payload == struct.pack("<f", 1.0)

    def test_a_gradient_that_is_no_contiguous_cpu_buffer_is_made_one(self):
        flat = torch.arange(6.0)[::2].requires_grad_()
        assert sent(TensorBatch(flat, ((3,),)))[0][0].tolist() == [0, 2, 4]

    @pytest.mark.parametrize("shape", [(2**31, 2**31, 4), (2**32 - 1,), (0, 2**32 - 1)])
    def test_sizes_that_overflow_claim_nothing(self, shape):
        value = Batch(data=(0, 0), dtype="float32", shapes=pack_shapes([shape]))
        if 0 in shape:
            assert decode_batch(value, memoryview(b""), "b")[1] == (shape,)
        else:
            with pytest.raises(RequestError, match=r"but `b\.data` has 0"):
                decode_batch(value, memoryview(b""), "b")

    @pytest.mark.parametrize("rank", [8, 9])
    def test_a_rank_that_no_datum_has_is_refused(self, rank):
        value = Batch(data=(0, 0), dtype="float32", shapes=pack_shapes([(0,) * rank]))
        with contextlib.nullcontext() if rank == 8 else pytest.raises(RequestError, match="most 8"):
            decode_batch(value, memoryview(b""), "b")


class _Inner(msgspec.Struct):
    weight: float
    kind: Literal["a", "b"] = "a"


class _Outer(msgspec.Struct):
    step: int | None = None
    inner: list[_Inner] = []
    name: bytes = b""


class TestTyped:
    @pytest.mark.parametrize(
        ("value", "error", "says"),
        [
            ({"step": "x"}, ProtocolError, "expected an integer or nil at `x.step`, got a string"),
            ({"name": "x"}, ProtocolError, "expected a bin at `x.name`, got a string"),
            ({"inner": {}}, ProtocolError, "expected an array at `x.inner`, got a map"),
            ({"inner": [{"weight": 1}, {"weight": None}]}, ProtocolError,
             "expected a float at `x.inner[1].weight`, got nil"),
            ({"inner": [{}]}, ProtocolError,
             'the required key "weight" is missing at `x.inner[0].weight`'),
            ({"inner": [{"weight": 1, "kind": "c"}]}, RequestError,
             "invalid enum value 'c' at `x.inner[0].kind`"),
            (7, ProtocolError, "expected a map at `x`, got an integer"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_is_said_with_its_path(self, value, error, says):
        with pytest.raises(error) as caught:
            read(msgspec.msgpack.encode(value), _Outer, "x")
        assert str(caught.value) == says
        assert f"`{caught.value.path}`" in says

    def test_an_integer_is_a_float_and_unknown_keys_are_ignored(self):
        assert read(pack({"weight": 2, "colour": "blue"}), _Inner).weight == 2.0


def request(**fields):
    return unpack(bytearray(port_client.request(compute("l2", **fields))))


class TestCompute:
    def test_defaults(self):
        decoded = decode_compute(request())
        assert (decoded.step, decoded.gradients) == (None, True)
        terms = read(request().packed, Terms)
        assert terms.base_loss is None
        assert terms.regularizers == [Regularizer(fn="l2", name="term", weight=1.0)]
        assert msgspec.structs.asdict(terms.regularizers[0]) == {
            "fn": "l2",
            "params": {},
            "reduction": None,
            "name": "term",
            "weight": 1.0,
            "run_in_executor": False,
            "timeout": None,
            "on_error": "raise",
            "on_non_finite": "raise",
            "enabled": True,
        }

    def test_bins_in_params_are_bytes_of_their_own(self):
        terms = read(request(params={"a": [b"x"], "b": {"c": b"y"}}).packed, Terms)
        assert terms.regularizers[0].params == {"a": [b"x"], "b": {"c": b"y"}}

    def test_keys_that_are_not_known_are_ignored(self):
        decode_compute(request(colour="blue"))

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
    message = unpack(bytearray(port_client.request({"count": 2, **fields})))
    return decode_data(read(message.packed, Data), message.payload, 2)


@pytest.fixture
def data():
    return wire_data(
        tokens=batch(torch.tensor([1, 2, 3]), torch.tensor([4]).long()),
        inputs={
            "weights": batch(torch.tensor([1.0, 0.5]), torch.tensor([2.0])),
            "target_tokens": batch(
                torch.tensor([[5, 6]], dtype=torch.int32), torch.tensor([7], dtype=torch.int32)
            ),
            "some": ragged(torch.ones(1).half(), None, (1,)),
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
        assert repr(data) == ("WireData(2 datums, loss_fn_inputs: weights, target_tokens, some)")
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
        data = decode_data(None, memoryview(b""), 3)
        assert len(data) == 3
        assert data[2].model_input == tinker.ModelInput.empty()
        assert data[2].loss_fn_inputs == {}

    def test_chunks_of_every_kind(self):
        image = {"type": "image", "data": b"png", "format": "png", "expected_tokens": 3}
        pointer = {"type": "image_asset_pointer", "location": "a/b", "format": "jpeg"}
        text = {"type": "encoded_text", "tokens": batch(torch.tensor([1, 2]))}
        first, second = wire_data(
            tokens=ragged(torch.tensor([0]), None, (1,)),
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
