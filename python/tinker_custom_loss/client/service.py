"""Regularizers for loops that make their own clients."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self, overload

from tinker import APIFuture, ServiceClient, TrainingClient

from ..errors import RequestError
from ..observer import StepObserver, checked_observer
from ..regularizer import regularizers_from, show
from . import sdk
from .arguments import BaseLoss, Regularizers, checked_defaults, checked_first_step
from .failures import Failures, OnFailure
from .futures import StepFuture, concurrent_future, settle
from .proxy import Proxy
from .training_client import RegularizedTrainingClient, with_regularizers

__all__ = ["RegularizedServiceClient", "regularized"]

logger = logging.getLogger(__name__)

Wrap = Callable[[TrainingClient, bool], RegularizedTrainingClient]

if TYPE_CHECKING:

    class _Proxy(Proxy, ServiceClient): ...

else:
    _Proxy = Proxy


@overload
def regularized(
    service_client: ServiceClient,
    *,
    regularizers: Regularizers,
    base_loss: BaseLoss | None = None,
    flat_metrics: bool = False,
    on_failure: OnFailure = "continue",
    recorder: StepObserver | None = None,
    first_step: int = 0,
) -> RegularizedServiceClient: ...


@overload
def regularized(
    service_client: None = None,
    *,
    regularizers: Regularizers,
    base_loss: BaseLoss | None = None,
    flat_metrics: bool = False,
    on_failure: OnFailure = "continue",
    recorder: StepObserver | None = None,
    first_step: int = 0,
) -> contextlib.AbstractContextManager[None]: ...


def regularized(
    service_client: ServiceClient | None = None,
    *,
    regularizers: Regularizers,
    base_loss: BaseLoss | None = None,
    flat_metrics: bool = False,
    on_failure: OnFailure = "continue",
    recorder: StepObserver | None = None,
    first_step: int = 0,
) -> Any:
    """A service client whose training clients have regularizers, for loops that make their own::

        service_client = regularized(service_client, regularizers=[…])

    Without a service client it is a context manager, for loops that make even that::

        with regularized(regularizers=[…], flat_metrics=True):
            asyncio.run(train.main(config))

    It replaces the methods of ``tinker.ServiceClient`` that create training clients, in the whole
    process and until it is left; the log says so. What was created within keeps its regularizers.
    One at a time.

    Args:
        service_client: a client of the SDK, or None.
        regularizers, base_loss, flat_metrics, on_failure, recorder, first_step: of every training
            client that it creates, see :func:`with_regularizers`.

    Raises:
        RequestError: it is no service client, or an option is wrong; or, on entering the context,
            another one has not been left.
    """
    checked_defaults(base_loss, regularizers)
    Failures(on_failure)
    checked_observer(recorder)
    checked_first_step(first_step)
    scheduled = [term.title for term in regularizers_from(regularizers) if callable(term.weight)]

    def wrap(client: TrainingClient, resumed: bool) -> RegularizedTrainingClient:
        if resumed and scheduled and first_step == 0:
            logger.warning(
                "a training client goes on from a checkpoint with its optimizer, but the schedule "
                "of the weight of %s begins at step 0: first_step= says with which it goes on",
                " and ".join(scheduled),
            )
        return with_regularizers(
            client,
            base_loss=base_loss,
            regularizers=regularizers,
            flat_metrics=flat_metrics,
            on_failure=on_failure,
            recorder=recorder,
            first_step=first_step,
        )

    if service_client is None:
        return _everywhere(wrap)
    if isinstance(service_client, RegularizedServiceClient):
        raise RequestError(
            "this service client has regularizers already; give all of them to the call of "
            "regularized that made it",
            path="service_client",
        )
    creates = getattr(service_client, "create_lora_training_client", None)
    if not callable(creates) or isinstance(service_client, type):
        raise RequestError(
            f"expected a tinker.ServiceClient, got {show(service_client)}"
            + ("; give an instance" if isinstance(service_client, type) else ""),
            path="service_client",
        )
    return RegularizedServiceClient(service_client, wrap)


class RegularizedServiceClient(_Proxy):
    """Every method and attribute of a ``tinker.ServiceClient``; its training clients are wrapped.

    To ``isinstance`` and to type checkers it is a ``tinker.ServiceClient``.
    """

    def __init__(self, service_client: ServiceClient, wrap: Wrap) -> None:
        self._client = service_client
        self._wrap = wrap

    if not TYPE_CHECKING:  # a type checker would let every name pass

        def __getattr__(self, name: str) -> Any:
            attribute = self._of_client(name)
            if sdk.creates_training_client(name):
                return _creating(attribute, self._wrap)
            return attribute

    def __enter__(self) -> Self:
        self._client.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._client.__exit__(*error)


def _creating(method: Callable[..., Any], wrap: Wrap) -> Callable[..., Any]:
    """``method``, which creates a training client or the future of one, with that one wrapped."""

    resumed = "with_optimizer" in method.__name__

    def wrapped(client: TrainingClient) -> RegularizedTrainingClient:
        # One method of the SDK may have called another, which has wrapped it.
        return client if isinstance(client, RegularizedTrainingClient) else wrap(client, resumed)

    if method.__name__.endswith("_async") or inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def create_async(*args: Any, **kwargs: Any) -> Any:
            return wrapped(await method(*args, **kwargs))

        return create_async

    @functools.wraps(method)
    def create(*args: Any, **kwargs: Any) -> Any:
        created = method(*args, **kwargs)
        if not isinstance(created, APIFuture):  # before tinker 0.38 the client itself
            return wrapped(created)
        outer: concurrent.futures.Future[Any] = concurrent.futures.Future()
        inner: concurrent.futures.Future[Any] = concurrent_future(created)
        inner.add_done_callback(lambda done: settle(outer, lambda: wrapped(done.result())))
        return sdk.client_future(created, StepFuture(outer))

    return create


_patching = threading.Lock()


@contextlib.contextmanager
def _everywhere(wrap: Wrap) -> Iterator[None]:
    if not _patching.acquire(blocking=False):
        raise RequestError(
            "regularized() is in force already, in this thread or another, and it holds for the "
            "whole process: give all regularizers to one, or wrap the clients one by one by "
            "with_regularizers",
            path="regularized",
        )
    try:
        methods = {
            name: method
            for name, method in vars(ServiceClient).items()
            if sdk.creates_training_client(name)
        }
        logger.info(
            "until regularized() is left, every tinker.ServiceClient of this process creates "
            "training clients with regularizers: %s are replaced",
            ", ".join(sorted(methods)),
        )
        try:
            for name, method in methods.items():
                setattr(ServiceClient, name, _creating(method, wrap))
            yield
        finally:
            for name, method in methods.items():
                setattr(ServiceClient, name, method)
    finally:
        _patching.release()
