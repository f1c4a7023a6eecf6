"""A training client whose steps take regularizers: the recommended way."""

from __future__ import annotations

import concurrent.futures
import functools
import threading
from collections.abc import Iterable, Mapping
from typing import Any, Literal, overload

from tinker import APIFuture, Datum, ForwardBackwardOutput, TrainingClient, types

from ..composer import Composer
from ..errors import RequestError
from ..observer import StepObserver, checked_observer
from . import sdk
from .arguments import (
    BaseLoss,
    Regularizers,
    checked_client,
    checked_data,
    checked_defaults,
    checked_first_step,
    checked_step,
    composer_of,
    is_composed,
    no_totals,
    plain_loss,
    sdk_loss,
)
from .call_queue import as_it_is, computing, refuse_within
from .failures import Failures, OnFailure
from .futures import StepFuture
from .native import NativeStep, native_data
from .ordered import OrderedClient
from .step import CustomStep, Step, StepOutput, with_records

__all__ = ["RegularizedTrainingClient", "with_regularizers"]


def with_regularizers(
    training_client: TrainingClient,
    *,
    base_loss: BaseLoss | None = None,
    regularizers: Regularizers | None = None,
    flat_metrics: bool = False,
    on_failure: OnFailure = "continue",
    recorder: StepObserver | None = None,
    first_step: int = 0,
) -> RegularizedTrainingClient:
    """The client, with regularizers in ``forward_backward`` and ``forward_backward_custom``::

        training_client = with_regularizers(training_client, regularizers=[…])

    All else is as before; see :class:`RegularizedTrainingClient`. From then on every call must go
    through what is returned: it cannot know of calls on the bare client, and those would overtake
    the backward pass of a step that is still computing its loss.

    Args:
        training_client: a client of the SDK.
        base_loss: the base loss of custom steps that name none.
        regularizers: those of steps that name none, so that a loop which calls
            ``forward_backward(data, "ppo")`` or ``forward_backward_custom(data, loss_fn)`` itself
            gets them.
        flat_metrics: what steps do that do not say. True also puts the record into the metrics of
            the ``optim_step`` behind them, for loops that log those.
        on_failure: what happens to the calls behind a step that failed, by a term's error or by
            the server's. ``"continue"``: they are sent; the step contributed nothing. ``"stop"``:
            they raise :class:`StoppedError`, and so does every later one that has a place in the
            order of training, until ``acknowledge_failure()``.
        recorder: a :class:`Recorder` that writes down what is composed, and keeps steps with
            regularizers if it was told to; it logs no metrics by itself.
        first_step: the training step that comes next, for weight schedules, of a run that goes on
            from a checkpoint. From there ``optim_step`` counts.

    Raises:
        RequestError: it is no training client, or an option is wrong.
    """
    client = checked_client(training_client)
    if isinstance(client, RegularizedTrainingClient):
        options = (base_loss, regularizers, flat_metrics, on_failure, recorder, first_step)
        if options == (None, None, False, "continue", None, 0):
            return client
        raise RequestError(
            "this training client has regularizers already; give the options to the call of "
            "with_regularizers that made it",
            path="training_client",
        )
    return RegularizedTrainingClient(
        client, base_loss, regularizers, flat_metrics, on_failure, recorder, first_step
    )


