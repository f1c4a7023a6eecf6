"""The two dialects in which Tinker clients speak of training: protobuf and JSON.

Official SDKs send protobuf from 0.25 on; earlier ones, and Tinkex, send JSON.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tinker.proto import tinker_public_pb2 as pb
from torch import Tensor

from ..errors import RequestError
from ..tensors.batch import TensorBatch
from .examples import COLUMNS, Examples
from .losses import CROSS_ENTROPY, loss_named
from .model import AdamParams, ForwardBackwardResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from .losses import Loss
    from .model import LanguageModel
    from .trainer import Operation

__all__ = [
    "PROTOBUF",
    "TrainingCall",
    "decompress",
    "encode_json",
    "encode_protobuf",
    "json_tensor",
    "json_tokens",
    "parse_json",
    "parse_training_call",
]

PROTOBUF = "application/x-protobuf"

_OUTPUT_TYPE = "ArrayRecord"
_RawDatum = tuple[Tensor, dict[str, Tensor]]  # tokens [T] int64, loss_fn_inputs


@dataclass(frozen=True)
class TrainingCall:
    """A numbered request to one model. What is wrong with its data shows when it is executed."""

    model_id: object
    seq_id: Any
    operation: Operation
    loss_fn: object = None


def parse_training_call(endpoint: str, body: bytes, content_type: str) -> TrainingCall:
    """Read ``forward``, ``forward_backward`` or ``optim_step``.

    :raises RequestError: the body cannot be read at all. Anything finer is left to the operation,
        so that the call takes its place in the model's order and those behind it are not held up.
    """
    if content_type.startswith(PROTOBUF):
        if endpoint != "forward_backward":
            raise RequestError(f"{endpoint} takes a JSON body, not {PROTOBUF}")
        return _parse_protobuf(body)
    request = parse_json(body)
    model_id, seq_id = request.get("model_id"), request.get("seq_id")
    if endpoint == "optim_step":
        return TrainingCall(model_id, seq_id, _optim_step(request))
    key = "forward_input" if endpoint == "forward" else "forward_backward_input"
    operation = _json_forward_backward(request, key, forward_only=endpoint == "forward")
    input_ = request.get(key)
    loss_fn = input_.get("loss_fn") if isinstance(input_, dict) else None
    return TrainingCall(model_id, seq_id, operation, loss_fn)


def parse_json(body: bytes) -> dict[str, Any]:
    """:raises RequestError: the body is not a JSON object."""
    try:
        request = json.loads(body or b"{}")
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if not isinstance(request, dict):
        raise RequestError("the body must be a JSON object")
    return request


def decompress(body: bytes) -> bytes:
    """:raises RequestError: the body is not zstd, or zstd is not installed."""
    try:
        import zstandard
    except ImportError as error:
        raise RequestError(
            "this body is compressed with zstd: install tinker-custom-loss[sandbox]"
        ) from error
    try:
        with zstandard.ZstdDecompressor().stream_reader(body) as reader:
            return bytes(reader.read())
    except zstandard.ZstdError as error:
        raise RequestError(f"the body is not zstd: {error}") from error


def encode_json(result: ForwardBackwardResult | Mapping[str, Any]) -> bytes:
    """A result as every client that speaks JSON reads it."""
    if isinstance(result, ForwardBackwardResult):
        result = {
            "type": "forward_backward",
            "loss_fn_output_type": _OUTPUT_TYPE,
            "loss_fn_outputs": [
                {
                    "logprobs": {
                        "data": logprobs.reshape(-1).tolist(),
                        "dtype": "float32",
                        "shape": list(logprobs.shape),
                    }
                }
                for logprobs in result.logprobs.tensors()
            ],
            "metrics": result.metrics,
        }
    return json.dumps(result).encode()


def encode_protobuf(result: ForwardBackwardResult) -> bytes:
    """A ``ForwardBackwardOutput``: one record for each run of datums of one trailing shape."""
    output = pb.ForwardBackwardOutput(loss_fn_output_type=_OUTPUT_TYPE, metrics=result.metrics)
    batch, start = result.logprobs, 0
    first = 0
    while first < len(batch):
        trailing = batch.shapes[first][1:]
        last = first
        while last < len(batch) and batch.shapes[last][1:] == trailing:
            last += 1
        sizes = np.array([0, *batch.sizes[first:last]], dtype=np.int64)
        end = start + int(sizes.sum())
        output.loss_fn_outputs.add(type_tag=_OUTPUT_TYPE, num_datums=last - first).fields[
            "logprobs"
        ].MergeFrom(
            pb.BatchedTensor(
                data=batch.flat[start:end].numpy().tobytes(),
                offsets=(sizes.cumsum() * batch.flat.element_size()).tobytes(),
                dtype=pb.DTYPE_FLOAT32,
                trailing_shape=trailing,
            )
        )
        first, start = last, end
    return bytes(output.SerializeToString())


def _optim_step(request: Mapping[str, Any]) -> Operation:
    def operation(model: LanguageModel) -> dict[str, Any]:
        if "adam_params" not in request:
            raise RequestError(
                "the sandbox trains with AdamW alone: pass tinker.AdamParams to optim_step",
                path="adam_params",
            )
        params = AdamParams.from_mapping(_expect(request, "adam_params", dict, ""))
        return {"type": "optim_step", "metrics": model.optim_step(params)}

    return operation


def _forward_backward(
    loss_fn: object,
    config: Mapping[str, Any],
    datums: Callable[[], Iterable[_RawDatum]],
    *,
    forward_only: bool,
) -> Operation:
    def operation(model: LanguageModel) -> ForwardBackwardResult:
        loss = loss_named(loss_fn, config)
        unweighted = forward_only and loss.name == CROSS_ENTROPY.name
        examples = _examples(list(datums()), loss, zeros_for_missing=unweighted)
        return (
            model.forward(examples, loss)
            if forward_only
            else model.forward_backward(examples, loss)
        )

    return operation


def _examples(datums: list[_RawDatum], loss: Loss, *, zeros_for_missing: bool) -> Examples:
    if not datums:
        raise RequestError("there is no datum to compute on", path="data")
    needed = ["target_tokens"] if zeros_for_missing else ["target_tokens", *loss.inputs]
    for i, (_, inputs) in enumerate(datums):
        for name in needed:
            if name not in inputs:
                raise RequestError(
                    f"{loss.name} needs {name}, one a target"
                    if name != "target_tokens"
                    else f"{loss.name} needs target_tokens",
                    path=f"data[{i}].loss_fn_inputs",
                )

    def column(name: str) -> TensorBatch:
        return TensorBatch.from_tensors(
            [
                inputs[name].to(torch.float32)
                if name in inputs
                else torch.zeros(inputs["target_tokens"].shape)
                for _, inputs in datums
            ]
        )

    return Examples(
        TensorBatch.from_tensors([tokens for tokens, _ in datums]),
        TensorBatch.from_tensors([inputs["target_tokens"] for _, inputs in datums]),
        **{name: column(name) for name in loss.inputs},
    )


# Protobuf


def _parse_protobuf(body: bytes) -> TrainingCall:
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except Exception as error:  # google.protobuf.message.DecodeError, whatever the backend
        raise RequestError(f"the body is not a ForwardBackwardRequest: {error}") from error
    config: dict[str, Any] = dict(message.loss_fn_config)
    # SDKs up to 0.30 know only numbers, and messages of that generation have no second map.
    for key, value in getattr(message, "loss_fn_config_v2", {}).items():
        config[key] = getattr(value, value.WhichOneof("value"))
    operation = _forward_backward(
        message.loss_fn,
        config,
        lambda: (_protobuf_datum(datum, f"data[{i}]") for i, datum in enumerate(message.data)),
        forward_only=message.forward_only,
    )
    return TrainingCall(message.model_id, message.seq_id, operation, message.loss_fn)


def _protobuf_datum(datum: pb.Datum, path: str) -> _RawDatum:
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


def _json_forward_backward(
    request: Mapping[str, Any], key: str, *, forward_only: bool
) -> Operation:
    def operation(model: LanguageModel) -> ForwardBackwardResult:
        body = _expect(request, key, dict, "")
        data = _expect(body, "data", list, key)

        def datums() -> Iterable[_RawDatum]:
            return (_json_datum(datum, f"data[{i}]") for i, datum in enumerate(data))

        config = (
            {} if body.get("loss_fn_config") is None else _expect(body, "loss_fn_config", dict, key)
        )
        run = _forward_backward(body.get("loss_fn"), config, datums, forward_only=forward_only)
        result = run(model)
        assert isinstance(result, ForwardBackwardResult)
        return result

    return operation


def _json_datum(datum: Any, path: str) -> _RawDatum:
    if not isinstance(datum, dict):
        raise RequestError("expected an object", path=path)
    model_input = _expect(datum, "model_input", dict, path)
    tokens = json_tokens(model_input, f"{path}.model_input")
    inputs = {
        name: json_tensor(tensor, f'{path}.loss_fn_inputs["{name}"]')
        for name, tensor in _expect(datum, "loss_fn_inputs", dict, path).items()
        if name in ("target_tokens", *COLUMNS)
    }
    return tokens, inputs


def json_tokens(model_input: Mapping[str, Any], path: str) -> Tensor:
    """The tokens of a ``ModelInput`` of text, [T] int64."""
    tokens = []
    for chunk in _expect(model_input, "chunks", list, path):
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
    values = _expect(holder, key, list, path)
    for i, value in enumerate(values):
        integral = isinstance(value, int) and not isinstance(value, bool)
        if not integral and (dtype is np.int64 or not isinstance(value, float)):
            kind = "an integer" if dtype is np.int64 else "a number"
            raise RequestError(f"expected {kind}, got {value!r}", path=f"{path}.{key}[{i}]")
    return np.array(values, dtype=dtype)


def _expect(holder: Mapping[str, Any], key: str, kind: type, path: str) -> Any:
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
