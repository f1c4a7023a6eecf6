"""The Tinker protocol over HTTP, on the loopback interface, for the official client to train on."""

from __future__ import annotations

import ipaddress
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..errors import RequestError
from .api import Api
from .faults import FaultPlan, Faults
from .http_server import HttpServer
from .model import LanguageModel
from .state import TOKENIZER, State
from .trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from torch import Tensor

__all__ = ["SandboxServer"]


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
    where the next server finds them. ``faults`` are what goes wrong.
    ``session_seconds`` is how long a session lives of which nothing is heard (official clients send
    a heartbeat every 10 s); None, forever.

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
        faults: Faults | None = None,
        session_seconds: float | None = None,
    ) -> None:
        if faults is not None and not isinstance(faults, Faults):
            raise RequestError(f"expected Faults(…), got {faults!r}", path="faults")
        if session_seconds is not None:
            number = isinstance(session_seconds, int | float)
            if not number or isinstance(session_seconds, bool) or not session_seconds > 0:
                raise RequestError(
                    f"expected more than 0 seconds or None, got {session_seconds!r}",
                    path="session_seconds",
                )
        # The first optimizer of a process has torch import its compiler, which takes a second and
        # more: not while a client waits for its model. This checks the seed, too.
        LanguageModel(seed)
        self._trainer = Trainer(seed, session_seconds)
        self._state = State(seed, self._trainer, None if state is None else Path(state))
        self._faults = None if faults is None else FaultPlan(faults)
        api = Api(self._trainer, self._state, self._faults, dict(client_config or {}), poll_seconds)
        self._http = HttpServer(_loopback(host), port, api, self._faults)
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

    @property
    def faults_struck(self) -> dict[str, int]:
        """How often each kind of fault has struck so far, by its name in ``Faults``."""
        return {} if self._faults is None else self._faults.struck

    def close(self) -> None:
        """Stop serving; requests that are being answered end first, those that wait fail."""
        if self._faults is not None:
            self._faults.close()
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
