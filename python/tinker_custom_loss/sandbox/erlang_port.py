"""The sandbox's models over an Erlang port, for training loops on machines without Tinkex.

Frames, MessagePack and tensor batches are those of docs/protocol.md; the operations are in
docs/sandbox.md. One request at a time, in the order in which they come.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NoReturn

import torch

from .. import __version__
from ..errors import ProtocolError, RequestError
from ..port.frames import MAX_FRAME, FrameReader, FrameTooLargeError, FrameWriter
from ..port.logs import LogStream
from ..port.messagepack import Buffer, pack_pieces
from ..port.messages import decode_batch, decode_compute, decode_terms, encode_batch, get
from ..port.process import attached, end, settle
from ..port.service import composer_arguments, error_message, id_of, parse
from ..tensors.batch import Shape, TensorBatch
from ..terms.registry import LoadError, Registry
from .examples import VOCABULARY, Examples
from .gradient_check import check_gradient
from .model import AdamParams, ForwardBackwardResult, LanguageModel

__all__ = ["Sandbox", "attached", "serve"]

_PROTOCOL = 1


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
        message = parse(frame)
        request_id = id_of(message)
        if request_id is None:
            raise ProtocolError('a request needs an "id", a non-negative integer', path="id")
        return {**sandbox.answer(message), "op": "result", "id": request_id}
    except Exception as error:
        return error_message(error, request_id)


class Sandbox:
    """The models that one port's host has created, by the number it got for each."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._models: list[LanguageModel] = []
        self._operations: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
            "create_model": self._create_model,
            "forward": self._forward,
            "forward_backward": self._forward_backward,
            "optim_step": self._optim_step,
            "parameters": self._parameters,
            "parameter_gradients": self._parameter_gradients,
            "check_gradient": self._check_gradient,
            "terms": lambda _: {"terms": self._registry.describe()},
        }

    def answer(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """What a request's ``result`` holds beside ``op`` and ``id``.

        Raises:
            CustomLossError: by whose fault there is none.
        """
        operation = self._operations.get(get(message, "op", (str,)))
        if operation is None:
            raise ProtocolError(
                f'unknown op "{message["op"]}" at `op`; expected one of '
                f"{', '.join(self._operations)}",
                path="op",
            )
        return operation(message)

    def _create_model(self, message: Mapping[str, Any]) -> dict[str, Any]:
        self._models.append(LanguageModel(get(message, "seed", (int,), default=0)))
        return {"model": len(self._models) - 1}

    def _model(self, message: Mapping[str, Any]) -> LanguageModel:
        number: int = get(message, "model", (int,))
        if not 0 <= number < len(self._models):
            raise RequestError(
                f"there is no model {number}; {len(self._models)} were created", path="model"
            )
        return self._models[number]

    def _forward(self, message: Mapping[str, Any]) -> dict[str, Any]:
        return _encode(self._model(message).forward(_examples(message)))

    def _forward_backward(self, message: Mapping[str, Any]) -> dict[str, Any]:
        return _encode(
            self._model(message).forward_backward(_examples(message, weights_required=True))
        )

    def _optim_step(self, message: Mapping[str, Any]) -> dict[str, Any]:
        params = AdamParams.from_mapping(get(message, "adam_params", (dict,), default={}))
        return {"metrics": self._model(message).optim_step(params)}

    def _parameters(self, message: Mapping[str, Any]) -> dict[str, Any]:
        return {"parameters": _encode_vector(self._model(message).parameters_flat())}

    def _parameter_gradients(self, message: Mapping[str, Any]) -> dict[str, Any]:
        return {"gradients": _encode_vector(self._model(message).gradient_flat())}

    def _check_gradient(self, message: Mapping[str, Any]) -> dict[str, Any]:
        model = self._model(message)
        examples = _examples(message)
        logprobs = encode_batch(model.forward(examples).logprobs)
        request = decode_compute({**message, "logprobs": logprobs})
        terms = composer_arguments(
            *decode_terms(message), lambda spec: self._registry.resolve(spec.fn)
        )
        return asdict(check_gradient(model, examples, request.data, **terms, step=request.step))


def _examples(message: Mapping[str, Any], *, weights_required: bool = False) -> Examples:
    data = get(message, "data", (dict,))
    inputs = get(data, "inputs", (dict,), "data")
    weighted = weights_required or inputs.get("weights") is not None
    return Examples(
        _column(data, "tokens", torch.int64, "data"),
        _column(inputs, "target_tokens", torch.int64, "data.inputs"),
        _column(inputs, "weights", torch.float32, "data.inputs") if weighted else None,
    )


def _column(holder: Mapping[str, Any], key: str, dtype: torch.dtype, path: str) -> TensorBatch:
    """A batch in which every datum has a tensor, in the dtype that the model works in."""
    path_of_key = f"{path}.{key}"
    flat, shapes = decode_batch(get(holder, key, (dict,), path), path_of_key)
    if flat.is_floating_point() and not dtype.is_floating_point:
        raise RequestError(
            f"expected an integer dtype at `{path_of_key}.dtype`", path=f"{path_of_key}.dtype"
        )
    whole: list[Shape] = []
    for i, shape in enumerate(shapes):
        if shape is None:
            raise RequestError(
                f"datum {i} has no {key}, as one tensor, at `{path_of_key}.shapes[{i}]`; "
                "the sandbox's model reads one chunk of text a datum",
                path=f"{path_of_key}.shapes[{i}]",
            )
        whole.append(shape)
    return TensorBatch(flat.to(dtype), tuple(whole))


def _encode(result: ForwardBackwardResult) -> dict[str, Any]:
    return {"logprobs": encode_batch(result.logprobs), "metrics": result.metrics}


def _encode_vector(vector: torch.Tensor) -> dict[str, Any]:
    return encode_batch(TensorBatch(vector, (tuple(vector.shape),)))
