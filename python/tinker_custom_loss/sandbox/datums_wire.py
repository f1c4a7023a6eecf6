"""A datum and its tensors, out of protobuf and out of JSON."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tinker.proto import tinker_public_pb2 as pb
from torch import Tensor

from ..errors import RequestError
from .examples import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["RawDatum", "expect", "json_datum", "json_tensor", "json_tokens", "protobuf_datum"]

RawDatum = tuple[Tensor, dict[str, Tensor]]  # tokens [T] int64, loss_fn_inputs


# Protobuf


def protobuf_datum(datum: pb.Datum, path: str) -> RawDatum:
    tokens = []
    for chunk in datum.model_input:
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise _not_text(kind, f"{path}.model_input")
        tokens.append(np.frombuffer(chunk.encoded_text.tokens, dtype=np.int32))
    inputs = {
        name: _protobuf_tensor(tensor, f'{path}.loss_fn_inputs["{name}"]')
        for name, tensor in datum.loss_fn_inputs.items()
        if name in ("target_tokens", *COLUMNS)
    }
    return _tokens(tokens), inputs


_PROTOBUF_DTYPES: dict[int, type[np.generic]] = {
    pb.DTYPE_FLOAT32: np.float32,
    pb.DTYPE_INT64: np.int64,
    pb.DTYPE_INT32: np.int32,
}


def _protobuf_tensor(tensor: pb.Tensor, path: str) -> Tensor:
    dtype = _PROTOBUF_DTYPES.get(tensor.dtype)
    if dtype is None:
        raise RequestError("expected a tensor of float32, int64 or int32", path=path)
    if tensor.WhichOneof("encoding") == "sparse_csr":
        csr = tensor.sparse_csr
        return _dense(
            np.frombuffer(csr.values, dtype=dtype),
            np.frombuffer(csr.crow_indices, dtype=np.int64),
            np.frombuffer(csr.col_indices, dtype=np.int64),
            list(tensor.shape),
            path,
        )
    return _shaped(np.frombuffer(tensor.dense, dtype=dtype), list(tensor.shape) or None, path)


# JSON


def json_datum(datum: Any, path: str) -> RawDatum:
    if not isinstance(datum, dict):
        raise RequestError("expected an object", path=path)
    model_input = expect(datum, "model_input", dict, path)
    tokens = json_tokens(model_input, f"{path}.model_input")
    inputs = {
        name: json_tensor(tensor, f'{path}.loss_fn_inputs["{name}"]')
        for name, tensor in expect(datum, "loss_fn_inputs", dict, path).items()
        if name in ("target_tokens", *COLUMNS)
    }
    return tokens, inputs


def json_tokens(model_input: Mapping[str, Any], path: str) -> Tensor:
    """The tokens of a ``ModelInput`` of text, [T] int64."""
    tokens = []
    for chunk in expect(model_input, "chunks", list, path):
        kind = chunk.get("type", "encoded_text") if isinstance(chunk, dict) else type(chunk)
        if kind != "encoded_text":
            raise _not_text(kind, path)
        tokens.append(_numbers(chunk, "tokens", np.int64, path))
    return _tokens(tokens)


_JSON_DTYPES: dict[str, type[np.generic]] = {"float32": np.float32, "int64": np.int64}


def json_tensor(tensor: Any, path: str) -> Tensor:
    """A ``TensorData``, dense."""
    if not isinstance(tensor, dict):
        raise RequestError("expected an object with data, dtype and shape", path=path)
    dtype = _JSON_DTYPES.get(str(tensor.get("dtype")))
    if dtype is None:
        raise RequestError(
            f'expected a dtype of "float32" or "int64", got {tensor.get("dtype")!r}', path=path
        )
    values = _numbers(tensor, "data", dtype, path)
    shape = tensor.get("shape")
    if tensor.get("sparse_crow_indices") is not None:
        crow = _numbers(tensor, "sparse_crow_indices", np.int64, path)
        columns = _numbers(tensor, "sparse_col_indices", np.int64, path)
        return _dense(values, crow, columns, shape, path)
    return _shaped(values, shape, path)


def _numbers(
    holder: Mapping[str, Any], key: str, dtype: type[np.generic], path: str
) -> np.ndarray[Any, Any]:
    values = expect(holder, key, list, path)
    for i, value in enumerate(values):
        integral = isinstance(value, int) and not isinstance(value, bool)
        if not integral and (dtype is np.int64 or not isinstance(value, float)):
            kind = "an integer" if dtype is np.int64 else "a number"
            raise RequestError(f"expected {kind}, got {value!r}", path=f"{path}.{key}[{i}]")
    return np.array(values, dtype=dtype)


def expect(holder: Mapping[str, Any], key: str, kind: type, path: str) -> Any:
    value = holder.get(key)
    if not isinstance(value, kind):
        name = "an object" if kind is dict else "an array"
        found = "nothing" if value is None else type(value).__name__
        raise RequestError(f"expected {name}, got {found}", path=f"{path}.{key}".lstrip("."))
    return value


# Both


def _tokens(chunks: list[np.ndarray[Any, Any]]) -> Tensor:
    joined = np.concatenate(chunks) if chunks else np.empty(0)
    return torch.from_numpy(joined.astype(np.int64))


def _shaped(values: np.ndarray[Any, Any], shape: Any, path: str) -> Tensor:
    shape = [len(values)] if shape is None else shape
    if not _is_shape(shape) or math.prod(shape) != len(values):
        raise RequestError(f"the shape {shape} does not hold {len(values)} values", path=path)
    integral = np.issubdtype(values.dtype, np.integer)
    # A copy: what comes out of a message is read-only, which torch does not know.
    return torch.from_numpy(values.astype(np.int64 if integral else np.float32)).reshape(shape)


def _dense(
    values: np.ndarray[Any, Any],
    crow: np.ndarray[Any, Any],
    columns: np.ndarray[Any, Any],
    shape: Any,
    path: str,
) -> Tensor:
    """A compressed sparse row tensor with zeros in every entry that it does not list."""
    valid = (
        _is_shape(shape)
        and len(shape) == 2
        and len(crow) == shape[0] + 1
        and crow[0] == 0
        and crow[-1] == len(columns) == len(values)
        and bool((np.diff(crow) >= 0).all())
        and bool(((columns >= 0) & (columns < shape[1])).all())
    )
    if not valid:
        raise RequestError(f"this is no sparse CSR tensor of the shape {shape}", path=path)
    dense = np.zeros(shape, dtype=values.dtype)
    dense[np.repeat(np.arange(shape[0]), np.diff(crow)), columns] = values
    return _shaped(dense.reshape(-1), shape, path)


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(isinstance(n, int) and n >= 0 for n in shape)


def _not_text(kind: object, path: str) -> RequestError:
    return RequestError(
        f"the sandbox's model reads chunks of encoded_text, not of {kind}",
        path=path,
    )