class RegularizedTrainingClient(OrderedClient):
    """Every method and attribute of a ``tinker.TrainingClient``, and regularizers.

    To ``isinstance`` and to type checkers it is a ``tinker.TrainingClient``. Calls are sent in
    the order in which they are made, as the SDK does it: ``optim_step`` may be submitted right
    behind a custom step. A call that has to wait for its turn returns its future at once; what
    the SDK would have raised from the call is then raised by the future.
    """

    def __init__(
        self,
        training_client: TrainingClient,
        base_loss: BaseLoss | None,
        regularizers: Regularizers | None,
        flat_metrics: bool,
        on_failure: OnFailure,
        recorder: StepObserver | None,
        first_step: int,
    ) -> None:
        super().__init__(training_client, Failures(on_failure))
        self._base_loss, self._regularizers = checked_defaults(base_loss, regularizers)
        self._flat_metrics = flat_metrics
        self._recorder = checked_observer(recorder)
        self._step_lock = threading.Lock()
        self._step = checked_first_step(first_step)  # of the calls that name none
        self._unlogged: list[concurrent.futures.Future[StepOutput]] = []  # since optim_step

    @overload  # type: ignore[override]  # it has more than the SDK's, and by other names
    def forward_backward_custom(
        self,
        data: Iterable[Datum],
        base_loss_fn: None = None,
        regularizers: None = None,
        *,
        step: int | None = None,
        totals: Mapping[str, Any] | None = None,
        flat_metrics: bool | None = None,
    ) -> APIFuture[StepOutput]: ...

    @overload
    def forward_backward_custom(
        self,
        data: Iterable[Datum],
        base_loss_fn: Composer | str | Mapping[str, Any],
        regularizers: None = None,
        *,
        step: int | None = None,
        totals: Mapping[str, Any] | None = None,
        flat_metrics: bool | None = None,
    ) -> APIFuture[StepOutput]: ...

    @overload
    def forward_backward_custom(
        self,
        data: Iterable[Datum],
        base_loss_fn: BaseLoss | None = None,
        *,
        regularizers: Regularizers,
        step: int | None = None,
        totals: Mapping[str, Any] | None = None,
        flat_metrics: bool | None = None,
        loss_fn: BaseLoss | None = None,
    ) -> APIFuture[StepOutput]: ...

    @overload
    def forward_backward_custom(
        self,
        data: Iterable[Datum],
        base_loss_fn: BaseLoss | None,
        regularizers: Regularizers,
        *,
        step: int | None = None,
        totals: Mapping[str, Any] | None = None,
        flat_metrics: bool | None = None,
    ) -> APIFuture[StepOutput]: ...

    @overload  # the SDK's own, of whose loops this is the call
    def forward_backward_custom(
        self,
        data: Iterable[Datum],
        base_loss_fn: BaseLoss | None = None,
        regularizers: None = None,
        *,
        step: int | None = None,
        totals: Mapping[str, Any] | None = None,
        flat_metrics: bool | None = None,
        loss_fn: BaseLoss | None = None,
        loss_type_input: Literal["logprobs"] | None = None,
    ) -> APIFuture[ForwardBackwardOutput]: ...

    def forward_backward_custom(
        self,
        data: Iterable[Datum],
        base_loss_fn: BaseLoss | None = None,
        regularizers: Regularizers | None = None,
        *,
        step: int | None = None,
        totals: Mapping[str, Any] | None = None,
        flat_metrics: bool | None = None,
        loss_fn: BaseLoss | None = None,
        **sdk_options: Any,
    ) -> APIFuture[Any]:
        """Forward pass, composed loss, backward pass.

        With no regularizers, neither here nor in ``with_regularizers``, this is the SDK's own
        method, with its options and its result.

        Args:
            data: the datums, each with ``target_tokens``.
            base_loss_fn: ``fn(data, logprobs) -> (loss, metrics)``, a ``tinker.LossHandle``, a
                :class:`Composer` (which has its own regularizers), or a term of this package's
                catalogue, computed here: ``"ppo"``, or ``{"fn": "ppo", "params": {…},
                "reduction": …}``; None for the default. The server's own loss of that name is
                :meth:`forward_backward`'s.
            regularizers: :class:`Regularizer`\\ s or dicts with the options of one; None for the
                default, ``[]`` for the base loss alone.
            step: the training step, for weight schedules: all calls until the next
                ``optim_step`` are of one. None is that of the call before, or one more if
                ``optim_step`` was called since; the first is ``first_step``.
            totals: of the whole step, where these datums are a part of it, and the gradients of
                several calls add up to that of the step: :meth:`Composer.totals`.
            flat_metrics: True puts the record into ``metrics`` in its flat form, for loggers.
            loss_fn: the SDK's name for ``base_loss_fn``.

        Returns:
            The future of the backward pass: a :class:`StepOutput`.

        Raises:
            RequestError: an argument is wrong. Raised here; nothing has been sent.
            StoppedError: an earlier step failed, with ``on_failure="stop"``.
        """
        refuse_within(self._client, "forward_backward_custom")
        era = self._failures.era
        self._failures.refuse(era)
        if loss_fn is not None and base_loss_fn is not None:
            raise RequestError("give either base_loss_fn or loss_fn, not both", path="loss_fn")
        datums = checked_data(data)
        base, regularizers = self._with_defaults(
            loss_fn if base_loss_fn is None else base_loss_fn, regularizers
        )
        if not is_composed(base, regularizers):
            no_totals(totals)
            loss = sdk_loss(base, datums, self._client)
            self._number(checked_step(step))

            def plain() -> APIFuture[ForwardBackwardOutput]:
                self._failures.refuse(era)
                with computing(self._client):
                    return sdk.forward_backward_custom(self._client, datums, loss, **sdk_options)

            return self._queue.submit(plain)
        if sdk_options:
            raise RequestError(
                f"unknown option {next(iter(sdk_options))!r} of a step with regularizers; known "
                "are step, totals and flat_metrics",
                path=next(iter(sdk_options)),
            )
        composer = self._recorded(composer_of(base, regularizers, datums, self._client))
        flat = self._flat_metrics if flat_metrics is None else flat_metrics
        checked_step(step)
        if totals is not None:
            composer.check_totals(totals, datums)
        number = self._number(step)
        composed = CustomStep(self._client, datums, composer, number, totals, flat, self._failures)
        return self._enqueued(composed)

    async def forward_backward_custom_async(self, *args: Any, **kwargs: Any) -> APIFuture[Any]:
        """:meth:`forward_backward_custom` for async code: awaited, it gives the future."""
        return self.forward_backward_custom(*args, **kwargs)

    @overload
    def forward_backward(
        self,
        data: list[Datum],
        loss_fn: types.LossFnType,
        loss_fn_config: Mapping[str, float | str] | None = None,
        *,
        regularizers: None = None,
        step: int | None = None,
        totals: Mapping[str, Any] | None = None,
        flat_metrics: bool | None = None,
    ) -> APIFuture[ForwardBackwardOutput]: ...

    @overload
    def forward_backward(
        self,
        data: list[Datum],
        loss_fn: types.LossFnType,
        loss_fn_config: Mapping[str, float | str] | None = None,
        *,
        regularizers: Regularizers,
        step: int | None = None,
        totals: Mapping[str, Any] | None = None,
        flat_metrics: bool | None = None,
    ) -> APIFuture[StepOutput]: ...

    def forward_backward(
        self,
        data: list[Datum],
        loss_fn: types.LossFnType,
        loss_fn_config: Mapping[str, float | str] | None = None,
        *,
        regularizers: Regularizers | None = None,
        step: int | None = None,
        totals: Mapping[str, Any] | None = None,
        flat_metrics: bool | None = None,
    ) -> APIFuture[Any]:
        """The server's own loss, and the regularizers added to its gradient.

        The call goes out as it is. The regularizers are computed from the logprobs that it
        returns, and one linear pass adds their gradient before anything that was called later.
        Arrays that only terms read, such as ``mask`` or ``reference_logprobs``, stay here.
        With no regularizers, neither here nor in ``with_regularizers``, this is the SDK's own
        method.

        Args:
            data: the datums, as the server's loss wants them.
            loss_fn: the name of a loss of the server's, such as ``"cross_entropy"`` or ``"ppo"``.
            loss_fn_config: its options.
            regularizers, step, totals, flat_metrics: as in :meth:`forward_backward_custom`.

        Returns:
            The future of both passes: the server's output, as a :class:`StepOutput`. The server's
            metrics are where they were, and the record is beside them; in it the server's loss is
            the base loss, whose gradient is not known here. If a term fails, the server's own
            loss is accumulated nevertheless, and the future raises.

        Raises:
            RequestError: an argument is wrong. Raised here; nothing has been sent.
            StoppedError: an earlier step failed, with ``on_failure="stop"``.
        """
        if regularizers is None:
            regularizers = self._regularizers
        if not regularizers:
            no_totals(totals)
            self._number(checked_step(step))
            plain = self._in_turn("forward_backward", self._client.forward_backward)
            future: APIFuture[Any] = plain(data, loss_fn, loss_fn_config)
            return future
        refuse_within(self._client, "forward_backward")
        self._failures.refuse(self._failures.era)
        datums = checked_data(data)
        composer = self._recorded(composer_of(None, regularizers, datums))
        checked_step(step)
        if totals is not None:
            composer.check_totals(totals, datums)
        flat = self._flat_metrics if flat_metrics is None else flat_metrics
        call = functools.partial(
            self._client.forward_backward,
            native_data(datums, loss_fn),
            loss_fn,
            as_it_is(loss_fn_config),
        )
        number = self._number(step)
        native = NativeStep(
            call, self._client, datums, composer, number, totals, flat, self._failures
        )
        return self._enqueued(native)

    def optim_step(self, *args: Any, **kwargs: Any) -> APIFuture[types.OptimStepResponse]:
        """The SDK's own, and the end of a training step: the next one counts on from it.

        With ``flat_metrics=True`` in ``with_regularizers``, its metrics also have the record of the
        steps since the last one, in its flat form and merged: many loops log these metrics alone.
        If their weights differ, and so cannot be merged, it is that of the last.
        """
        in_turn = self._in_turn("optim_step", self._client.optim_step)
        response: APIFuture[types.OptimStepResponse] = in_turn(*args, **kwargs)
        steps = self._end_step()
        return with_records(response, steps) if steps else response

    async def optim_step_async(
        self, *args: Any, **kwargs: Any
    ) -> APIFuture[types.OptimStepResponse]:
        """:meth:`optim_step` for async code: awaited, it gives the future."""
        in_turn = self._in_turn("optim_step_async", self._client.optim_step_async)
        steps = self._end_step()  # now: later ones are not of it
        try:
            response: APIFuture[types.OptimStepResponse] = await in_turn(*args, **kwargs)
        except BaseException:
            with self._step_lock:
                self._unlogged[:0] = steps
                self._step -= 1
            raise
        return with_records(response, steps) if steps else response

    async def forward_backward_async(
        self, data: list[Datum], loss_fn: types.LossFnType, *args: Any, **kwargs: Any
    ) -> APIFuture[Any]:
        """:meth:`forward_backward` for async code: awaited, it gives the future."""
        given = kwargs.pop("regularizers", None)
        if given or (given is None and self._regularizers):
            return self.forward_backward(data, loss_fn, *args, regularizers=given, **kwargs)
        no_totals(kwargs.pop("totals", None))
        self._number(checked_step(kwargs.pop("step", None)))
        kwargs.pop("flat_metrics", None)
        in_turn = self._in_turn("forward_backward_async", self._client.forward_backward_async)
        future: APIFuture[Any] = await in_turn(data, loss_fn, *args, **kwargs)
        return future

    def _end_step(self) -> list[concurrent.futures.Future[StepOutput]]:
        """What there is to log of the training step that ends, with which the next one begins."""
        with self._step_lock:
            self._step += 1
            steps, self._unlogged = self._unlogged, []
        return steps

    def totals(
        self,
        data: Iterable[Datum],
        base_loss_fn: BaseLoss | None = None,
        regularizers: Regularizers | None = None,
    ) -> dict[str, dict[str, Any]]:
        """What each term divides by, for a step that is sent in several calls::

            totals = client.totals(data)
            for part in parts:
                client.forward_backward_custom(part, step=step, totals=totals)

        Nothing is sent, so it needs no async form. ``data`` are all datums of the step; the loss
        is that of ``forward_backward_custom`` with the same arguments. See
        :meth:`Composer.totals`.

        Raises:
            RequestError: an argument is wrong, or the loss is a plain function alone, whose step
                cannot be split.
            TermError: a term cannot read the datums.
        """
        datums = checked_data(data)
        base, regularizers = self._with_defaults(base_loss_fn, regularizers)
        if not is_composed(base, regularizers):
            raise plain_loss()
        return composer_of(base, regularizers, datums, self._client).totals(datums)

    def acknowledge_failure(self) -> BaseException | None:
        """After a failed step with ``on_failure="stop"``: let later calls through.

        What was already pipelined behind the failed step stays refused. What the server holds of
        earlier passes, such as an accumulated gradient, is still there.

        Returns:
            The failure, or None if there was none.
        """
        return self._failures.acknowledge()

    def _with_defaults(
        self, base: BaseLoss | None, regularizers: Regularizers | None
    ) -> tuple[Any, Regularizers | None]:
        if isinstance(base, Composer):
            return base, regularizers
        if base is None:
            base = self._base_loss
        if regularizers is None and not isinstance(base, Composer):
            regularizers = self._regularizers
        return base, regularizers

    def _enqueued(self, step: Step) -> StepFuture[StepOutput]:
        if self._flat_metrics:
            with self._step_lock:
                self._unlogged.append(step.future)
        self._queue.enqueue(step.run)
        return StepFuture(step.future)

    def _recorded(self, composer: Composer) -> Composer:
        return composer if self._recorder is None else composer.recorded_by(self._recorder)

    def _number(self, step: int | None) -> int:
        """The training step of a call, which is also that of the next ones that name none."""
        with self._step_lock:
            if step is not None:
                self._step = step
            return self._step
