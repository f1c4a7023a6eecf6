"""Messages: MessagePack maps to typed requests, and tensors to batches. See docs/protocol.md.

What is missing or of the wrong type is the other implementation's mistake, a ProtocolError; sizes,
dtypes and counts that do not fit together are the caller's, a RequestError. Both carry the path of
the place, such as ``regularizers[1].weight``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack
import torch

from ..errors import ProtocolError, RequestError
from ..tensors.batch import Shape, TensorBatch
from .data import Column, WireData
from .messagepack import pack, pack_pieces, unpack

__all__ = [
    "DTYPES",
    "ComputeRequest",
    "TermSpec",
    "decode_batch",
    "decode_compute",
    "decode_data",
    "decode_terms",
    "encode_batch",
    "get",
    "name_of",
    "pack",
    "pack_pieces",
    "unpack",
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
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_NAMES: dict[type, str] = {
    type(None): "nil",
    bool: "a bool",
    int: "an integer",
    float: "a float",
    str: "a string",
    memoryview: "a bin",
    list: "an array",
    dict: "a map",
    msgpack.ExtType: "an ext",
    msgpack.Timestamp: "a timestamp",
}
_REQUIRED: Any = object()
_MAX_RANK = 8


@dataclass(frozen=True)
class TermSpec:
    """A base loss or regularizer as a request names it; ``fn`` is a name still.

    ``options`` are further keyword arguments of :class:`~tinker_custom_loss.Regularizer`.
    """

    fn: str
    params: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ComputeRequest:
    """A ``compute`` message, but for its terms."""

    logprobs: TensorBatch
    data: WireData
    step: int
    gradients: bool


def get(
    message: Mapping[str, Any],
    key: str,
    expected: tuple[type, ...],
    path: str = "",
    default: Any = _REQUIRED,
) -> Any:
    """``message[key]``, which must be of an expected type; ``path`` is where ``message`` is.

    A float may be written as an integer. nil stands for a key that is not there, where that has
    a default.

    Raises:
        ProtocolError: it is missing, or of another type.
    """
    where = f"{path}.{key}" if path else key
    value = message.get(key, default)
    if value is _REQUIRED:
        raise ProtocolError(f'the required key "{key}" is missing at `{where}`', path=where)
    if value is None and default is not _REQUIRED:
        return default
    if type(value) in expected:
        return value
    if type(value) is int and float in expected:
        return float(value)
    raise _unexpected(value, " or ".join(_NAMES[kind] for kind in expected), where)


def decode_compute(message: Mapping[str, Any]) -> ComputeRequest:
    """A ``compute`` message, but for its terms; its tensors are views of the frame.

    Raises:
        ProtocolError, RequestError: see the module.
    """
    flat, shapes = decode_batch(get(message, "logprobs", (dict,)), "logprobs")
    for index, shape in enumerate(shapes):
        if shape is None or len(shape) not in (1, 2):
            raise RequestError(
                f"expected sizes [T] or [T,K] at `logprobs.shapes[{index}]`, got "
                f"{'nil' if shape is None else list(shape)}",
                path=f"logprobs.shapes[{index}]",
            )
    if not flat.is_floating_point():
        raise RequestError(
            f'expected a float dtype at `logprobs.dtype`, got "{_DTYPE_NAMES[flat.dtype]}"',
            path="logprobs.dtype",
        )
    return ComputeRequest(
        logprobs=TensorBatch(flat, tuple(shape for shape in shapes if shape is not None)),
        data=decode_data(get(message, "data", (dict,), default=None), len(shapes)),
        step=get(message, "step", (int,), default=0),
        gradients=get(message, "gradients", (bool,), default=True),
    )


def decode_terms(message: Mapping[str, Any]) -> tuple[TermSpec | None, list[TermSpec]]:
    """The base loss and the regularizers of a ``compute`` message.

    Raises:
        ProtocolError: see the module.
    """
    base = get(message, "base_loss", (dict,), default=None)
    regularizers = get(message, "regularizers", (list,))
    return (
        None if base is None else _base_loss(base),
        [_regularizer(spec, f"regularizers[{index}]") for index, spec in enumerate(regularizers)],
    )


def decode_batch(
    batch: Mapping[str, Any], path: str
) -> tuple[torch.Tensor, tuple[Shape | None, ...]]:
    """A batch, as one flat tensor that is a view of its frame, and the shape a datum.

    Raises:
        ProtocolError, RequestError: see the module.
    """
    name = get(batch, "dtype", (str,), path)
    dtype = DTYPES.get(name)
    if dtype is None:
        raise RequestError(
            f'unknown dtype "{name}" at `{path}.dtype`; expected one of {", ".join(DTYPES)}',
            path=f"{path}.dtype",
        )
    shapes = tuple(
        _shape(shape, f"{path}.shapes", index)
        for index, shape in enumerate(get(batch, "shapes", (list,), path))
    )
    data: memoryview = get(batch, "data", (memoryview,), path)
    count = sum(math.prod(shape) for shape in shapes if shape is not None)
    if len(data) != count * dtype.itemsize:
        raise RequestError(
            f"the {len(shapes)} shapes at `{path}.shapes` hold {count} values of {name}, which is "
            f"{count * dtype.itemsize} bytes, but `{path}.data` has {len(data)}",
            path=f"{path}.data",
        )
    if not count:
        return torch.empty(0, dtype=dtype, device="cpu"), shapes
    if data.readonly:  # bytes, not a frame that was read into memory of its own
        data = memoryview(bytearray(data))
    return torch.frombuffer(data, dtype=dtype), shapes


def encode_batch(batch: TensorBatch) -> dict[str, Any]:
    """A batch as a value to pack; ``data`` is a view of its memory, if that is a CPU's."""
    flat = batch.flat.detach().cpu().contiguous()
    return {
        "dtype": _DTYPE_NAMES[flat.dtype],
        "shapes": [list(shape) for shape in batch.shapes],
        "data": flat.view(torch.uint8).numpy().data,
    }


