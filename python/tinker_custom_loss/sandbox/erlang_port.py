"""The sandbox's models over an Erlang port, for training loops on machines without Tinkex.

Frames, MessagePack and tensor batches are those of docs/protocol.md; the operations are in
docs/sandbox.md. One request at a time, in the order in which they come.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NoReturn

import torch
from msgspec import Struct

from .. import __version__
from ..errors import ProtocolError, RequestError
from ..port.frames import MAX_FRAME, FrameReader, FrameTooLargeError, FrameWriter
from ..port.logs import LogStream
from ..port.messagepack import Buffer, Message, pack_pieces, unpack
from ..port.messages import Batch, Data, Terms, decode_batch, decode_data
from ..port.process import attached, end, settle
from ..port.service import composer_arguments, error_message, id_of, op_of
from ..port.typed import read
from ..tensors.batch import Shape, TensorBatch
from ..terms.registry import LoadError, Registry
from .examples import VOCABULARY, Examples
from .gradient_check import check_gradient
from .model import AdamParams, ForwardBackwardResult, LanguageModel

__all__ = ["Sandbox", "attached", "serve"]

_PROTOCOL = 2


def serve(load: Sequence[str]) -> NoReturn:
    """Answer the host that holds descriptors 3 and 4, until it goes away.

    ``load`` are the modules and files whose functions ``check_gradient`` may name.
    """
    from_host, to_host = settle()
    reader, writer = FrameReader(from_host), FrameWriter(to_host)
    logs = LogStream(writer)
    logs.install("info")
    try:
        sandbox = Sandbox(Registry(load))
    except LoadError as error:
        writer.write(pack_pieces(error_message(error)))
        end(1)
    writer.write(pack_pieces(_ready()))
    try:
        while (frame := reader.read()) is not None:
            reply = _reply(sandbox, frame)
            logs.drain()
            writer.write(pack_pieces(reply))
    except FrameTooLargeError as error:
        writer.write(pack_pieces(error_message(error)))
        end(2)
    except BrokenPipeError:
        pass
    end(0)


def _ready() -> dict[str, Any]:
    return {
        "op": "ready",
        "protocol": _PROTOCOL,
        "package": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pid": os.getpid(),
        "max_frame": MAX_FRAME,
        "vocabulary": VOCABULARY,
    }


def _reply(sandbox: Sandbox, frame: Buffer) -> dict[str, Any]:
    request_id = None
    try:
        message = unpack(frame)
        request_id = id_of(message)
        if request_id is None:
            raise ProtocolError('a request needs an "id", a non-negative integer', path="id")
        return {**sandbox.answer(message), "op": "result", "id": request_id}
    except Exception as error:
        return error_message(error, request_id)


class _CreateModel(Struct):
    seed: int = 0


class _OfModel(Struct):
    model: int


class _OptimStep(Struct):
    adam_params: dict[str, Any] = {}


class _Inputs(Struct):
    target_tokens: Batch
    weights: Batch | None = None


class _Data(Struct):
    tokens: Batch
    inputs: _Inputs


class _Train(Struct):
    data: _Data


class _CheckGradient(Struct):
    data: Data
    step: int | None = None


class Sandbox:
    """The models that one port's host has created, by the number it got for each."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._models: list[LanguageModel] = []
        self._operations: dict[str, Callable[[Message], dict[str, Any]]] = {
            "create_model": self._create_model,
            "forward": self._forward,
            "forward_backward": self._forward_backward,
            "optim_step": self._optim_step,
            "parameters": self._parameters,
            "parameter_gradients": self._parameter_gradients,
            "check_gradient": self._check_gradient,
            "terms": lambda _: {"terms": self._registry.describe()},
        }

    def answer(self, message: Message) -> dict[str, Any]:
        """What a request's ``result`` holds beside ``op`` and ``id``.

        Raises:
            CustomLossError: by whose fault there is none.
        """
        op = op_of(message)
        operation = self._operations.get(op)
        if operation is None:
            raise ProtocolError(
                f'unknown op "{op}" at `op`; expected one of {", ".join(self._operations)}',
                path="op",
            )
        return operation(message)

    def _create_model(self, message: Message) -> dict[str, Any]:
        self._models.append(LanguageModel(read(message.fields, _CreateModel).seed))
        return {"model": len(self._models) - 1}

    def _model(self, message: Message) -> LanguageModel:
        number = read(message.fields, _OfModel).model
        if not 0 <= number < len(self._models):
            raise RequestError(
                f"there is no model {number}; {len(self._models)} were created", path="model"
            )
        return self._models[number]

    def _forward(self, message: Message) -> dict[str, Any]:
        return _answer(self._model(message).forward(_examples(message)))

    def _forward_backward(self, message: Message) -> dict[str, Any]:
        examples = _examples(message)
        if examples.weights is None:
            path = "data.inputs.weights"
            raise ProtocolError(f'the required key "weights" is missing at `{path}`', path=path)
        return _answer(self._model(message).forward_backward(examples))

    def _optim_step(self, message: Message) -> dict[str, Any]:
        params = AdamParams.from_mapping(read(message.fields, _OptimStep).adam_params)
        return {"metrics": self._model(message).optim_step(params)}

    def _parameters(self, message: Message) -> dict[str, Any]:
        return {"parameters": _one_tensor(self._model(message).parameters_flat())}

    def _parameter_gradients(self, message: Message) -> dict[str, Any]:
        return {"gradients": _one_tensor(self._model(message).gradient_flat())}

    def _check_gradient(self, message: Message) -> dict[str, Any]:
        model = self._model(message)
        examples = _examples(message)
        request = read(message.fields, _CheckGradient)
        data = decode_data(request.data, message.payload, request.data.count)
        terms = composer_arguments(
            read(message.fields, Terms), lambda spec: self._registry.resolve(spec.fn)
        )
        return asdict(check_gradient(model, examples, data, **terms, step=request.step))


def _examples(message: Message) -> Examples:
    data = read(message.fields, _Train).data
    weights = data.inputs.weights

    def column(batch: Batch, dtype: torch.dtype, path: str) -> TensorBatch:
        return _whole(*decode_batch(batch, message.payload, path), dtype, path)

    return Examples(
        column(data.tokens, torch.int64, "data.tokens"),
        column(data.inputs.target_tokens, torch.int64, "data.inputs.target_tokens"),
        None if weights is None else column(weights, torch.float32, "data.inputs.weights"),
    )


def _whole(
    flat: torch.Tensor, shapes: Sequence[Shape | None], dtype: torch.dtype, path: str
) -> TensorBatch:
    """A batch in which every datum has a tensor, in the dtype that the model works in."""
    if flat.is_floating_point() and not dtype.is_floating_point:
        raise RequestError(f"expected an integer dtype at `{path}.dtype`", path=f"{path}.dtype")
    whole: list[Shape] = []
    for i, shape in enumerate(shapes):
        if shape is None:
            raise RequestError(
                f"datum {i} has no tensor at `{path}.shapes[{i}]`; the sandbox's model reads one "
                "chunk of text a datum",
                path=f"{path}.shapes[{i}]",
            )
        whole.append(shape)
    return TensorBatch(flat.to(dtype), tuple(whole))


def _answer(result: ForwardBackwardResult) -> dict[str, Any]:
    return {"logprobs": result.logprobs, "metrics": result.metrics}


def _one_tensor(vector: torch.Tensor) -> TensorBatch:
    return TensorBatch(vector, (tuple(vector.shape),))
