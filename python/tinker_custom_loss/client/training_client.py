"""A training client with the seed's ``forward_backward_custom``, which keeps the order itself.

A custom step is two requests, with the client's own work between them. The SDK (from 0.38 on)
keeps the order of calls by reserving places for both, and runs the losses of *all* clients of a
process one after another on one thread. Here each client has its own queue: while a step is
under way, later calls of the same client wait behind it, and other clients go on.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import inspect
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TypeVar

from tinker import APIFuture, Datum, ForwardBackwardOutput, TrainingClient

from ..composer import Composer
from ..errors import RequestError
from ..record import StepRecord
from ..regularizer import LossFn
from ..running.threads import THREADS
from .futures import StepFuture, concurrent_future, settle, with_telemetry, withdrawable
from .linear import Regularizers, composer_of, forward_data, linearize_with, sdk_loss, zero_gradient

__all__ = ["RegularizedTrainingClient", "with_regularizers"]

T = TypeVar("T")

logger = logging.getLogger(__name__)

_LOSS: Final = "cross_entropy"

# Each takes a place in the order of training requests and returns an APIFuture at once.
_SUBMITS = frozenset(
    {
        "forward",
        "forward_backward",
        "load_state",
        "load_state_with_optimizer",
        "optim_step",
        "save_state",
        "save_weights_external",
        "save_weights_for_sampler",
    }
)
# These take no place. A method that is in neither set, such as one of a later SDK, is taken to
# need one and is waited for.
_NEEDS_NO_TURN = frozenset(
    {
        "create_sampling_client",
        "create_sampling_client_async",
        "get_console_url",
        "get_info",
        "get_info_async",
        "get_telemetry",
        "get_tokenizer",
    }
)


def with_regularizers(training_client: TrainingClient) -> RegularizedTrainingClient:
    """The client, with regularizers in its ``forward_backward_custom``::

        training_client = with_regularizers(training_client)

    All else is as before; see :class:`RegularizedTrainingClient`. From then on every call must go
    through what is returned: it cannot know of calls on the bare client, and those would overtake
    the backward pass of a step that is still computing its loss.

    Raises:
        RequestError: it is no training client.
    """
    if isinstance(training_client, RegularizedTrainingClient):
        return training_client
    missing = [
        name
        for name in ("forward", "forward_backward", "forward_backward_custom", "optim_step")
        if not callable(getattr(training_client, name, None))
    ]
    if missing or isinstance(training_client, type):
        raise RequestError(
            f"expected a tinker.TrainingClient, got {type(training_client).__name__}"
            + (f", which has no {missing[0]}()" if missing else "; give an instance"),
            path="training_client",
        )
    return RegularizedTrainingClient(training_client)


class RegularizedTrainingClient:
    """Every method and attribute of a ``tinker.TrainingClient``, and regularizers.

    To ``isinstance`` it is a ``tinker.TrainingClient``. Calls are sent in the order in which they
    are made, as the SDK does it: ``optim_step`` may be submitted right behind a custom step. A
    call that has to wait for its turn returns its future at once; what the SDK would have raised
    from the call is then raised by the future.
    """

    def __init__(self, training_client: TrainingClient) -> None:
        self._client = training_client
        self._turns = _Turns()

    def forward_backward_custom(
        self,
        data: list[Datum],
        base_loss_fn: LossFn | None = None,
        regularizers: Regularizers | None = None,
        *,
        step: int = 0,
        flat_metrics: bool = False,
        loss_fn: LossFn | None = None,
        **sdk_options: Any,
    ) -> APIFuture[ForwardBackwardOutput]:
        """Forward pass, composed loss, backward pass.

        See :func:`tinker_custom_loss.forward_backward_custom` for the arguments. ``loss_fn`` is
        the SDK's name for ``base_loss_fn``. Without regularizers this is the SDK's own method,
        with its options.

        Raises:
            RequestError: an argument is wrong. Raised here; nothing has been sent.
        """
        if loss_fn is not None and base_loss_fn is not None:
            raise RequestError("give either base_loss_fn or loss_fn, not both", path="loss_fn")
        base = loss_fn if base_loss_fn is None else base_loss_fn
        if regularizers is None and not isinstance(base, Composer):
            plain: Any = self._client.forward_backward_custom
            return self._turns.submit(functools.partial(plain, data, sdk_loss(base), **sdk_options))
        if sdk_options:
            raise RequestError(
                f"unknown option {next(iter(sdk_options))!r} of a step with regularizers; known "
                "are step and flat_metrics",
                path=next(iter(sdk_options)),
            )
        composed = _Step(self._client, data, composer_of(base, regularizers, step), step)
        self._turns.enqueue(functools.partial(composed.run, flat_metrics))
        return StepFuture(composed.future)

    async def forward_backward_custom_async(
        self, *args: Any, **kwargs: Any
    ) -> APIFuture[ForwardBackwardOutput]:
        """:meth:`forward_backward_custom` for async code: awaited, it gives the future."""
        return self.forward_backward_custom(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ("_client", "_turns") or name.startswith("__"):  # copying, before __init__
            raise AttributeError(name)
        attribute = getattr(self._client, name)
        if name.startswith("_") or name in _NEEDS_NO_TURN or not inspect.ismethod(attribute):
            return attribute
        return self._in_turn(name, attribute)

    def _in_turn(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """``method``, behind the steps that are under way."""
        if name in _SUBMITS:

            @functools.wraps(method)
            def submit(*args: Any, **kwargs: Any) -> Any:
                return self._turns.submit(functools.partial(method, *args, **kwargs))

            return submit
        sync_name = name.removesuffix("_async")
        if sync_name in _SUBMITS:

            @functools.wraps(method)
            async def submit_async(*args: Any, **kwargs: Any) -> Any:
                return getattr(self, sync_name)(*args, **kwargs)

            return submit_async
        if inspect.iscoroutinefunction(method):

            @functools.wraps(method)
            async def wait_async(*args: Any, **kwargs: Any) -> Any:
                await asyncio.wrap_future(self._turns.run(lambda: None))
                return await method(*args, **kwargs)

            return wait_async

        @functools.wraps(method)
        def wait(*args: Any, **kwargs: Any) -> Any:
            return self._turns.run(functools.partial(method, *args, **kwargs)).result()

        return wait

    # What `isinstance` asks after the type itself.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._client)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._client)})

    def __repr__(self) -> str:
        return f"RegularizedTrainingClient({self._client!r})"


class _Turns:
    """Calls, made one after another in the order in which they arrived."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], None]] = deque()
        self._busy = False

    def enqueue(self, job: Callable[[], None]) -> None:
        """Run ``job``, which does not raise, on a thread of this package in its turn."""
        with self._lock:
            self._enqueue(job)

    def submit(self, call: Callable[[], APIFuture[T]]) -> APIFuture[T]:
        """The future that ``call`` returns; called here and now if nobody is before it."""
        with self._lock:
            if not self._busy:
                return call()
            outer: concurrent.futures.Future[T] = concurrent.futures.Future()
            self._enqueue(functools.partial(_follow, outer, call))
        return StepFuture(outer)

    def run(self, call: Callable[[], T]) -> concurrent.futures.Future[T]:
        """What ``call`` returns, once its turn has come."""
        outer: concurrent.futures.Future[T] = concurrent.futures.Future()
        with self._lock:
            if self._busy:
                self._enqueue(functools.partial(settle, outer, call))
                return outer
        settle(outer, call)
        return outer

    def _enqueue(self, job: Callable[[], None]) -> None:
        self._waiting.append(job)
        if not self._busy:
            self._busy = True
            THREADS.submit(self._work)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._busy = False
                    return
                job = self._waiting.popleft()
            job()