def decode_data(data: Mapping[str, Any] | None, count: int) -> WireData:
    """The datums of a message, one for each of ``count`` tensors; without data, empty ones.

    Raises:
        ProtocolError, RequestError: see the module.
    """
    if data is None:
        return WireData(count, {})
    announced = get(data, "count", (int,), "data")
    if announced != count:
        raise RequestError(
            f"`data.count` is {announced}, but there are {count} logprob tensors; expected one "
            "tensor a datum",
            path="data.count",
        )
    inputs = {}
    for key, batch in get(data, "inputs", (dict,), "data", default={}).items():
        where = f"data.inputs.{key}"
        if not isinstance(batch, dict):
            raise _unexpected(batch, "a map", where)
        inputs[key] = _column(batch, count, where)
    tokens = get(data, "tokens", (dict,), "data", default=None)
    ids = None if tokens is None else _column(tokens, count, "data.tokens")
    if ids is not None:
        _check_ids(ids, "data.tokens")
    return WireData(count, inputs, ids, _chunks(data, count))


def _column(batch: Mapping[str, Any], count: int, path: str) -> Column:
    column = Column(*decode_batch(batch, path))
    if len(column.shapes) != count:
        raise RequestError(
            f"`{path}.shapes` has {len(column.shapes)} entries for {count} datums; expected one "
            "a datum, nil where a datum has no such tensor",
            path=f"{path}.shapes",
        )
    return column


def _check_ids(column: Column, path: str) -> None:
    if column.flat.is_floating_point():
        raise RequestError(
            f'expected an integer dtype at `{path}.dtype`, got "{_DTYPE_NAMES[column.flat.dtype]}"',
            path=f"{path}.dtype",
        )
    for index, shape in enumerate(column.shapes):
        if shape is not None and len(shape) != 1:
            raise RequestError(
                f"expected one size at `{path}.shapes[{index}]`, got {list(shape)}",
                path=f"{path}.shapes[{index}]",
            )


