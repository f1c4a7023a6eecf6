"""Messages from the host as typed requests, over views of their frame. See docs/protocol.md.

What is missing or of the wrong type is the other implementation's mistake, a ProtocolError; sizes,
dtypes and counts that do not fit together are the caller's, a RequestError. Both carry the path of
the place, such as ``regularizers[1].weight``.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec import Meta, Raw, Struct

from ..errors import ProtocolError, RequestError
from ..tensors.batch import TensorBatch
from ..wording import counted
from .data import Column, WireData, whole_batch
from .messagepack import Message
from .shapes import Shapes, read_shapes
from .typed import read

__all__ = [
    "DTYPES",
    "Batch",
    "ComputeRequest",
    "Data",
    "Regularizer",
    "Term",
    "Terms",
    "TotalsRequest",
    "decode_batch",
    "decode_compute",
    "decode_data",
    "decode_totals",
]

if sys.byteorder != "little":
    raise ImportError("the port's tensors are little-endian and are not converted on this machine")

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
}

_RANKS_OF_LOGPROBS = {1, 2}

_Size = Annotated[int, Meta(ge=0)]


class Batch(Struct):
    """``data`` is where in the payload the bytes begin, and how many they are."""

    data: tuple[_Size, _Size]
    dtype: str
    shapes: bytes


class _Text(Struct, tag_field="type", tag="encoded_text"):
    tokens: Batch


class _Image(Struct, tag_field="type", tag="image"):
    data: bytes
    format: Literal["png", "jpeg"]
    expected_tokens: int | None = None


class _ImagePointer(Struct, tag_field="type", tag="image_asset_pointer"):
    location: str
    format: Literal["png", "jpeg"]
    expected_tokens: int | None = None


_Chunk = _Text | _Image | _ImagePointer


class Data(Struct):
    """``inputs`` has batches, which are read under their names."""

    count: int
    inputs: dict[str, Raw] = {}
    tokens: Batch | None = None
    chunks: list[list[_Chunk] | None] | None = None


class Term(Struct):
    """A base loss: ``fn`` is a name still."""

    fn: str
    params: dict[str, Any] = {}
    reduction: str | None = None


class Regularizer(Term, kw_only=True):
    """The further keys are keyword arguments of :class:`tinker_custom_loss.Regularizer`."""

    weight: float
    name: str | None = None
    run_in_executor: bool | str = False
    timeout: float | None = None
    on_error: str = "raise"
    on_non_finite: str = "raise"
    enabled: bool = True


class Terms(Struct):
    """The part of a ``compute`` message that a training loop repeats at every step."""

    regularizers: list[Regularizer]
    base_loss: Term | None = None


class _OfTerms(Struct, kw_only=True):
    """A message with :class:`Terms`, which are left as they are."""

    regularizers: Raw
    base_loss: Raw = Raw(b"\xc0")
    totals: dict[str, Any] | None = None

    @property
    def terms(self) -> bytes:
        """The same bytes for the same terms, and for no others."""
        return bytes(self.regularizers) + bytes(self.base_loss)


class _Compute(_OfTerms):
    logprobs: Batch
    data: Data | None = None
    step: int | None = None
    gradients: bool = True


class _Totals(_OfTerms):
    data: Data


class ComputeRequest(Struct, frozen=True):
    """A ``compute`` message. Its ``terms`` are bytes, which are the same for the same terms."""

    terms: bytes
    logprobs: TensorBatch
    data: WireData
    step: int | None
    gradients: bool
    totals: dict[str, Any] | None


class TotalsRequest(Struct, frozen=True):
    """A ``totals`` message. Its ``terms`` are bytes, which are the same for the same terms."""

    terms: bytes
    data: WireData
    totals: dict[str, Any] | None


def decode_totals(message: Message) -> TotalsRequest:
    """A ``totals`` message.

    Raises:
        ProtocolError, RequestError: see the module.
    """
    request = read(message.packed, _Totals)
    data = decode_data(request.data, message.payload, request.data.count)
    return TotalsRequest(request.terms, data, request.totals)


def decode_compute(message: Message) -> ComputeRequest:
    """A ``compute`` message; its tensors are views of the payload.

    Raises:
        ProtocolError, RequestError: see the module.
    """
    request = read(message.packed, _Compute)
    flat, shapes = decode_batch(request.logprobs, message.payload, "logprobs")
    logprobs = whole_batch(flat, shapes)
    if not (shapes.whole and _RANKS_OF_LOGPROBS.issuperset(map(len, logprobs.shapes))):
        raise _wrong_shape(shapes)
    if not flat.is_floating_point():
        raise _wrong_dtype("a float", request.logprobs, "logprobs")
    return ComputeRequest(
        request.terms,
        logprobs,
        decode_data(request.data, message.payload, len(shapes)),
        request.step,
        request.gradients,
        request.totals,
    )


def _wrong_shape(shapes: Shapes) -> RequestError:
    index, shape = next(
        (index, shape)
        for index, shape in enumerate(shapes)
        if shape is None or len(shape) not in _RANKS_OF_LOGPROBS
    )
    return RequestError(
        f"expected sizes [T] or [T,K] at `logprobs.shapes[{index}]`, got "
        f"{'nil' if shape is None else list(shape)}",
        path=f"logprobs.shapes[{index}]",
    )


def decode_batch(batch: Batch, payload: memoryview, path: str) -> tuple[torch.Tensor, Shapes]:
    """A batch, as one flat tensor that is a view of the payload, and the shape a datum.

    Raises:
        ProtocolError, RequestError: see the module.
    """
    dtype = DTYPES.get(batch.dtype)
    if dtype is None:
        raise RequestError(
            f'unknown dtype "{batch.dtype}" at `{path}.dtype`; expected one of {", ".join(DTYPES)}',
            path=f"{path}.dtype",
        )
    shapes = read_shapes(batch.shapes, f"{path}.shapes")
    count = sum(shapes.sizes)
    at, size = batch.data
    if size != count * dtype.itemsize:
        raise RequestError(
            f"the {len(shapes)} shapes at `{path}.shapes` hold {count} values of {batch.dtype}, "
            f"which is {count * dtype.itemsize} bytes, but `{path}.data` has {size}",
            path=f"{path}.data",
        )
    if at + size > len(payload):
        raise ProtocolError(
            f"the {size} bytes from {at} on at `{path}.data` do not lie in the payload, which has "
            f"{len(payload)}",
            path=f"{path}.data",
        )
    if not count:
        return torch.empty(0, dtype=dtype, device="cpu"), shapes
    data = payload[at : at + size]
    if data.readonly:  # bytes, not a frame that was read into memory of its own
        data = memoryview(bytearray(data))
    return torch.frombuffer(data, dtype=dtype), shapes


def decode_data(data: Data | None, payload: memoryview, count: int) -> WireData:
    """The datums of a message, one for each of ``count`` tensors; without data, empty ones.

    Raises:
        ProtocolError, RequestError: see the module.
    """
    if data is None:
        return WireData(count, {})
    if data.count != count:
        raise RequestError(
            f"`data.count` is {data.count}, but there are logprobs of {count}; expected one "
            "tensor a datum",
            path="data.count",
        )
    inputs = {}
    for key, value in data.inputs.items():
        path = f"data.inputs.{key}"
        inputs[key] = _column(read(value, Batch, path), payload, count, path)
    tokens = None
    if data.tokens is not None:
        tokens = _tokens(data.tokens, payload, count, "data.tokens")
    return WireData(count, inputs, tokens, _chunks(data.chunks, payload, count))


def _column(batch: Batch, payload: memoryview, count: int, path: str) -> Column:
    column = Column(*decode_batch(batch, payload, path))
    if len(column.shapes) != count:
        raise RequestError(
            f"`{path}.shapes` has {counted(len(column.shapes), 'entry', 'entries')} for "
            f"{counted(count, 'datum')}; expected one a datum, nil where a datum has "
            "no such tensor",
            path=f"{path}.shapes",
        )
    return column


def _tokens(batch: Batch, payload: memoryview, count: int, path: str) -> Column:
    column = _column(batch, payload, count, path)
    if column.flat.is_floating_point():
        raise _wrong_dtype("an integer", batch, path)
    for index, shape in enumerate(column.shapes):
        if shape is not None and len(shape) != 1:
            raise RequestError(
                f"expected one size at `{path}.shapes[{index}]`, got {list(shape)}",
                path=f"{path}.shapes[{index}]",
            )
    return column


def _chunks(
    chunks: list[list[_Chunk] | None] | None, payload: memoryview, count: int
) -> list[list[dict[str, Any]] | None] | None:
    """The keyword arguments of each chunk of a model input."""
    if chunks is None:
        return None
    if len(chunks) != count:
        raise RequestError(
            f"`data.chunks` has {counted(len(chunks), 'entry', 'entries')} for "
            f"{counted(count, 'datum')}; expected one a datum, "
            "nil where `data.tokens` has it",
            path="data.chunks",
        )

    def arguments(chunk: _Chunk, path: str) -> dict[str, Any]:
        own = {"type": chunk.__struct_config__.tag, **msgspec.structs.asdict(chunk)}
        if isinstance(chunk, _Text):
            own["tokens"] = _tokens(chunk.tokens, payload, 1, f"{path}.tokens").flat.tolist()
        return own

    return [
        None
        if entry is None
        else [arguments(chunk, f"data.chunks[{index}][{i}]") for i, chunk in enumerate(entry)]
        for index, entry in enumerate(chunks)
    ]


def _wrong_dtype(expected: str, batch: Batch, path: str) -> RequestError:
    return RequestError(
        f'expected {expected} dtype at `{path}.dtype`, got "{batch.dtype}"', path=f"{path}.dtype"
    )
