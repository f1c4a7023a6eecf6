"""The arguments of a step, checked at the call, in whichever form it is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from tinker import APIFuture, Datum, TrainingClient

from ..composer import Composer
from ..errors import RequestError
from ..regularizer import BASE_LOSS, LossFn, Regularizer, check_step, regularizers_from, show
from . import sdk

if TYPE_CHECKING:
    from tinker import LossHandle

__all__ = [
    "BaseLoss",
    "Regularizers",
    "checked_client",
    "checked_data",
    "checked_defaults",
    "checked_first_step",
    "checked_step",
    "composer_of",
    "is_composed",
    "no_totals",
    "plain_loss",
    "sdk_loss",
]

BaseLoss: TypeAlias = "LossFn | LossHandle | Composer | str | Mapping[str, Any]"
Regularizers = Sequence[Regularizer | Mapping[str, Any]]


def checked_client(training_client: object) -> TrainingClient:
    """The training client; that of a future, once it is there.

    Raises:
        RequestError: it is none.
    """
    if isinstance(training_client, APIFuture):  # what the SDK's create_…_training_client gives
        training_client = training_client.result()
    missing = [
        name for name in sdk.TRAINING_METHODS if not callable(getattr(training_client, name, None))
    ]
    if missing or isinstance(training_client, type):
        raise RequestError(
            f"expected a tinker.TrainingClient, got {show(training_client)}"
            + (f", which has no {missing[0]}()" if missing else "; give an instance"),
            path="training_client",
        )
    client: Any = training_client
    return client  # type: ignore[no-any-return]


def checked_data(data: Iterable[Datum]) -> list[Datum]:
    """The datums, as a list that stays as it is when the caller's changes.

    Raises:
        RequestError: they are none, or not all of them have ``target_tokens``.
    """
    if isinstance(data, (Datum, str, bytes, Mapping)) or not isinstance(data, Iterable):
        hint = "; put it into a list" if isinstance(data, Datum) else ""
        raise RequestError(
            f"data must be a list of tinker.Datum, got {type(data).__name__}{hint}", path="data"
        )
    datums = list(data)
    if not datums:
        raise RequestError("the batch is empty: there are no datums", path="data")
    for index, datum in enumerate(datums):
        if not isinstance(datum, Datum):
            raise RequestError(
                f"data must be a list of tinker.Datum, got {show(datum)} at index {index}",
                path=f"data[{index}]",
            )
        if "target_tokens" not in datum.loss_fn_inputs:
            has = ", ".join(sorted(datum.loss_fn_inputs)) or "nothing"
            raise RequestError(
                f'datum {index} has no "target_tokens" in its loss_fn_inputs, so it has no '
                f"logprobs; it has: {has}",
                path=f"data[{index}].loss_fn_inputs",
            )
    return datums


def checked_step(step: int | None) -> int | None:
    """The number of the training step.

    Raises:
        RequestError: it is no number of a step.
    """
    check_step(step)
    return step


def checked_first_step(first_step: object) -> int:
    """The number of the training step with which a client begins.

    Raises:
        RequestError: it is no number of a step.
    """
    if isinstance(first_step, bool) or not isinstance(first_step, int) or first_step < 0:
        raise RequestError(
            f'invalid value for "first_step": expected a non-negative integer, '
            f"got {show(first_step)}",
            path="first_step",
        )
    return first_step


def no_totals(totals: Mapping[str, Any] | None) -> None:
    """Refuse totals for a loss that knows nothing of them.

    Raises:
        RequestError: there are some.
    """
    if totals is not None:
        raise plain_loss()


def plain_loss() -> RequestError:
    """That totals mean nothing to a loss without regularizers."""
    return RequestError(
        "totals are for steps with regularizers, or a Composer as their loss: a plain function "
        "looks at the whole batch of a call, so its step cannot be split",
        path="totals",
    )


def checked_defaults(
    base_loss: BaseLoss | None, regularizers: Regularizers | None
) -> tuple[BaseLoss | None, Regularizers | None]:
    """The defaults of a client, of which a step may use one, both or none.

    Raises:
        RequestError: one of them is wrong, or they exclude each other.
    """
    if base_loss is not None:
        _check_loss(base_loss)
    if regularizers is None:
        return base_loss, None
    if isinstance(base_loss, Composer):
        raise _two_lists()
    return base_loss, regularizers_from(regularizers)


def is_composed(base_loss_fn: object, regularizers: object) -> bool:
    """Whether a step is this package's; else it is the SDK's own."""
    return regularizers is not None or isinstance(base_loss_fn, (Composer, str, Mapping))


def sdk_loss(base_loss_fn: Any, data: list[Datum], training_client: TrainingClient) -> Any:
    """What to hand to the SDK as it is: it would find out in mid-step, and end the client.

    Raises:
        RequestError: it is no loss.
    """
    if base_loss_fn is None:
        raise RequestError(
            "there is nothing to compute: give a base_loss_fn, or at least one regularizer",
            path=BASE_LOSS,
        )
    _check_loss(base_loss_fn)
    if sdk.is_handle(base_loss_fn):
        _check_handle(base_loss_fn, data, training_client)
    return base_loss_fn


def composer_of(
    base_loss_fn: Any,
    regularizers: Regularizers | None,
    data: list[Datum],
    training_client: TrainingClient | None = None,
) -> Composer:
    """The composer for one step's arguments; a ``tinker.LossHandle`` is run by it.

    Raises:
        RequestError: an argument is wrong.
    """
    if isinstance(base_loss_fn, Composer):
        if regularizers is not None:
            raise _two_lists()
        return base_loss_fn
    if sdk.is_handle(base_loss_fn):
        _check_handle(base_loss_fn, data, training_client)
        base_loss_fn = sdk.as_function(base_loss_fn)
    return Composer(base_loss_fn, regularizers)


def _check_loss(base_loss_fn: Any) -> None:
    if isinstance(base_loss_fn, (str, Mapping)):
        Composer(base_loss_fn)
    elif not callable(base_loss_fn) and not sdk.is_handle(base_loss_fn):
        raise RequestError(
            "base_loss_fn must be a function of (data, logprobs), the name of a term or a dict of "
            f"its options, got {type(base_loss_fn).__name__}; regularizers come after it",
            path=BASE_LOSS,
        )


def _check_handle(handle: Any, data: list[Datum], training_client: TrainingClient | None) -> None:
    try:
        sdk.check_handle(handle, data, training_client)
    except ValueError as error:
        raise RequestError(str(error), path=BASE_LOSS) from error


def _two_lists() -> RequestError:
    return RequestError(
        "the base loss is a Composer, which has its own regularizers; give the others to it",
        path="regularizers",
    )
