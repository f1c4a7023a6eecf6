"""The record of one step: what each term did, nested for code and flat for loggers.

Gradient norms, RMS values and cosines are with respect to *logprobs* (one entry per token, or per
token and alternative), not to the model's parameters. ``grad_rms = grad_norm / sqrt(N)`` over the
step's N logprob values, comparable between batches of different size.

None stands for what was not computed: gradient figures when only the loss was asked for, the
value of a term that was skipped, the schedule's step when nobody gave one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from .errors import RequestError

__all__ = [
    "BaseLossRecord",
    "RegularizerRecord",
    "StepRecord",
    "flatten",
    "is_record_key",
    "metrics_of",
    "root_mean_square",
    "step_record",
]


class BaseLossRecord(TypedDict):
    """The base loss in one step."""

    value: float
    grad_norm: float | None
    grad_rms: float | None
    cosine_to_total: float | None
    differentiable: bool
    zero_gradient: bool | None
    seconds: float
    non_finite_zeroed: int
    custom: dict[str, float | None]


class RegularizerRecord(TypedDict):
    """One regularizer in one step.

    ``contribution`` is ``weight · value``, what the term added to ``loss_total``;
    ``cosine_to_total`` is that of its weighted gradient and the total gradient (-1: it works
    against the step, 0: unrelated, or either is zero). ``zero_gradient``: its loss depends on the
    logprobs, it had tokens, and its gradient is 0 at every one of them, whatever its weight.
    """

    value: float | None
    weight: float
    contribution: float
    grad_norm: float | None
    grad_norm_weighted: float | None
    grad_rms: float | None
    cosine_to_total: float | None
    differentiable: bool
    zero_gradient: bool | None
    seconds: float | None
    skipped: bool
    error: str | None
    non_finite_zeroed: int
    custom: dict[str, float | None]


class StepRecord(TypedDict):
    """What one step leaves behind. The keys are always the same."""

    loss_total: float
    regularizer_total: float
    base_loss: BaseLossRecord | None
    regularizers: dict[str, RegularizerRecord]
    total_grad_norm: float | None
    total_grad_rms: float | None
    logprob_count: int
    datum_count: int
    schedule_step: int | None
    compute_seconds: float


def step_record(
    *,
    loss_total: float,
    regularizer_total: float,
    base_loss: RegularizerRecord | None,
    regularizers: dict[str, RegularizerRecord],
    total_grad_norm: float | None,
    size: int,
    datums: int,
    schedule_step: int | None,
    compute_seconds: float,
) -> StepRecord:
    """The nested record of one step over ``size`` logprob values.

    The base loss is recorded as a regularizer is, without what only a weighted term has.
    """
    return {
        "loss_total": loss_total,
        "regularizer_total": regularizer_total,
        "base_loss": None if base_loss is None else _of_base_loss(base_loss),
        "regularizers": regularizers,
        "total_grad_norm": total_grad_norm,
        "total_grad_rms": root_mean_square(total_grad_norm, size),
        "logprob_count": size,
        "datum_count": datums,
        "schedule_step": schedule_step,
        "compute_seconds": compute_seconds,
    }


def _of_base_loss(record: RegularizerRecord) -> BaseLossRecord:
    assert record["value"] is not None, "a base loss cannot be skipped"
    assert record["seconds"] is not None
    return {
        "value": record["value"],
        "grad_norm": record["grad_norm"],
        "grad_rms": record["grad_rms"],
        "cosine_to_total": record["cosine_to_total"],
        "differentiable": record["differentiable"],
        "zero_gradient": record["zero_gradient"],
        "seconds": record["seconds"],
        "non_finite_zeroed": record["non_finite_zeroed"],
        "custom": record["custom"],
    }


def root_mean_square(norm: float | None, size: int) -> float | None:
    """``norm / sqrt(size)``; None where there is no norm."""
    if norm is None:
        return None
    return norm / math.sqrt(size) if size else 0.0


def is_record_key(metric: str) -> bool:
    """Whether a top-level metric of this name would hide a key of the record, nested or flat."""
    return metric.partition("/")[0] in StepRecord.__annotations__


def metrics_of(record: StepRecord, *, flat: bool = False) -> dict[str, Any]:
    """The record as the metrics of a training step.

    The base loss's own metrics are in it twice: in the record, and at the top level under the
    names that the base loss gave them, where the SDK puts them when there are no regularizers.
    """
    own = record["base_loss"]["custom"] if record["base_loss"] else {}
    if flat:
        return {key: value for key, value in own.items() if value is not None} | flatten(record)
    return {**own, **record}


def flatten(record: Mapping[str, Any], *, prefix: str = "") -> dict[str, float]:
    """The flat form, for W&B, TensorBoard and the like: ``regularizers/<name>/value`` and so on.

    Only floats: truth values become 0.0 and 1.0; what is None or text is left out. A ``:`` in the
    name of a metric becomes ``.``, because Tinker splits metric names there. With a ``prefix``,
    every key begins with it and a ``/``.

    Raises:
        RequestError: two keys of the record are the same in the flat form.
    """
    flat: dict[str, float] = {}
    for key, value in _leaves(record, f"{prefix.rstrip('/')}/" if prefix else ""):
        name = key.replace(":", ".")
        if name in flat:
            raise RequestError(f'two keys of the record are "{name}" in the flat form', path=key)
        flat[name] = float(value)
    return flat


def _leaves(value: Any, key: str) -> Iterable[tuple[str, float]]:
    if isinstance(value, Mapping):
        start = f"{key}/" if key and not key.endswith("/") else key
        for inner_key, inner in value.items():
            yield from _leaves(inner, f"{start}{inner_key}")
    elif isinstance(value, (int, float)):
        yield key, value