def _chunks(data: Mapping[str, Any], count: int) -> list[list[dict[str, Any]] | None] | None:
    entries = get(data, "chunks", (list,), "data", default=None)
    if entries is None:
        return None
    if len(entries) != count:
        raise RequestError(
            f"`data.chunks` has {len(entries)} entries for {count} datums; expected one a datum, "
            "nil where `data.tokens` has it",
            path="data.chunks",
        )
    result: list[list[dict[str, Any]] | None] = []
    for index, entry in enumerate(entries):
        where = f"data.chunks[{index}]"
        if entry is not None and not isinstance(entry, list):
            raise _unexpected(entry, "an array or nil", where)
        result.append(
            None if entry is None else [_chunk(c, f"{where}[{i}]") for i, c in enumerate(entry)]
        )
    return result


def _chunk(chunk: object, path: str) -> dict[str, Any]:
    """The keyword arguments of a model input's chunk."""
    if not isinstance(chunk, dict):
        raise _unexpected(chunk, "a map", path)
    kind = get(chunk, "type", (str,), path)
    if kind == "encoded_text":
        where = f"{path}.tokens"
        ids = _column(get(chunk, "tokens", (dict,), path), 1, where)
        _check_ids(ids, where)
        return {"type": kind, "tokens": ids.flat.tolist()}
    if kind == "image":
        own = {"data": bytes(get(chunk, "data", (memoryview,), path))}
    elif kind == "image_asset_pointer":
        own = {"location": get(chunk, "location", (str,), path)}
    else:
        raise _unknown("type", kind, "encoded_text, image, image_asset_pointer", path)
    image_format = get(chunk, "format", (str,), path)
    if image_format not in ("png", "jpeg"):
        raise _unknown("format", image_format, "png, jpeg", path)
    expected_tokens = get(chunk, "expected_tokens", (int,), path, default=None)
    return {"type": kind, "format": image_format, "expected_tokens": expected_tokens, **own}


def _base_loss(spec: Mapping[str, Any]) -> TermSpec:
    return TermSpec(get(spec, "fn", (str,), "base_loss"), _params(spec, "base_loss"))


def _regularizer(spec: object, path: str) -> TermSpec:
    if not isinstance(spec, dict):
        raise _unexpected(spec, "a map", path)
    options = {
        "name": get(spec, "name", (str,), path),
        "weight": get(spec, "weight", (float,), path),
        "run_in_executor": get(spec, "run_in_executor", (bool, str), path, default=False),
        "timeout": get(spec, "timeout", (float,), path, default=None),
        "on_error": get(spec, "on_error", (str,), path, default="raise"),
        "on_non_finite": get(spec, "on_non_finite", (str,), path, default="raise"),
        "enabled": get(spec, "enabled", (bool,), path, default=True),
    }
    return TermSpec(get(spec, "fn", (str,), path), _params(spec, path), options)


def _params(spec: Mapping[str, Any], path: str) -> dict[str, Any]:
    params: dict[str, Any] = _owned(get(spec, "params", (dict,), path, default={}))
    return params


def _owned(value: Any) -> Any:
    """A value that a function may keep: views of the frame become bytes."""
    if isinstance(value, memoryview):
        return bytes(value)
    if isinstance(value, dict):
        return {key: _owned(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_owned(inner) for inner in value]
    return value


def _shape(value: object, path: str, index: int) -> Shape | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise _unexpected(value, "an array of sizes or nil", f"{path}[{index}]")
    for size in value:
        if type(size) is not int or size < 0:
            raise ProtocolError(
                f"expected sizes, integers of at least 0, at `{path}[{index}]`, got {value}",
                path=f"{path}[{index}]",
            )
    if len(value) > _MAX_RANK:
        raise RequestError(
            f"expected at most {_MAX_RANK} sizes at `{path}[{index}]`, got {len(value)}",
            path=f"{path}[{index}]",
        )
    return tuple(value)


def _unknown(key: str, value: str, known: str, path: str) -> RequestError:
    where = f"{path}.{key}"
    return RequestError(f'unknown {key} "{value}" at `{where}`; expected {known}', path=where)


def name_of(value: object) -> str:
    """What a decoded value is in MessagePack: "a string", "an array" and so on."""
    return _NAMES.get(type(value), type(value).__name__)


def _unexpected(value: object, expected: str, path: str) -> ProtocolError:
    return ProtocolError(f"expected {expected} at `{path}`, got {name_of(value)}", path=path)
