"""The two dialects in which Tinker clients speak of training: protobuf and JSON.

Official SDKs send protobuf from 0.25 on; earlier ones, and Tinkex, send JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tinker.proto import tinker_public_pb2 as pb

from ..errors import RequestError
from ..tensors.batch import TensorBatch
from .datums_wire import RawDatum, expect, json_datum, protobuf_datum
from .examples import Examples
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
    "parse_json",
    "parse_training_call",
]

PROTOBUF = "application/x-protobuf"

_OUTPUT_TYPE = "ArrayRecord"


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
        params = AdamParams.from_mapping(expect(request, "adam_params", dict, ""))
        return {"type": "optim_step", "metrics": model.optim_step(params)}

    return operation


def _forward_backward(
    loss_fn: object,
    config: Mapping[str, Any],
    datums: Callable[[], Iterable[RawDatum]],
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


def _examples(datums: list[RawDatum], loss: Loss, *, zeros_for_missing: bool) -> Examples:
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
        lambda: (protobuf_datum(datum, f"data[{i}]") for i, datum in enumerate(message.data)),
        forward_only=message.forward_only,
    )
    return TrainingCall(message.model_id, message.seq_id, operation, message.loss_fn)


# JSON


def _json_forward_backward(
    request: Mapping[str, Any], key: str, *, forward_only: bool
) -> Operation:
    def operation(model: LanguageModel) -> ForwardBackwardResult:
        body = expect(request, key, dict, "")
        data = expect(body, "data", list, key)

        def datums() -> Iterable[RawDatum]:
            return (json_datum(datum, f"data[{i}]") for i, datum in enumerate(data))

        config = (
            {} if body.get("loss_fn_config") is None else expect(body, "loss_fn_config", dict, key)
        )
        run = _forward_backward(body.get("loss_fn"), config, datums, forward_only=forward_only)
        result = run(model)
        assert isinstance(result, ForwardBackwardResult)
        return result

    return operation
