"""Sessions, models and the order in which a model's requests run.

A Tinker client numbers the training calls of a model from 1 without gaps and may send the chunks
of one call in any order. So each model executes by number, on a thread of its own, and holds
everything behind a gap.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from .errors import ClosedError, ExpiredError, UnknownError
from .futures import Futures
from .model import LanguageModel

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["ClosedError", "Operation", "Result", "Trainer", "TrainingRun", "UnknownError"]

Result = Any  # of an operation: ForwardBackwardResult, Sample or a dict for JSON
Operation = Callable[[LanguageModel], Result]

_FINGERPRINTS_KEPT = 4096


@dataclass
class TrainingRun:
    """One model and its requests by ``seq_id``."""

    model_id: str
    base_model: str
    lora_rank: int | None
    model: LanguageModel
    futures: Futures
    user_metadata: dict[str, Any] | None = None
    last_request: float = field(default_factory=time.time)
    _executor: ThreadPoolExecutor = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _next: int = 1
    _held: dict[int, tuple[Operation, Future[Result]]] = field(default_factory=dict)
    _fingerprints: OrderedDict[int, object] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"sandbox {self.model_id}")

    def submit(self, seq_id: int, operation: Operation, fingerprint: object) -> None:
        """Execute ``operation`` once every smaller ``seq_id`` has been executed.

        A client that lost an answer sends the same request again: the same ``seq_id`` with the
        same ``fingerprint`` (anything with equality) changes nothing.

        :raises RequestError: ``seq_id`` is not positive, or another request had it.
        """
        if isinstance(seq_id, bool) or not isinstance(seq_id, int) or seq_id < 1:
            raise RequestError(
                f"expected an integer of at least 1, got {seq_id!r}: the training calls of a model "
                "are numbered from 1",
                path="seq_id",
            )
        with self._lock:
            if self._repeats(seq_id, fingerprint):
                return
            self.last_request = time.time()
            future = self.futures.add(f"{self.model_id}/{seq_id}")
            self._fingerprints[seq_id] = fingerprint
            self._held[seq_id] = operation, future
            while self._next in self._held:
                self._executor.submit(self._execute, *self._held.pop(self._next))
                self._next += 1
            while len(self._fingerprints) > _FINGERPRINTS_KEPT:
                self._fingerprints.popitem(last=False)

    def future(self, seq_id: int) -> Future[Result]:
        """The future of a submitted request."""
        return self.futures.get(f"{self.model_id}/{seq_id}")

    def missing(self, seq_id: int) -> int | None:
        """The ``seq_id`` that has to arrive before ``seq_id`` can be executed, if one has."""
        with self._lock:
            return self._next if seq_id in self._held else None

    def close(self) -> None:
        """Fail what is held and wait for what is executing."""
        with self._lock:
            held = [future for _, future in self._held.values()]
            self._held.clear()
        for future in held:
            future.set_exception(ClosedError("the sandbox was closed"))
        self._executor.shutdown(wait=True, cancel_futures=True)
        self.futures.close(self.model_id)

    def _repeats(self, seq_id: int, fingerprint: object) -> bool:
        if seq_id in self._fingerprints:
            if self._fingerprints[seq_id] == fingerprint:
                return True
        elif seq_id >= self._next:
            return False
        raise RequestError(
            f"seq_id {seq_id} of the model {self.model_id} was already used by another request; "
            f"the next is {self._next}. A second client of one model has to go on where the first "
            "stopped; to start over, create a model",
            path="seq_id",
        )

    def _execute(self, operation: Operation, future: Future[Result]) -> None:
        try:
            future.set_result(operation(self.model))
        except Exception as error:
            future.set_exception(error)


class Trainer:
    """Everything that clients of one server have created.

    ``seed`` initializes the models of clients that name none. A session of which nothing was heard
    for ``session_seconds`` by ``clock`` is forgotten with its models, at the next request of any.
    """

    def __init__(
        self,
        seed: int = 0,
        session_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seed = seed
        self._session_seconds = session_seconds
        self._clock = clock
        self._heard: dict[str, float] = {}
        self._expired: set[str] = set()
        self.futures = Futures()
        self._sessions: dict[str, dict[str, Any]] = {}
        self._runs: dict[str, TrainingRun] = {}
        self._lock = threading.Lock()

    def create_session(self, user_metadata: dict[str, Any] | None = None) -> str:
        """A name that no session of any sandbox had."""
        with self._lock:
            session_id = f"sandbox-{uuid.uuid4().hex[:16]}"
            self._sessions[session_id] = user_metadata or {}
            self._heard[session_id] = self._clock()
        return session_id

    def check_session(self, session_id: object) -> None:
        """Something was heard of this session.

        :raises UnknownError: there is no such session.
        :raises ExpiredError: too late.
        """
        self._hear_of(session_id)
        if not isinstance(session_id, str) or session_id not in self._sessions:
            raise UnknownError(
                f"there is no session {session_id!r} here; sandboxes forget theirs when they end",
                path="session_id",
            )

    def forget_silent(self) -> None:
        """Forget the sessions of which nothing was heard for too long."""
        if self._session_seconds is None:
            return
        now = self._clock()
        with self._lock:
            silent = [i for i, at in self._heard.items() if now - at > self._session_seconds]
            self._expired.update(silent)
        for session_id in silent:
            self._forget(session_id)

    def _hear_of(self, session_id: object) -> None:
        """Something names this session.

        :raises ExpiredError: too late.
        """
        self.forget_silent()
        if not isinstance(session_id, str):
            return
        with self._lock:
            if session_id in self._heard:
                self._heard[session_id] = self._clock()
        if session_id in self._expired:
            raise ExpiredError(
                f"the session {session_id!r} has expired with its models: nothing was heard of it "
                f"for {self._session_seconds:g} s. Load its checkpoints in another",
                path="session_id",
            )

    def create_model(
        self,
        session_id: object,
        model_seq_id: object,
        *,
        base_model: str = "sandbox",
        seed: int | None = None,
        lora_rank: int | None = None,
        user_metadata: dict[str, Any] | None = None,
        state: Mapping[str, Tensor] | None = None,
        optimizer: bool = False,
    ) -> str:
        """The id of a new model, or of the one that this session created under that number."""
        self.check_session(session_id)
        model_id = f"{session_id}:train:{model_seq_id}"
        with self._lock:
            if model_id not in self._runs:
                model = LanguageModel(self._seed if seed is None else seed)
                if state is not None:
                    model.load(state, optimizer=optimizer)
                self._runs[model_id] = TrainingRun(
                    model_id, base_model, lora_rank, model, self.futures, user_metadata
                )
        return model_id

    def run(self, model_id: object) -> TrainingRun:
        """:raises UnknownError: there is no such model.
        :raises ExpiredError: its session has expired.
        """
        if isinstance(model_id, str):
            self._hear_of(model_id.partition(":")[0])
        run = self._runs.get(model_id) if isinstance(model_id, str) else None
        if run is None:
            known = ", ".join(self._runs) or "none yet"
            raise UnknownError(
                f"there is no model {model_id!r} here; the models are: {known}", path="model_id"
            )
        return run

    def unload_model(self, model_id: object) -> None:
        """Forget a model."""
        run = self.run(model_id)
        with self._lock:
            self._runs.pop(run.model_id, None)
        run.close()

    @property
    def sessions(self) -> dict[str, dict[str, Any]]:
        """The metadata of each session that was created, and is not finished."""
        return dict(self._sessions)

    def finish_session(self, session_id: object) -> None:
        """Forget a session and its models."""
        self.check_session(session_id)
        self._forget(str(session_id))

    def _forget(self, session_id: str) -> None:
        with self._lock:
            self._sessions.pop(session_id, None)
            self._heard.pop(session_id, None)
            gone = [i for i in self._runs if i.startswith(f"{session_id}:")]
            runs = [self._runs.pop(i) for i in gone]
        for run in runs:
            run.close()

    @property
    def model_ids(self) -> list[str]:
        """In the order of their creation."""
        return list(self._runs)

    def close(self) -> None:
        """Forget every model; requests that wait are answered with an error."""
        with self._lock:
            runs = list(self._runs.values())
            self._runs.clear()
        for run in runs:
            run.close()
