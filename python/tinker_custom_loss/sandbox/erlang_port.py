"""The sandbox's models over an Erlang port, for training loops on machines without Tinkex.

They train on the service's losses, are sampled, saved and loaded, as over HTTP. Frames, MessagePack
and tensor batches are those of docs/protocol.md; the operations are in docs/sandbox.md. One request
at a time, in the order in which they come.
"""

from __future__ import annotations

import os
import platform
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
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
from .checkpoints import Checkpoint, Checkpoints
from .examples import VOCABULARY, Examples
from .gradient_check import check_gradient
from .losses import Loss, loss_named
from .model import AdamParams, ForwardBackwardResult, LanguageModel
from .sampling import SampleRequest, SamplingParams, sample

__all__ = ["Sandbox", "attached", "serve"]

_PROTOCOL = 3
_SAMPLERS_KEPT = 128


def serve(load: Sequence[str], state: str | None = None) -> NoReturn:
    """Answer the host that holds descriptors 3 and 4, until it goes away.

    ``load`` are the modules and files whose functions ``check_gradient`` may name, ``state`` the
    directory of its checkpoints; without one they end with this process.
    """
    from_host, to_host = settle()
    reader, writer = FrameReader(from_host), FrameWriter(to_host)
    logs = LogStream(writer)
    logs.install("info")
    try:
        checkpoints = Checkpoints(None if state is None else Path(state))
        sandbox = Sandbox(Registry(load), checkpoints)
    except (LoadError, RequestError, OSError) as error:
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
    logprobs: Batch | None = None
    advantages: Batch | None = None


class _Data(Struct):
    tokens: Batch
    inputs: _Inputs


class _Train(Struct):
    data: _Data
    loss_fn: str = "cross_entropy"
    loss_fn_config: dict[str, Any] | None = None


class _Sample(Struct):
    sampler: int
    prompt: Batch
    sampling_params: dict[str, Any] = {}
    num_samples: int = 1
    prompt_logprobs: bool = False


class _SaveState(Struct):
    name: str
    overwrite: bool = False


class _LoadState(Struct):
    path: str
    optimizer: bool = False


class _CheckGradient(Struct):
    data: Data
    step: int | None = None


