"""What this package knows of the tinker SDK beyond its documentation, for every version supported.

Names of methods, what they return, and what differs between versions stand here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Final, get_origin

import tinker
from tinker import APIFuture, Datum, TrainingClient
from tinker.types import LossFnInputs

__all__ = [
    "LOSS",
    "LOSS_INPUTS",
    "RETURNS_AT_ONCE",
    "TRAINING_METHODS",
    "as_function",
    "check_handle",
    "client_future",
    "creates_training_client",
    "forward_backward_custom",
    "is_handle",
    "submits",
    "takes_no_place",
    "with_inputs",
    "with_inputs_of",
]

LOSS: Final = "cross_entropy"
"""The loss of the server's that carries a gradient."""

_OF_A_POLICY: Final = frozenset({"target_tokens", "logprobs", "advantages"})
LOSS_INPUTS: Final = {
    "cross_entropy": frozenset({"target_tokens", "weights"}),
    "importance_sampling": _OF_A_POLICY,
    "ppo": _OF_A_POLICY,
    "cispo": _OF_A_POLICY,
    "dro": _OF_A_POLICY,
}
"""What the server's losses take of ``loss_fn_inputs``, where it is documented."""

RETURNS_AT_ONCE: Final = tuple(int(part) for part in tinker.__version__.split(".")[:2]) >= (0, 38)
"""Whether ``forward_backward_custom`` reserves a place for both passes and returns."""

TRAINING_METHODS: Final = ("forward", "forward_backward", "forward_backward_custom", "optim_step")
"""What makes an object a training client."""

_IS_KNOWN = [field.name for field in dataclasses.fields(Datum)] == [
    "model_input",
    "loss_fn_inputs",
    "model_input_spans",
    "loss_fn_input_spans",
]

# All others take a place in the order of training requests, or might.
_READS = frozenset(
    {
        "create_sampling_client",
        "get_console_url",
        "get_info",
        "get_telemetry",
        "get_tokenizer",
    }
)


def takes_no_place(name: str) -> bool:
    """Whether a method leaves the order of training requests alone."""
    return name.removesuffix("_async") in _READS


def creates_training_client(name: str) -> bool:
    """Whether a method of a ``ServiceClient`` makes a training client, from a state or without."""
    return name.startswith("create_") and "training_client" in name


def client_future(created: APIFuture[Any], future: APIFuture[Any]) -> APIFuture[Any]:
    """``future`` as one of the kind of ``created``, which may be used as the client, deprecated."""
    kind = getattr(tinker, "BackcompatTrainingClientFuture", None)
    if kind is None or not isinstance(created, kind):
        return future
    made: APIFuture[Any] = kind(future)
    return made


def with_inputs_of(datum: Datum, known: frozenset[str]) -> Datum:
    """The datum with no other ``loss_fn_inputs`` than these."""
    inputs = datum.loss_fn_inputs
    if inputs.keys() <= known:
        return datum
    return with_inputs(datum, {key: value for key, value in inputs.items() if key in known})


def with_inputs(datum: Datum, inputs: LossFnInputs) -> Datum:
    """The datum with these ``loss_fn_inputs``, and all else that this SDK's datums have."""
    if _IS_KNOWN and type(datum) is Datum:  # ``replace`` would take as long again as the datum
        return Datum(datum.model_input, inputs, datum.model_input_spans, datum.loss_fn_input_spans)
    return dataclasses.replace(datum, loss_fn_inputs=inputs)


def submits(method: Callable[..., Any]) -> Callable[[APIFuture[Any]], APIFuture[Any]] | None:
    """What makes any future into one of the kind that a method returns at once; None: it waits.

    What is not annotated, such as a method that someone replaced, is taken to wait.
    """
    function = inspect.unwrap(method)
    returned = getattr(function, "__annotations__", {}).get("return")
    if isinstance(returned, str):
        try:
            returned = eval(returned, function.__globals__)  # the SDK's own text
        except NameError:  # imported for type checkers alone
            return None
    if get_origin(returned) is APIFuture:
        return lambda future: future
    if isinstance(returned, type) and issubclass(returned, APIFuture):
        return returned  # of a client, which it stands for
    return None


def is_handle(loss: object) -> bool:
    """Whether it is a ``tinker.LossHandle``, which there is since tinker 0.38."""
    handle = getattr(tinker, "LossHandle", None)
    return handle is not None and isinstance(loss, handle)


def check_handle(handle: Any, data: list[Datum], training_client: TrainingClient | None) -> None:
    """The checks that the SDK makes before it runs a ``tinker.LossHandle``.

    Raises:
        ValueError: it is another session's, or its inputs are not in the data at their ranks.
    """
    from tinker.lib.public_interfaces.custom_loss import check_loss_inputs

    if training_client is not None:
        session = training_client.holder.get_session_id()
        if handle.session_id != session:
            raise ValueError(
                f"the loss {handle.name!r} was created in session {handle.session_id}; clients of "
                f"session {session} cannot use it"
            )
    check_loss_inputs(handle, data)


def as_function(handle: Any) -> Callable[[Any, Any], Any]:
    """A ``tinker.LossHandle`` that was checked as a loss of the whole batch, run here."""
    from tinker.lib.public_interfaces.custom_loss import run_loss_handle

    return functools.partial(run_loss_handle, handle)


def forward_backward_custom(
    training_client: TrainingClient, data: Sequence[Datum], loss: Any, **options: Any
) -> APIFuture[Any]:
    """The SDK's own, also for servers that answer without ``loss:sum`` (SkyRL's do)."""
    client: Any = tolerant(training_client)
    future: APIFuture[Any] = client.forward_backward_custom(data, loss, **options)
    return future


def tolerant(training_client: TrainingClient) -> Any:
    """The same client, for whose ``forward_backward_custom`` a missing ``loss:sum`` is nan.

    The SDK takes the key out of the server's metrics on its own thread, where the KeyError would
    end the client for good.
    """
    kind = type(training_client)
    if not hasattr(kind, "_run_fwd_bwd"):  # older or foreign: they do not take it out
        return training_client
    client: Any = object.__new__(_tolerant_kind(kind))
    client.__dict__ = training_client.__dict__  # one client: counters and queues are shared
    return client


@functools.cache
def _tolerant_kind(kind: type) -> type:
    return type(kind.__name__, (_Tolerant, kind), {})


class _Tolerant:
    def _run_fwd_bwd(self, *args: Any, **kwargs: Any) -> Any:
        return _WithLossSum(super()._run_fwd_bwd(*args, **kwargs))  # type: ignore[misc]


class _WithLossSum:
    """The future of a pass whose metrics have ``loss:sum``."""

    def __init__(self, future: Any) -> None:
        self._future = future

    async def result_async(self, timeout: float | None = None) -> Any:
        output = await self._future.result_async(timeout)
        output.metrics.setdefault("loss:sum", math.nan)
        return output

    def __await__(self) -> Any:
        return self.result_async().__await__()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._future, name)
