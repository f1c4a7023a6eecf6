"""Sampling sessions: fixed weights under a name, and the threads that draw from them."""

from __future__ import annotations

import threading
import uuid
import zlib
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from .errors import UnknownError
from .sampling import SampleRequest, sample

if TYPE_CHECKING:
    from .futures import Futures
    from .model import LanguageModel

__all__ = ["Sampler", "Samplers"]

_SAMPLERS_KEPT = 128


@dataclass(frozen=True)
class Sampler:
    """Weights that nobody trains. ``number`` makes its draws differ from another sampler's."""

    sampler_id: str
    number: int
    model: LanguageModel
    model_path: str | None


class Samplers:
    """The sampling sessions of a server; the latest of them, since each holds its weights."""

    def __init__(self, seed: int, futures: Futures) -> None:
        self._seed = seed
        self._futures = futures
        self._samplers: OrderedDict[str, Sampler] = OrderedDict()
        self._created = 0
        self._lock = threading.Lock()
        self._executor = ThreadPoolExecutor(2, thread_name_prefix="sandbox sampling")

    def create(
        self, session_id: object, seq_id: object, model: LanguageModel, model_path: str | None
    ) -> str:
        """The id of a new sampler, or of the one that this session created under that number."""
        sampler_id = f"{session_id}:sample:{seq_id}"
        with self._lock:
            if sampler_id not in self._samplers:
                self._samplers[sampler_id] = Sampler(sampler_id, self._created, model, model_path)
                self._created += 1
                while len(self._samplers) > _SAMPLERS_KEPT:
                    self._samplers.popitem(last=False)
        return sampler_id

    def get(self, sampler_id: object) -> Sampler:
        """:raises UnknownError: there is no such sampler, or no more."""
        with self._lock:
            sampler = self._samplers.get(sampler_id) if isinstance(sampler_id, str) else None
        if sampler is None:
            raise UnknownError(
                f"there is no sampler {sampler_id!r} here; the sandbox keeps the latest "
                f"{_SAMPLERS_KEPT}",
                path="sampling_session_id",
            )
        return sampler

    def ids(self, session_id: str) -> list[str]:
        """The samplers of a session, in order."""
        with self._lock:
            return [i for i in self._samplers if i.startswith(f"{session_id}:")]

    def submit(self, sampler_id: object, seq_id: object, request: SampleRequest) -> str:
        """The id of a request that will be answered in its turn."""
        sampler = self.get(sampler_id)
        if isinstance(seq_id, bool) or not isinstance(seq_id, int):
            raise RequestError(f"expected an integer, got {seq_id!r}", path="seq_id")
        # A retried sample is a new submission under its old number; each has its own result.
        request_id = f"{sampler.sampler_id}/sample-{seq_id}-{uuid.uuid4().hex[:8]}"
        future = self._futures.add(request_id)
        drawn_by = zlib.crc32(f"{self._seed}/{sampler.number}/{seq_id}".encode())
        self._executor.submit(_answer, future, sampler.model, request, drawn_by)
        return request_id

    def close(self) -> None:
        """Fail what waits."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        for sampler_id in self._samplers:
            self._futures.close(sampler_id)


def _answer(future: Future[Any], model: LanguageModel, request: SampleRequest, seed: int) -> None:
    try:
        future.set_result(sample(model, request, seed))
    except Exception as error:
        future.set_exception(error)