class Sandbox:
    """The models and samplers of one port's host, by the number it got for each."""

    def __init__(self, registry: Registry, checkpoints: Checkpoints) -> None:
        self._registry = registry
        self._checkpoints = checkpoints
        self._models: list[LanguageModel] = []
        self._samplers: OrderedDict[int, LanguageModel] = OrderedDict()
        self._samplers_made = self._samples = 0
        self._operations: dict[str, Callable[[Message], dict[str, Any]]] = {
            "create_model": self._create_model,
            "forward": self._forward,
            "forward_backward": self._forward_backward,
            "optim_step": self._optim_step,
            "parameters": self._parameters,
            "parameter_gradients": self._parameter_gradients,
            "save_for_sampling": self._save_for_sampling,
            "sample": self._sample,
            "save_state": self._save_state,
            "load_state": self._load_state,
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
        self._models.append(LanguageModel(read(message.packed, _CreateModel).seed))
        return {"model": len(self._models) - 1}

    def _model(self, message: Message) -> LanguageModel:
        number = read(message.packed, _OfModel).model
        if not 0 <= number < len(self._models):
            raise RequestError(
                f"there is no model {number}; {len(self._models)} were created", path="model"
            )
        return self._models[number]

    def _forward(self, message: Message) -> dict[str, Any]:
        model, loss = self._model(message), _loss(message)
        return _answer(model.forward(_examples(message, loss.inputs), loss))

    def _forward_backward(self, message: Message) -> dict[str, Any]:
        model, loss = self._model(message), _loss(message)
        return _answer(model.forward_backward(_examples(message, loss.inputs), loss))

    def _optim_step(self, message: Message) -> dict[str, Any]:
        params = AdamParams.from_mapping(read(message.packed, _OptimStep).adam_params)
        return {"metrics": self._model(message).optim_step(params)}

    def _parameters(self, message: Message) -> dict[str, Any]:
        return {"parameters": _one_tensor(self._model(message).parameters_flat())}

    def _parameter_gradients(self, message: Message) -> dict[str, Any]:
        return {"gradients": _one_tensor(self._model(message).gradient_flat())}

    def _save_for_sampling(self, message: Message) -> dict[str, Any]:
        self._samplers[self._samplers_made] = self._model(message).frozen()
        self._samplers_made += 1
        if len(self._samplers) > _SAMPLERS_KEPT:
            self._samplers.popitem(last=False)
        return {"sampler": self._samplers_made - 1}

    def _sample(self, message: Message) -> dict[str, Any]:
        asked = read(message.packed, _Sample)
        model = self._samplers.get(asked.sampler)
        if model is None:
            raise RequestError(
                f"there is no sampler {asked.sampler}; {self._samplers_made} were made, and the "
                f"latest {_SAMPLERS_KEPT} are kept",
                path="sampler",
            )
        request = SampleRequest(
            _one_prompt(asked.prompt, message),
            SamplingParams.from_mapping(asked.sampling_params),
            num_samples=asked.num_samples,
            prompt_logprobs=asked.prompt_logprobs,
        )
        self._samples += 1
        # For a request without a seed: another one for each, the same ones in every run.
        drawn = sample(model, request, zlib.crc32(f"{asked.sampler}/{self._samples}".encode()))
        logprobs = drawn.prompt_logprobs
        return {
            "tokens": TensorBatch.from_tensors([each.tokens for each in drawn.sequences]),
            "logprobs": TensorBatch.from_tensors([each.logprobs for each in drawn.sequences]),
            "stopped": [each.stopped for each in drawn.sequences],
            "prompt_logprobs": None if logprobs is None else _one_tensor(logprobs),
        }

    def _save_state(self, message: Message) -> dict[str, Any]:
        asked, model = read(message.packed, _SaveState), self._model(message)
        number = read(message.packed, _OfModel).model
        checkpoint = Checkpoint(
            f"model-{number}", "weights", asked.name, "sandbox", None, time.time()
        )
        tensors = model.state(optimizer=True)
        return {"path": self._checkpoints.save(checkpoint, tensors, overwrite=asked.overwrite).path}

    def _load_state(self, message: Message) -> dict[str, Any]:
        asked = read(message.packed, _LoadState)
        tensors = self._checkpoints.tensors(asked.path)
        self._model(message).load(tensors, optimizer=asked.optimizer)
        return {"path": asked.path}

    def _check_gradient(self, message: Message) -> dict[str, Any]:
        model = self._model(message)
        examples = _examples(message)
        request = read(message.packed, _CheckGradient)
        data = decode_data(request.data, message.payload, request.data.count)
        terms = composer_arguments(
            read(message.packed, Terms), lambda spec: self._registry.resolve(spec.fn)
        )
        return asdict(check_gradient(model, examples, data, **terms, step=request.step))


def _loss(message: Message) -> Loss:
    asked = read(message.packed, _Train)
    return loss_named(asked.loss_fn, asked.loss_fn_config)


def _examples(message: Message, names: Sequence[str] = ()) -> Examples:
    """The datums with those of their inputs that are read."""
    data = read(message.packed, _Train).data

    def column(batch: Batch, dtype: torch.dtype, path: str) -> TensorBatch:
        return _whole(*decode_batch(batch, message.payload, path), dtype, path)

    def floats(name: str) -> TensorBatch | None:
        batch: Batch | None = getattr(data.inputs, name)
        return None if batch is None else column(batch, torch.float32, f"data.inputs.{name}")

    return Examples(
        column(data.tokens, torch.int64, "data.tokens"),
        column(data.inputs.target_tokens, torch.int64, "data.inputs.target_tokens"),
        **{name: floats(name) for name in names},
    )


def _one_prompt(batch: Batch, message: Message) -> torch.Tensor:
    whole = _whole(*decode_batch(batch, message.payload, "prompt"), torch.int64, "prompt")
    if len(whole) != 1 or len(whole.shapes[0]) != 1:
        raise RequestError("expected one tensor [T]", path="prompt.shapes")
    return whole.flat


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
