"""The native face: structured regularizers on a training client of the official tinker SDK.

The SDK takes one custom loss and cannot bear its failure: an exception in it ends the training
client for good. Here the SDK is handed a loss that never raises. If a term fails, the step sends
zero weights, the *returned* future raises, and the client goes on.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from collections.abc import Sequence
from typing import Any

import tinker
import torch
from tinker import APIFuture, Datum, ForwardBackwardOutput, TrainingClient
from torch import Tensor

from ..composer import Composer
from ..record import StepRecord
from ..regularizer import LossFn
from ..tensors.gradients import surrogate
from .futures import StepFuture, concurrent_future, settle, with_telemetry, withdrawable
from .linear import Regularizers, composer_of, linearize, sdk_loss
from .training_client import RegularizedTrainingClient, with_regularizers

__all__ = [
    "RegularizedTrainingClient",
    "forward_backward_custom",
    "forward_backward_custom_async",
    "linearize",
    "with_regularizers",
]

logger = logging.getLogger(__name__)

# From this version on the SDK reserves a place for both passes when it is called, and returns.
_RETURNS_AT_ONCE = tuple(int(part) for part in tinker.__version__.split(".")[:2]) >= (0, 38)


def forward_backward_custom(
    training_client: TrainingClient | RegularizedTrainingClient,
    data: list[Datum],
    base_loss_fn: LossFn | None = None,
    regularizers: Regularizers | None = None,
    *,
    step: int = 0,
    flat_metrics: bool = False,
) -> APIFuture[ForwardBackwardOutput]:
    """Forward pass, composed loss, backward pass.

    It keeps the SDK's order: ``optim_step`` may be submitted right behind it. Without
    ``regularizers`` it is the SDK's own ``forward_backward_custom(data, base_loss_fn)``: the same
    future, metrics and parameters.

    Args:
        training_client: a client of the SDK, or what :func:`with_regularizers` made of one.
        data: the datums, each with ``target_tokens``.
        base_loss_fn: ``fn(data, logprobs) -> (loss, metrics)``, a ``tinker.LossHandle``, or a
            :class:`Composer` (then without ``regularizers``); or None.
        regularizers: :class:`Regularizer`\\ s or dicts with ``fn``, ``weight``, ``name`` and any
            option of a Regularizer.
        step: the training step, for weight schedules.
        flat_metrics: False puts the nested telemetry into the result's ``metrics``; True its flat
            form, floats alone, for loggers.

    Returns:
        The future of the backward pass. Its ``metrics`` are the SDK's and the telemetry;
        ``loss:sum`` is the composed loss.

    Raises:
        RequestError: an argument is wrong. Raised here; nothing has been sent.

    What goes wrong in the step itself is raised by the future, while the client goes on with a
    step that contributes nothing: :class:`TermError` and its subclasses.
    """
    if isinstance(training_client, RegularizedTrainingClient):
        return training_client.forward_backward_custom(
            data, base_loss_fn, regularizers, step=step, flat_metrics=flat_metrics
        )
    loss = _surrogate_loss(base_loss_fn, regularizers, step)
    if loss is None:
        return training_client.forward_backward_custom(data, sdk_loss(base_loss_fn))
    return loss.future(training_client.forward_backward_custom(data, loss), flat_metrics)


async def forward_backward_custom_async(
    training_client: TrainingClient | RegularizedTrainingClient,
    data: list[Datum],
    base_loss_fn: LossFn | None = None,
    regularizers: Regularizers | None = None,
    *,
    step: int = 0,
    flat_metrics: bool = False,
) -> APIFuture[ForwardBackwardOutput]:
    """:func:`forward_backward_custom` for async code: awaited, it gives the future.

    With tinker before 0.38 the SDK runs the loss before it returns: on the event loop of the
    caller here, on its own in the sync form.
    """
    if _RETURNS_AT_ONCE or isinstance(training_client, RegularizedTrainingClient):
        return forward_backward_custom(
            training_client, data, base_loss_fn, regularizers, step=step, flat_metrics=flat_metrics
        )
    loss = _surrogate_loss(base_loss_fn, regularizers, step)
    if loss is None:
        return await training_client.forward_backward_custom_async(data, sdk_loss(base_loss_fn))
    inner = await training_client.forward_backward_custom_async(data, loss)
    return loss.future(inner, flat_metrics)


def _surrogate_loss(
    base_loss_fn: Any, regularizers: Regularizers | None, step: int
) -> _SurrogateLoss | None:
    """The loss to hand to the SDK; None: hand it ``base_loss_fn`` as it is."""
    if regularizers is None and not isinstance(base_loss_fn, Composer):
        return None
    return _SurrogateLoss(composer_of(base_loss_fn, regularizers, step), step)


class _SurrogateLoss:
    """A custom loss for the SDK that computes one step and never raises."""

    def __init__(self, composer: Composer, step: int) -> None:
        self._composer = composer
        self._step = step
        self._cancelled = threading.Event()
        self._telemetry: StepRecord | None = None
        self._failure: BaseException | None = None

    def __call__(
        self, data: Sequence[Datum], logprobs: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        try:
            composition = self._composer.compute(
                data, logprobs, step=self._step, cancelled=self._cancelled
            )
        # This runs on the SDK's event loop: KeyboardInterrupt or SystemExit would end the loop,
        # and every client of the process would wait for ever.
        except BaseException as failure:
            logger.error("step %d contributes nothing: %s", self._step, failure)
            self._failure = failure
            return surrogate(0.0, [torch.zeros_like(t) for t in logprobs], logprobs), {}
        self._telemetry = composition.telemetry
        return surrogate(composition.loss_total, composition.gradients, logprobs), {}

    def future(
        self, inner: APIFuture[ForwardBackwardOutput], flat: bool
    ) -> StepFuture[ForwardBackwardOutput]:
        """The future for the caller, over the SDK's."""
        # The SDK's own future is never cancelled: that would end the client.
        outer: concurrent.futures.Future[ForwardBackwardOutput] = withdrawable(self._cancelled)

        def outcome(done: concurrent.futures.Future[ForwardBackwardOutput]) -> Any:
            output = done.result()
            if self._failure is not None:
                raise self._failure
            assert self._telemetry is not None
            return with_telemetry(output, self._telemetry, flat)

        concurrent_future(inner).add_done_callback(
            lambda done: settle(outer, lambda: outcome(done))
        )
        return StepFuture(outer)