class _Step:
    """One custom step of one client: forward, loss, backward."""

    def __init__(
        self, client: TrainingClient, data: list[Datum], composer: Composer, step: int
    ) -> None:
        self._cancelled = threading.Event()
        self.future: concurrent.futures.Future[ForwardBackwardOutput] = withdrawable(
            self._cancelled
        )
        self._client = client
        self._data = list(data)  # the caller's may have changed when the step's turn comes
        self._forward_data = forward_data(data)
        self._composer = composer
        self._step = step

    def run(self, flat: bool) -> None:
        """Returns as soon as the backward pass has taken its place in the order of requests."""
        _follow(self.future, functools.partial(self._submit, flat))

    def _submit(self, flat: bool) -> APIFuture[ForwardBackwardOutput]:
        forward = self._client.forward(self._forward_data, _LOSS).result()
        failure: BaseException | None = None
        telemetry: StepRecord | None = None
        try:
            linear, composition = linearize_with(
                self._composer, self._data, forward, self._step, self._cancelled
            )
            telemetry = composition.telemetry
        except BaseException as error:
            logger.error("step %d contributes nothing: %s", self._step, error)
            failure, linear = error, zero_gradient(self._data)
        # Also when the step failed: the requests are the same whatever a term does.
        backward = concurrent_future(self._client.forward_backward(linear, _LOSS))
        outer: concurrent.futures.Future[ForwardBackwardOutput] = concurrent.futures.Future()

        def outcome() -> ForwardBackwardOutput:
            output = backward.result()
            if failure is not None:
                raise failure
            assert telemetry is not None
            return with_telemetry(output, telemetry, flat)

        backward.add_done_callback(lambda _: settle(outer, outcome))
        return StepFuture(outer)


def _follow(outer: concurrent.futures.Future[T], call: Callable[[], APIFuture[T]]) -> None:
    """Make a call whose turn has come, and have ``outer`` end as its future does."""
    if outer.cancelled():
        outer.set_running_or_notify_cancel()  # tells those who wait with concurrent.futures.wait
        return
    try:
        inner = concurrent_future(call())
    except BaseException as error:
        settle(outer, functools.partial(_raise, error))
    else:
        inner.add_done_callback(lambda done: settle(outer, done.result))


def _raise(error: BaseException) -> Any:
    raise error
