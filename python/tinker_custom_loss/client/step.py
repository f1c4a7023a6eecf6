"""One custom step of one client, driven here: forward pass, composed loss, backward pass."""

from __future__ import annotations

import abc
import concurrent.futures
import dataclasses
import logging
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from tinker import APIFuture, Datum, ForwardBackwardOutput, TrainingClient, types

from ..composer import Composer
from ..composition import Composition
from ..errors import RequestError
from ..record import StepRecord, flatten, merge, metrics_of
from ..running.threads import THREADS
from . import sdk
from .call_queue import computing, follow
from .failures import Failures
from .futures import StepFuture, concurrent_future, settle, withdrawable
from .linear import forward_data, linearize_with, zero_gradient

__all__ = ["CustomStep", "Step", "StepOutput", "step_output", "with_records"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class StepOutput(ForwardBackwardOutput):
    """What the future of a step with regularizers gives: the SDK's output, and the record.

    Attributes:
        metrics: the SDK's, the base loss's own, and the record of the step, nested or flat.
            ``loss:sum`` is the loss itself, ``surrogate_loss:sum`` the server's linear one, with
            every version of the SDK.
        record: what each term did, nested; see docs/record.md.
    """

    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    record: StepRecord = dataclasses.field(kw_only=True)


def step_output(output: ForwardBackwardOutput, record: StepRecord, flat: bool) -> StepOutput:
    """The result of the backward pass, with the step's record."""
    metrics: dict[str, Any] = dict(output.metrics)
    surrogate = metrics.pop("surrogate_loss:sum", metrics.get("loss:sum", math.nan))
    metrics.update(metrics_of(record, flat=flat))
    if not math.isnan(surrogate):  # not every server tells
        metrics["surrogate_loss:sum"] = surrogate
    metrics["loss:sum"] = record["loss_total"]
    kind, outputs = output.loss_fn_output_type, output.loss_fn_outputs
    return StepOutput(kind, outputs, metrics, record=record)


def with_records(
    response: APIFuture[types.OptimStepResponse],
    steps: Sequence[concurrent.futures.Future[StepOutput]],
) -> StepFuture[types.OptimStepResponse]:
    """The response to an optimizer step, once it and its steps are there, with their record."""
    inner = concurrent_future(response)
    outer: concurrent.futures.Future[types.OptimStepResponse] = concurrent.futures.Future()
    waiting: list[concurrent.futures.Future[Any]] = [inner, *steps]

    def next_one(_: object) -> None:
        while waiting and waiting[0].done():
            waiting.pop(0)
        if waiting:
            waiting[0].add_done_callback(next_one)
        else:
            settle(outer, outcome)

    def outcome() -> types.OptimStepResponse:
        answer = inner.result()
        # What a step failed of, its own future raises.
        done = [step for step in steps if not step.cancelled() and step.exception() is None]
        records = [step.result().record for step in done]
        if not records:
            return answer
        try:
            record = merge(records)
        except RequestError as error:  # other terms or weights
            _warn_of_the_others(str(error))
            record = records[-1]
        metrics = {**flatten(record), **(answer.metrics or {})}
        return answer.model_copy(update={"metrics": metrics})

    next_one(None)
    return StepFuture(outer)


_warned: set[str] = set()


def _warn_of_the_others(why: str) -> None:
    """Once a process: a loop that mixes steps does so at every one."""
    if not _warned:
        _warned.add(why)
        logger.warning(
            "the metrics of optim_step have the record of the last step before it alone, now and "
            "wherever the terms or weights of its steps differ: %s",
            why,
        )


class Step(abc.ABC):
    """One call of a loop's that is several requests, and ``future``, which it gets for it."""

    def __init__(
        self,
        client: TrainingClient,
        data: list[Datum],
        composer: Composer,
        step: int,
        totals: Mapping[str, Any] | None,
        flat: bool,
        failures: Failures,
    ) -> None:
        self._cancelled = threading.Event()
        self.future: concurrent.futures.Future[StepOutput] = withdrawable(self._cancelled)
        self._client = client
        self._data = data
        self._composer = composer
        self._step = step
        self._totals = totals
        self._flat = flat
        self._failures = failures
        self._era = failures.era

    def run(self) -> None:
        """Returns as soon as the last request has taken its place in the order of requests."""
        follow(self.future, self._submit)

    @abc.abstractmethod
    def _submit(self) -> APIFuture[StepOutput]:
        """All requests, the last of them under way."""

    def _linearized(self, output: ForwardBackwardOutput) -> tuple[list[Datum], Composition]:
        """The datums of the backward pass for the logprobs that the server gave."""
        with computing(self._client):
            return linearize_with(
                self._composer, self._data, output, self._step, self._totals, self._cancelled
            )

    def _report(self, what: str, error: BaseException, *how: str) -> None:
        if not THREADS.ending:
            self._failures.report(what, error, self._era, *how)


class CustomStep(Step):
    """Two requests, with the loss between them."""

    def _submit(self) -> APIFuture[StepOutput]:
        self._failures.refuse(self._era)
        try:
            forward = self._client.forward(forward_data(self._data), sdk.LOSS).result()
        except BaseException as error:
            self._report(f"step {self._step}, whose forward pass the server refused,", error)
            raise
        failure: BaseException | None = None
        record: StepRecord | None = None
        try:
            linear, composition = self._linearized(forward)
            record = composition.record
        except BaseException as error:
            if THREADS.ending:  # Python ends, and nothing more is sent
                raise
            self._report(f"step {self._step}", error)
            failure, linear = error, zero_gradient(self._data)
        # Also when the step failed: the requests are the same whatever a term does.
        backward = concurrent_future(self._client.forward_backward(linear, sdk.LOSS))
        outer: concurrent.futures.Future[StepOutput] = concurrent.futures.Future()

        def outcome() -> StepOutput:
            if failure is not None:
                raise failure
            try:
                output = backward.result()
            except BaseException as error:
                self._report(
                    f"step {self._step}, whose backward pass the server refused,",
                    error,
                    "contributes nothing, or some of the chunks that the SDK sent it in",
                )
                raise
            assert record is not None
            return step_output(output, record, self._flat)

        backward.add_done_callback(lambda _: settle(outer, outcome))
        return StepFuture(outer)
