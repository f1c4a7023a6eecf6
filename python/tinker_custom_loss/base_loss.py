"""The base loss: a function, a name or a dict of options, as a regularizer of weight 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import RequestError
from .regularizer import BASE_LOSS, LossFn, Regularizer, nearest, show

__all__ = ["base_loss_from"]

_OPTIONS = ("fn", "params", "reduction")


def base_loss_from(
    base_loss_fn: LossFn | str | Mapping[str, Any] | None, params: Mapping[str, Any] | None
) -> Regularizer | None:
    if base_loss_fn is None:
        return None
    options: dict[str, Any] = {"fn": base_loss_fn}
    if isinstance(base_loss_fn, Mapping):
        options = dict(base_loss_fn)
        _check_options(options, params)
    elif isinstance(base_loss_fn, (list, tuple)):
        raise RequestError(
            "base_loss_fn must be a function of (data, logprobs), the name of a term or a dict of "
            f"its options, got {type(base_loss_fn).__name__}; regularizers are the second argument",
            path=BASE_LOSS,
        )
    options.setdefault("params", params or {})
    try:
        return Regularizer(weight=1.0, name=BASE_LOSS, **options)
    except RequestError as error:
        raise RequestError(str(error), path=f"{BASE_LOSS}.{error.path}") from error


def _check_options(options: dict[str, Any], params: Mapping[str, Any] | None) -> None:
    for option in options:
        if option not in _OPTIONS:
            raise RequestError(
                f"unknown option {show(option)} of the base loss; {nearest(str(option), _OPTIONS)}",
                path=f"{BASE_LOSS}.{option}",
            )
    if "fn" not in options:
        raise RequestError('the base loss has no "fn"', path=f"{BASE_LOSS}.fn")
    if params is not None and "params" in options:
        raise RequestError(
            "give the params of the base loss in its dict or as base_params, not both",
            path="base_params",
        )
