"""Faults on request: what a service does on a bad day, for tests of what should survive it."""

from __future__ import annotations

import math
import random
import threading
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import RequestError
from .losses import LOSSES
from .model import ForwardBackwardResult

if TYPE_CHECKING:
    from .model import LanguageModel
    from .trainer import Result
    from .wire import TrainingCall

__all__ = ["FAULTY_ENDPOINTS", "FaultPlan", "Faults"]

# Those that a client may send again: what it is told twice to do, the sandbox does once.
FAULTY_ENDPOINTS = (
    *("forward", "forward_backward", "optim_step", "retrieve_future", "asample"),
    *("save_weights", "save_weights_for_sampler", "load_weights"),
)


@dataclass(frozen=True)
class Faults:
    """What goes wrong, and how often: shares from 0 to 1, times in seconds.

    ``latency``
        Every answer takes up to this much longer, uniformly.
    ``server_errors``, ``rate_limits``
        Share of requests that are not carried out, but answered with a status of 500, 502 or 503,
        or of 429, and a ``retry-after`` of ``retry_after``.
    ``lost_requests``, ``lost_answers``
        Share of requests whose connection ends before they are carried out, or after it.
    ``nan_logprobs``
        Share of ``forward`` and ``forward_backward`` calls in whose answer one logprob is NaN. The
        model's own are not.
    ``refused_losses``
        Losses of the service that ``forward`` and ``forward_backward`` refuse.
    ``slow_futures``
        Share of training calls that take ``slow_seconds`` longer, and those behind them with them.

    ``endpoints`` limits all but ``nan_logprobs``, ``refused_losses`` and ``slow_futures`` to these;
    ``at_most`` is how often each kind of fault strikes in all (latency, and losses that are
    refused, are not counted). What strikes the n-th request to an endpoint depends on ``seed`` and
    n alone.

    :raises RequestError: an option is out of its range.
    """

    seed: int = 0
    latency: float = 0.0
    server_errors: float = 0.0
    rate_limits: float = 0.0
    retry_after: float = 0.1
    lost_requests: float = 0.0
    lost_answers: float = 0.0
    nan_logprobs: float = 0.0
    refused_losses: tuple[str, ...] = ()
    slow_futures: float = 0.0
    slow_seconds: float = 1.0
    endpoints: tuple[str, ...] = FAULTY_ENDPOINTS
    at_most: int | None = None

    def __post_init__(self) -> None:
        for name in ("server_errors", "rate_limits", "lost_requests", "lost_answers"):
            self._check(name, at_most=1)
        for name in ("nan_logprobs", "slow_futures"):
            self._check(name, at_most=1)
        for name in ("latency", "slow_seconds", "retry_after"):
            self._check(name, at_most=60)
        if self.retry_after == 0:
            raise RequestError(
                "expected more than 0 seconds: clients take 0 for no retry-after at all",
                path="faults.retry_after",
            )
        self._check_whole("seed", self.seed)
        if self.at_most is not None:
            self._check_whole("at_most", self.at_most)
        self._check_names("refused_losses", tuple(LOSSES))
        self._check_names("endpoints", FAULTY_ENDPOINTS)

    def _check(self, name: str, *, at_most: int) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not 0 <= value <= at_most:
            what = "a share from 0 to 1" if at_most == 1 else f"seconds from 0 to {at_most}"
            raise RequestError(f"expected {what}, got {value!r}", path=f"faults.{name}")

    def _check_whole(self, name: str, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise RequestError(
                f"expected an integer of at least 0, got {value!r}", path=f"faults.{name}"
            )

    def _check_names(self, name: str, known: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if not isinstance(value, tuple | list):
            raise RequestError(f"expected a tuple of names, got {value!r}", path=f"faults.{name}")
        for each in value:
            if each not in known:
                raise RequestError(
                    f"expected some of {', '.join(known)}, got {each!r}", path=f"faults.{name}"
                )
        object.__setattr__(self, name, tuple(value))


@dataclass(frozen=True)
class FaultOnTheWay:
    """What happens to a request instead of being done (``lost``, ``status``), or once it is."""

    lost: bool = False
    answer_lost: bool = False
    status: int | None = None
    retry_after: float = 0.0


_KINDS_ON_THE_WAY = ("lost_requests", "server_errors", "rate_limits", "lost_answers")


class FaultPlan:
    """Which requests the faults strike, and how often each kind has struck."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._closing = threading.Event()
        self._draws: dict[str, random.Random] = {}
        self._struck: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def struck(self) -> dict[str, int]:
        with self._lock:
            return dict(self._struck)

    def on_the_way(self, endpoint: str) -> FaultOnTheWay | None:
        """What strikes this request, once its latency has passed."""
        if endpoint not in self._faults.endpoints:
            return None
        with self._lock:
            draw = self._draw(endpoint)
            # Always as many draws, so that one option does not move what another strikes.
            wait, status = self._faults.latency * draw.random(), draw.choice((500, 502, 503))
            drawn = [(kind, draw.random()) for kind in _KINDS_ON_THE_WAY]
            kind = next((kind for kind, drawn in drawn if self._strikes(kind, drawn)), None)
            if kind is not None:
                self._struck[kind] += 1
        self._closing.wait(wait)
        if kind is None:
            return None
        return FaultOnTheWay(
            lost=kind == "lost_requests",
            answer_lost=kind == "lost_answers",
            status={"server_errors": status, "rate_limits": 429}.get(kind),
            retry_after=self._faults.retry_after,
        )

    def in_execution(self, endpoint: str, call: TrainingCall) -> TrainingCall:
        """The call, with what strikes its computation.

        That is drawn when it runs, in the model's order, and so once for a call that is sent twice.
        """

        def operation(model: LanguageModel) -> Result:
            if call.loss_fn in self._faults.refused_losses:
                self._count("refused_losses")
                raise RequestError(
                    f"this sandbox was asked to refuse the loss {call.loss_fn!r}", path="loss_fn"
                )
            if self._draw_in_execution(endpoint, "slow_futures") is not None:
                self._closing.wait(self._faults.slow_seconds)
            result = call.operation(model)
            if isinstance(result, ForwardBackwardResult):
                where = self._draw_in_execution(endpoint, "nan_logprobs")
                if where is not None:
                    return _with_a_nan(result, where)
            return result

        return replace(call, operation=operation)

    def close(self) -> None:
        """End what waits."""
        self._closing.set()

    def _draw_in_execution(self, endpoint: str, kind: str) -> float | None:
        """Where this kind strikes, from 0 to 1, or None if it does not."""
        with self._lock:
            draw = self._draw(f"{endpoint}/{kind}")
            drawn, where = draw.random(), draw.random()
            if not self._strikes(kind, drawn):
                return None
            self._struck[kind] += 1
            return where

    def _count(self, kind: str) -> None:
        with self._lock:
            self._struck[kind] += 1

    def _draw(self, what: str) -> random.Random:
        return self._draws.setdefault(what, random.Random(f"{self._faults.seed}/{what}"))

    def _strikes(self, kind: str, drawn: float) -> bool:
        limit = self._faults.at_most
        return drawn < getattr(self._faults, kind) and (limit is None or self._struck[kind] < limit)


def _with_a_nan(result: ForwardBackwardResult, where: float) -> ForwardBackwardResult:
    logprobs = result.logprobs.flat.clone()
    if len(logprobs):
        logprobs[int(where * len(logprobs))] = math.nan
    return replace(result, logprobs=result.logprobs.with_flat(logprobs))
