"""The plain function: a step with regularizers on a bare client, kept in order by the SDK.

The SDK takes one custom loss and cannot bear its failure: an exception in it ends the training
client for good. Here the SDK is handed a loss that never raises. If a term fails, the step sends
zero weights, the *returned* future raises, and the client goes on.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tinker import APIFuture, Datum, ForwardBackwardOutput, TrainingClient
from torch import Tensor

from ..composer import Composer
from ..record import StepRecord
from ..tensors.gradients import surrogate
from . import sdk
from .arguments import (
    BaseLoss,
    Regularizers,
    checked_client,
    checked_data,
    checked_step,
    composer_of,
    is_composed,
    no_totals,
    sdk_loss,
)
from .call_queue import computing, refuse_within
from .futures import StepFuture, concurrent_future, settle, withdrawable
from .step import StepOutput, step_output
from .training_client import RegularizedTrainingClient

__all__ = ["forward_backward_custom", "forward_backward_custom_async"]

logger = logging.getLogger(__name__)


def forward_backward_custom(
    training_client: TrainingClient,
    data: Iterable[Datum],
    base_loss_fn: BaseLoss | None = None,
    regularizers: Regularizers | None = None,
    *,
    step: int | None = None,
    totals: Mapping[str, Any] | None = None,
    flat_metrics: bool = False,
) -> APIFuture[Any]:
    """Forward pass, composed loss, backward pass, on a client that is not wrapped.

    It keeps the SDK's order: ``optim_step`` may be submitted right behind it. Without
    ``regularizers`` it is the SDK's own ``forward_backward_custom(data, base_loss_fn)``: the same
    future, metrics and parameters. :func:`with_regularizers` is faster, counts the steps itself,
    and lets the terms of several clients run at the same time.

    Args:
        training_client: a client of the SDK, or what :func:`with_regularizers` made of one.
        data: the datums, each with ``target_tokens``.
        base_loss_fn: ``fn(data, logprobs) -> (loss, metrics)``, a ``tinker.LossHandle``, or a
            :class:`Composer` (then without ``regularizers``); or None.
        regularizers: :class:`Regularizer`\\ s or dicts with the options of one.
        step: the training step; needed if a weight is a function of it.
        totals: of the whole step, where these datums are a part of it: :meth:`Composer.totals`.
        flat_metrics: False puts the nested record into the result's ``metrics``; True its flat
            form, floats alone, for loggers.

    Returns:
        The future of the backward pass: a :class:`StepOutput`, whose ``loss:sum`` is the composed
        loss.

    Raises:
        RequestError: an argument is wrong. Raised here; nothing has been sent.

    What goes wrong in the step itself is raised by the future, while the client goes on with a
    step that contributes nothing: :class:`TermError` and its subclasses.
    """
    if isinstance(training_client, RegularizedTrainingClient):
        wrapped: Any = training_client
        future: APIFuture[Any] = wrapped.forward_backward_custom(
            data,
            base_loss_fn,
            regularizers,
            step=step,
            totals=totals,
            flat_metrics=flat_metrics or None,
        )
        return future
    client, datums, loss = _checked(training_client, data, base_loss_fn, regularizers, step, totals)
    if not isinstance(loss, _SurrogateLoss):
        return sdk.forward_backward_custom(client, datums, loss)
    with loss.logging_refusal():  # before tinker 0.38 by the call itself
        inner = sdk.forward_backward_custom(client, datums, loss)
    return loss.future(inner, flat_metrics)


async def forward_backward_custom_async(
    training_client: TrainingClient,
    data: Iterable[Datum],
    base_loss_fn: BaseLoss | None = None,
    regularizers: Regularizers | None = None,
    *,
    step: int | None = None,
    totals: Mapping[str, Any] | None = None,
    flat_metrics: bool = False,
) -> APIFuture[Any]:
    """:func:`forward_backward_custom` for async code: awaited, it gives the future.

    With tinker before 0.38 the SDK runs the loss before it returns: on the event loop of the
    caller here, on its own in the sync form.
    """
    if sdk.RETURNS_AT_ONCE or isinstance(training_client, RegularizedTrainingClient):
        return forward_backward_custom(
            training_client,
            data,
            base_loss_fn,
            regularizers,
            step=step,
            totals=totals,
            flat_metrics=flat_metrics,
        )
    client, datums, loss = _checked(training_client, data, base_loss_fn, regularizers, step, totals)
    if not isinstance(loss, _SurrogateLoss):
        return await client.forward_backward_custom_async(datums, loss)
    with loss.logging_refusal():
        inner = await client.forward_backward_custom_async(datums, loss)
    return loss.future(inner, flat_metrics)


def _checked(
    training_client: TrainingClient,
    data: Iterable[Datum],
    base_loss_fn: BaseLoss | None,
    regularizers: Regularizers | None,
    step: int | None,
    totals: Mapping[str, Any] | None,
) -> tuple[TrainingClient, list[Datum], Any]:
    """The client, the datums, and the loss to hand to the SDK."""
    refuse_within(_SDK_THREAD, "forward_backward_custom")
    client = checked_client(training_client)
    datums = checked_data(data)
    number = checked_step(step)
    if not is_composed(base_loss_fn, regularizers):
        no_totals(totals)
        return client, datums, sdk_loss(base_loss_fn, datums, client)
    composer = composer_of(base_loss_fn, regularizers, datums, client)
    composer.check_step(number)
    if totals is not None:
        composer.check_totals(totals, datums)
    return client, datums, _SurrogateLoss(client, composer, number, totals)


# The SDK computes the losses of all clients on one thread: a term that waits for another step
# waits for itself.
_SDK_THREAD = object()


class _SurrogateLoss:
    """A custom loss for the SDK that computes one step and never raises."""

    def __init__(
        self,
        client: TrainingClient,
        composer: Composer,
        step: int | None,
        totals: Mapping[str, Any] | None,
    ) -> None:
        self._client = client
        self._composer = composer
        self._step = step
        self._totals = totals
        self._cancelled = threading.Event()
        self._record: StepRecord | None = None
        self._failure: BaseException | None = None

    def __call__(
        self, data: Sequence[Datum], logprobs: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        try:
            with computing(self._client), computing(_SDK_THREAD):
                composition = self._composer.compute(
                    data,
                    logprobs,
                    step=self._step,
                    totals=self._totals,
                    cancelled=self._cancelled,
                )
        # This runs on the SDK's event loop: KeyboardInterrupt or SystemExit would end the loop,
        # and every client of the process would wait for ever.
        except BaseException as failure:
            logger.error("%s contributes nothing: %s", self._name, failure)
            self._failure = failure
            return surrogate(0.0, [torch.zeros_like(t) for t in logprobs], logprobs), {}
        self._record = composition.record
        return surrogate(composition.loss_total, composition.gradients, logprobs), {}

    @property
    def _name(self) -> str:
        return "a step" if self._step is None else f"step {self._step}"

    @contextlib.contextmanager
    def logging_refusal(self) -> Iterator[None]:
        """Log what the server raises, which loses the step."""
        try:
            yield
        except BaseException as error:
            logger.error("%s, which the server refused, contributes nothing: %s", self._name, error)
            raise

    def future(self, inner: APIFuture[ForwardBackwardOutput], flat: bool) -> StepFuture[StepOutput]:
        """The future for the caller, over the SDK's."""
        # The SDK's own future is never cancelled: that would end the client.
        outer: concurrent.futures.Future[StepOutput] = withdrawable(self._cancelled)

        def outcome(done: concurrent.futures.Future[ForwardBackwardOutput]) -> StepOutput:
            with self.logging_refusal():
                output = done.result()
            if self._failure is not None:
                raise self._failure
            assert self._record is not None
            return step_output(output, self._record, flat)

        concurrent_future(inner).add_done_callback(
            lambda done: settle(outer, lambda: outcome(done))
        )
        return StepFuture(outer)
