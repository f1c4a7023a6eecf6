"""The Tinker protocol over HTTP, on the loopback interface, for the official client to train on."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import os
import socket
import threading
import zlib
from concurrent.futures import TimeoutError as FutureTimeoutError
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast
from urllib.parse import parse_qsl

from ..errors import RequestError
from .errors import ClosedError, UnknownError
from .model import ForwardBackwardResult, LanguageModel
from .sampling import CONTEXT_LENGTH, Sample
from .sampling_wire import encode_sample, sample_as_json
from .state import TOKENIZER, State
from .trainer import Trainer
from .wire import (
    PROTOBUF,
    TrainingCall,
    decompress,
    encode_json,
    encode_protobuf,
    parse_json,
    parse_training_call,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from torch import Tensor

    from .trainer import Result

__all__ = ["SandboxServer"]

logger = logging.getLogger(__name__)

_Headers = Message  # case-insensitive

_MODEL_NAME = "sandbox"
_TRAINING_CALLS = ("forward", "forward_backward", "optim_step")
_STATE_CALLS = ("save_weights", "save_weights_for_sampler", "load_weights", "save_weights_external")
# The SDK asks for it through a connection pool of its own that it forgets without closing it.
_LAST_OF_ITS_CONNECTION = "client/config"
_WHAT_IT_DOES = "docs/sandbox.md lists what the sandbox does, and what it leaves to the service"


class SandboxServer:
    """A Tinker server of one process and one tiny model, serving as soon as it exists.

    ::

        with SandboxServer(seed=0) as server:
            service = tinker.ServiceClient(base_url=server.url, api_key="tml-sandbox")
            client = service.create_lora_training_client("sandbox").result()

    ``seed`` initializes the models of clients that name none; every ``base_model`` is this one.
    ``port`` 0 takes a free one. ``client_config`` is what ``client/config`` answers, for example
    ``{"fwdbwd_max_chunk_len": 2}``. ``poll_seconds`` is how long ``retrieve_future`` waits before
    it answers "try again". Checkpoints live in memory or, with a directory as ``state``, on disk,
    where the next server finds them.

    :raises RequestError: ``host`` is not a loopback address, ``seed`` is no seed, or a file in
        ``state`` is no checkpoint.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        host: str = "127.0.0.1",
        port: int = 0,
        client_config: Mapping[str, Any] | None = None,
        poll_seconds: float = 20.0,
        state: str | os.PathLike[str] | None = None,
    ) -> None:
        # The first optimizer of a process has torch import its compiler, which takes a second and
        # more: not while a client waits for its model. This checks the seed, too.
        LanguageModel(seed)
        self._trainer = Trainer(seed)
        self._state = State(seed, self._trainer, None if state is None else Path(state))
        self._api = _Api(self._trainer, self._state, dict(client_config or {}), poll_seconds)
        self._http = _HttpServer(_loopback(host), port, self._api)
        self._thread = threading.Thread(
            target=self._http.serve_forever, args=(0.05,), name="tinker sandbox", daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """What a client takes as ``base_url``."""
        host, port = self._http.server_address[:2]
        host = str(host)
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    @property
    def base_model(self) -> str:
        """The name under which also a sampler that knows no model finds its tokenizer.

        It is the directory of the byte tokenizer. Under any other name there is the same model.
        """
        return TOKENIZER

    @property
    def model_ids(self) -> list[str]:
        """The models that clients have created, in order."""
        return self._trainer.model_ids

    def model(self, model_id: str) -> LanguageModel:
        """The live model, for reading while no request of its client is executing.

        :raises RequestError: there is no such model.
        """
        return self._trainer.run(model_id).model

    def parameters(self, model_id: str) -> Tensor:
        """A copy of all parameters of a model, [P] float32.

        :raises RequestError: there is no such model.
        """
        return self.model(model_id).parameters_flat()

    def close(self) -> None:
        """Stop serving; requests that are being answered end first, those that wait fail."""
        self._http.shutdown()
        self._thread.join()
        self._trainer.close()
        self._state.close()
        self._http.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _loopback(host: str) -> str:
    address = "127.0.0.1" if host == "localhost" else host
    try:
        loopback = ipaddress.ip_address(address).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise RequestError(
            f"the sandbox listens on loopback addresses alone, such as 127.0.0.1, not on {host!r}: "
            "it asks nobody for a key",
            path="host",
        )
    return address


class _Reply(Exception):
    """An answer that ends a request early."""

    def __init__(self, status: int, body: Mapping[str, Any]) -> None:
        self.status = status
        self.body = body


class _Api:
    """What each endpoint answers: (JSON object in, or a training call) -> JSON object out."""

    def __init__(
        self, trainer: Trainer, state: State, client_config: dict[str, Any], poll_seconds: float
    ) -> None:
        self._trainer = trainer
        self._state = state
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

    def answer(self, method: str, target: str, body: bytes, headers: _Headers) -> tuple[str, bytes]:
        """``(content type, body)`` of a successful answer.

        :raises RequestError: the caller is at fault.
        """
        path, _, query = target.partition("?")
        endpoint = path.removeprefix("/api/v1/").strip("/")
        if endpoint in _TRAINING_CALLS:
            content_type = headers.get("content-type") or ""
            return _json(self._train(parse_training_call(endpoint, body, content_type), body))
        request = parse_json(body)
        if endpoint == "retrieve_future":
            return self._retrieve_future(request, headers)
        if endpoint == "load_weights" and request.get("model_id") is None:
            return _json({"request_id": self._state.create_from(request)})
        if endpoint in _STATE_CALLS:
            return _json(self._train(self._state_call(endpoint, request), body))
        answer = self._state.rest(method, endpoint.split("/"), dict(parse_qsl(query)), request)
        if answer is not None:
            return _json(answer)
        if endpoint not in self._endpoints:
            raise UnknownError(f"there is no {endpoint} here: {_WHAT_IT_DOES}")
        return _json(self._endpoints[endpoint](request))

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

    def _retrieve_future(self, request: dict[str, Any], headers: _Headers) -> tuple[str, bytes]:
        request_id = str(request.get("request_id"))
        model_id, _, what = request_id.rpartition("/")
        if what in ("create_model", "unload_model", "load_weights"):
            return _json({"type": what, "model_id": model_id})
        future = self._trainer.futures.get(request_id)
        try:
            result = future.result(self._poll_seconds)
        except FutureTimeoutError:
            missing = self._trainer.run(model_id).missing(int(what)) if what.isdecimal() else None
            reason = None if missing is None else f"waiting for the request with seq_id {missing}"
            return _json(
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
            return _json(_failure(error, headers))
        self._trainer.futures.retrieved(request_id)
        return _encode(result, headers)


def _not_served(_: LanguageModel) -> Result:
    # It has a number, so it takes its place in the order: all that follows would wait for it.
    raise RequestError(f"the sandbox exports no weights: {_WHAT_IT_DOES}")


def _encode(result: Result, headers: _Headers) -> tuple[str, bytes]:
    protobuf = PROTOBUF in (headers.get("accept") or "")
    if isinstance(result, Sample):
        if protobuf:
            return PROTOBUF, encode_sample(result)
        return _json(sample_as_json(result))
    if isinstance(result, ForwardBackwardResult) and protobuf:
        return PROTOBUF, encode_protobuf(result)
    return "application/json", encode_json(result)


def _section(request: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = request.get(key) or {}
    if not isinstance(section, dict):
        raise RequestError(f"expected an object, got {section!r}", path=key)
    return section


def _json(body: Mapping[str, Any]) -> tuple[str, bytes]:
    return "application/json", json.dumps(body).encode()


def _failure(error: Exception, headers: _Headers) -> Mapping[str, Any]:
    """What ``retrieve_future`` answers for a request that failed."""
    if isinstance(error, RequestError):
        message, category = _sentence(error), "user"
    else:
        logger.error("a request failed", exc_info=error)
        message, category = f"the sandbox failed: {type(error).__name__}: {error}", "server"
    if "Tinkex" in (headers.get("user-agent") or ""):
        return {"status": "failed", "error": {"message": message, "category": category}}
    return {"error": message, "category": category}


def _sentence(error: RequestError) -> str:
    return f"{error} (at {error.path})" if error.path else str(error)


class _HttpServer(ThreadingHTTPServer):
    """One thread a connection; closing it ends connections that a client keeps open."""

    request_queue_size = 128

    def __init__(self, host: str, port: int, api: _Api) -> None:
        self.api = api
        self.closing = False
        self._connections: dict[socket.socket, threading.Thread] = {}
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        # A daemon, so that a script that forgets to close the server can end.
        self._connections[request] = thread = threading.Thread(
            target=self.process_request_thread, args=(request, client_address), daemon=True
        )
        thread.start()

    def shutdown_request(self, request: Any) -> None:
        self._connections.pop(request, None)
        super().shutdown_request(request)

    def server_close(self) -> None:
        self.closing = True
        connections = list(self._connections.items())
        for connection, _ in connections:
            with contextlib.suppress(OSError):  # the client was faster
                connection.shutdown(socket.SHUT_RD)
        for _, thread in connections:
            thread.join()
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a connection from %s ended early", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # with Nagle's algorithm every call takes 45 ms
    wbufsize = -1  # head and body of an answer in one segment

    def do_POST(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def _answer(self) -> None:
        server = cast("_HttpServer", self.server)
        endpoint = self.path.partition("?")[0].removeprefix("/api/v1/").strip("/")
        try:
            content_type, body = server.api.answer(
                self.command, self.path, self._body(), self.headers
            )
            status = 200
        except ClosedError as error:
            status, content_type, body = 410, *_json({"detail": str(error)})
        except RequestError as error:
            status = 404 if isinstance(error, UnknownError) else 400
            content_type, body = _json({"detail": _sentence(error)})
        except Exception as error:
            logger.exception("%s failed", endpoint)
            status, content_type, body = 500, *_json({"detail": f"{type(error).__name__}: {error}"})
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if endpoint == _LAST_OF_ITS_CONNECTION:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.close_connection |= server.closing

    def _body(self) -> bytes:
        try:
            length = int(self.headers.get("content-length") or 0)
        except ValueError:
            length = -1
        if length < 0 or self.headers.get("transfer-encoding"):
            self.close_connection = True  # where this body ends is not known
            raise RequestError("send the body with a Content-Length")
        body = self.rfile.read(length)
        encoding = self.headers.get("content-encoding") or "identity"
        if encoding == "zstd":
            return decompress(body)
        if encoding != "identity":
            raise RequestError(f"the sandbox reads bodies in zstd or plain, not in {encoding}")
        return body

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)
