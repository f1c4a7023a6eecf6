"""What each endpoint of the Tinker protocol answers."""

from __future__ import annotations

import json
import logging
import zlib
from concurrent.futures import TimeoutError as FutureTimeoutError
from email.message import Message
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from ..errors import RequestError
from .errors import ClosedError, UnknownError
from .model import ForwardBackwardResult, LanguageModel
from .sampling import CONTEXT_LENGTH, Sample
from .sampling_wire import encode_sample, sample_as_json
from .state import TOKENIZER
from .wire import (
    PROTOBUF,
    TrainingCall,
    encode_json,
    encode_protobuf,
    parse_json,
    parse_training_call,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .faults import FaultPlan
    from .state import State
    from .trainer import Result, Trainer

__all__ = ["Api", "Headers", "json_answer", "sentence"]

logger = logging.getLogger(__name__)

Headers = Message  # case-insensitive

_MODEL_NAME = "sandbox"
_TRAINING_CALLS = ("forward", "forward_backward", "optim_step")
_STATE_CALLS = ("save_weights", "save_weights_for_sampler", "load_weights", "save_weights_external")
_WHAT_IT_DOES = "docs/sandbox.md lists what the sandbox does, and what it leaves to the service"


class Api:
    """What each endpoint answers: (JSON object in, or a training call) -> JSON object out."""

    def __init__(
        self,
        trainer: Trainer,
        state: State,
        faults: FaultPlan | None,
        client_config: dict[str, Any],
        poll_seconds: float,
    ) -> None:
        self._trainer = trainer
        self._state = state
        self._faults = faults
        self._client_config = client_config
        self._poll_seconds = poll_seconds
        self._endpoints: dict[str, Callable[[dict[str, Any]], Mapping[str, Any]]] = {
            "healthz": lambda _: {"status": "ok"},
            "get_server_capabilities": lambda _: {
                "supported_models": [
                    {
                        "model_name": name,
                        "trainable": True,
                        "sampleable": True,
                        "max_context_length": CONTEXT_LENGTH,
                    }
                    for name in (_MODEL_NAME, TOKENIZER)
                ]
            },
            "client/config": lambda _: self._client_config,
            "client/dynamic_config": lambda _: {},
            "telemetry": lambda _: {"status": "accepted"},
            "session_heartbeat": self._heartbeat,
            "create_session": self._create_session,
            "create_model": self._create_model,
            "get_info": self._get_info,
            "unload_model": self._unload_model,
            "create_sampling_session": state.create_sampling_session,
            "asample": state.sample,
            "weights_info": state.weights_info,
            "cancel_future": lambda _: {},
        }

    def answer(self, method: str, target: str, body: bytes, headers: Headers) -> tuple[str, bytes]:
        """``(content type, body)`` of a successful answer.

        :raises RequestError: the caller is at fault.
        """
        self._trainer.forget_silent()
        path, _, query = target.partition("?")
        endpoint = path.removeprefix("/api/v1/").strip("/")
        if endpoint in _TRAINING_CALLS:
            content_type = headers.get("content-type") or ""
            call = parse_training_call(endpoint, body, content_type)
            if self._faults is not None:
                call = self._faults.in_execution(endpoint, call)
            return json_answer(self._train(call, body))
        request = parse_json(body)
        if endpoint == "retrieve_future":
            return self._retrieve_future(request, headers)
        if endpoint == "load_weights" and request.get("model_id") is None:
            return json_answer({"request_id": self._state.create_from(request)})
        if endpoint in _STATE_CALLS:
            return json_answer(self._train(self._state_call(endpoint, request), body))
        answer = self._state.rest(method, endpoint.split("/"), dict(parse_qsl(query)), request)
        if answer is not None:
            return json_answer(answer)
        if endpoint not in self._endpoints:
            raise UnknownError(f"there is no {endpoint} here: {_WHAT_IT_DOES}")
        return json_answer(self._endpoints[endpoint](request))

    def _heartbeat(self, request: dict[str, Any]) -> Mapping[str, Any]:
        self._trainer.check_session(request.get("session_id"))
        return {"type": "session_heartbeat"}

    def _create_session(self, request: dict[str, Any]) -> Mapping[str, Any]:
        session_id = self._trainer.create_session(request.get("user_metadata"))
        return {"type": "create_session", "session_id": session_id}

    def _create_model(self, request: dict[str, Any]) -> Mapping[str, Any]:
        optimizer = _section(request, "optimizer_config").get("type", "adamw")
        if optimizer != "adamw":
            raise RequestError(
                f"the sandbox trains with 'adamw' alone, not {optimizer!r}", path="optimizer_config"
            )
        lora = _section(request, "lora_config")
        model_id = self._trainer.create_model(
            request.get("session_id"),
            request.get("model_seq_id"),
            base_model=request.get("base_model") or _MODEL_NAME,
            seed=lora.get("seed"),
            lora_rank=lora.get("rank"),
            user_metadata=request.get("user_metadata"),
        )
        # The official client polls for the model, Tinkex takes it from this answer.
        return {"request_id": f"{model_id}/create_model", "model_id": model_id}

    def _get_info(self, request: dict[str, Any]) -> Mapping[str, Any]:
        run = self._trainer.run(request.get("model_id"))
        return {
            "type": "get_info",
            "model_id": run.model_id,
            # Samplers have no tokenizer_id: they look for the tokenizer under the model's name.
            "model_data": {
                "arch": "bengio-2003",
                "model_name": TOKENIZER,
                "tokenizer_id": TOKENIZER,
            },
            "model_name": run.base_model,
            "is_lora": run.lora_rank is not None,
            "lora_rank": run.lora_rank,
        }

    def _unload_model(self, request: dict[str, Any]) -> Mapping[str, Any]:
        self._trainer.unload_model(request.get("model_id"))
        return {"request_id": f"{request['model_id']}/unload_model"}

    def _train(self, call: TrainingCall, body: bytes) -> Mapping[str, Any]:
        run = self._trainer.run(call.model_id)
        run.submit(call.seq_id, call.operation, (len(body), zlib.crc32(body)))
        return {"request_id": f"{run.model_id}/{call.seq_id}"}

    def _state_call(self, endpoint: str, request: dict[str, Any]) -> TrainingCall:
        model_id, seq_id = request.get("model_id"), request.get("seq_id")
        if endpoint == "save_weights_external":
            return TrainingCall(model_id, seq_id, _not_served)
        run = self._trainer.run(model_id)
        state = self._state
        make = {
            "save_weights": state.save,
            "save_weights_for_sampler": state.save_for_sampler,
            "load_weights": state.load,
        }[endpoint]
        return TrainingCall(model_id, seq_id, make(request, run))

    def _retrieve_future(self, request: dict[str, Any], headers: Headers) -> tuple[str, bytes]:
        request_id = str(request.get("request_id"))
        model_id, _, what = request_id.rpartition("/")
        if what in ("create_model", "unload_model", "load_weights"):
            return json_answer({"type": what, "model_id": model_id})
        future = self._trainer.futures.get(request_id)
        try:
            result = future.result(self._poll_seconds)
        except FutureTimeoutError:
            missing = self._trainer.run(model_id).missing(int(what)) if what.isdecimal() else None
            reason = None if missing is None else f"waiting for the request with seq_id {missing}"
            return json_answer(
                {
                    "type": "try_again",
                    "request_id": request_id,
                    "queue_state": "active",
                    "queue_state_reason": reason,
                }
            )
        except ClosedError:
            raise
        except Exception as error:
            return json_answer(_failure(error, headers))
        self._trainer.futures.retrieved(request_id)
        return _encode(result, headers)


def _not_served(_: LanguageModel) -> Result:
    # It has a number, so it takes its place in the order: all that follows would wait for it.
    raise RequestError(f"the sandbox exports no weights: {_WHAT_IT_DOES}")


def _encode(result: Result, headers: Headers) -> tuple[str, bytes]:
    protobuf = PROTOBUF in (headers.get("accept") or "")
    if isinstance(result, Sample):
        if protobuf:
            return PROTOBUF, encode_sample(result)
        return json_answer(sample_as_json(result))
    if isinstance(result, ForwardBackwardResult) and protobuf:
        return PROTOBUF, encode_protobuf(result)
    return "application/json", encode_json(result)


def _section(request: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = request.get(key) or {}
    if not isinstance(section, dict):
        raise RequestError(f"expected an object, got {section!r}", path=key)
    return section


def json_answer(body: Mapping[str, Any]) -> tuple[str, bytes]:
    return "application/json", json.dumps(body).encode()


def _failure(error: Exception, headers: Headers) -> Mapping[str, Any]:
    """What ``retrieve_future`` answers for a request that failed."""
    if isinstance(error, RequestError):
        message, category = sentence(error), "user"
    else:
        logger.error("a request failed", exc_info=error)
        message, category = f"the sandbox failed: {type(error).__name__}: {error}", "server"
    if "Tinkex" in (headers.get("user-agent") or ""):
        return {"status": "failed", "error": {"message": message, "category": category}}
    return {"error": message, "category": category}


def sentence(error: RequestError) -> str:
    return f"{error} (at {error.path})" if error.path else str(error)
