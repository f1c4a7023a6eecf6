"""The record of one step: what each term did, nested for code and flat for loggers.

Gradient norms, RMS values and cosines are with respect to *logprobs* (one entry per token, or per
token and alternative), not to the model's parameters. ``grad_rms = grad_norm / sqrt(N)`` over the
step's N logprob values, comparable between batches of different size.

None stands for what was not computed: gradient figures when only the loss was asked for, the
value of a term that was skipped, the schedule's step when nobody gave one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from .errors import RequestError

__all__ = [
    "BaseLossRecord",
    "RegularizerRecord",
    "StepRecord",
    "flatten",
    "is_record_key",
    "merge",
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
    """What one step leaves behind. The keys are always the same.

    ``cosines`` are those of each pair of weighted gradients, under the names of the two in the
    order of the terms: ``cosines["base_loss"]["kl"]``. A negative one is a conflict of the two.
    """

    loss_total: float
    regularizer_total: float
    base_loss: BaseLossRecord | None
    regularizers: dict[str, RegularizerRecord]
    total_grad_norm: float | None
    total_grad_rms: float | None
    cosines: dict[str, dict[str, float]] | None
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
    cosines: dict[str, dict[str, float]] | None,
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
        "cosines": cosines,
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
    _gather(record, f"{prefix.rstrip('/')}/" if prefix else "", flat)
    return flat


def _gather(record: Mapping[str, Any], start: str, flat: dict[str, float]) -> None:
    for key, value in record.items():
        if isinstance(value, (int, float)):
            name = f"{start}{key}".replace(":", ".")
            if name in flat:
                raise RequestError(
                    f'two keys of the record are "{name}" in the flat form', path=f"{start}{key}"
                )
            flat[name] = float(value)
        elif isinstance(value, Mapping):
            _gather(value, f"{start}{key}/", flat)


def merge(records: Sequence[StepRecord]) -> StepRecord:
    """The record of a step that was computed in parts, from those of its parts.

    For parts that were computed with the step's ``totals``: then it is the record of the one call
    that computes them together. Values, contributions and metrics add up, and so do counts and
    seconds. The parts' logprobs are disjoint, so squared norms and dot products add up too, from
    which norms and cosines follow. None is what cannot be known: the value of a term that was
    skipped in a part, and the step of a schedule where the parts differ in it.

    Raises:
        RequestError: there are none, or they are not of one step: other terms, or other weights.
    """
    if isinstance(records, Mapping) or not records:
        raise RequestError("merge needs a list of records, with one at least", path="records")
    _check_parts(records)
    size = sum(record["logprob_count"] for record in records)
    totals = [record["total_grad_norm"] for record in records]
    total = _merged_norm(totals)
    base_losses = [record["base_loss"] for record in records if record["base_loss"]]
    steps = {record["schedule_step"] for record in records}
    return {
        "loss_total": _sum_of(record["loss_total"] for record in records),
        "regularizer_total": _sum_of(record["regularizer_total"] for record in records),
        "base_loss": (_merged_base_loss(base_losses, totals, total, size) if base_losses else None),
        "regularizers": {
            name: _merged_regularizer(
                [record["regularizers"][name] for record in records], totals, total, size
            )
            for name in records[0]["regularizers"]
        },
        "total_grad_norm": total,
        "total_grad_rms": root_mean_square(total, size),
        "cosines": _merged_cosines(records),
        "logprob_count": size,
        "datum_count": sum(record["datum_count"] for record in records),
        "schedule_step": steps.pop() if len(steps) == 1 else None,
        "compute_seconds": _sum_of(record["compute_seconds"] for record in records),
    }


def _check_parts(records: Sequence[StepRecord]) -> None:
    def terms(record: StepRecord) -> dict[str, float]:
        weights = {name: each["weight"] for name, each in record["regularizers"].items()}
        return {"base_loss": 1.0, **weights} if record["base_loss"] else weights

    for index, record in enumerate(records):
        if terms(record) != terms(records[0]):
            raise RequestError(
                f"record {index} is not of the same step as record 0: its terms and their weights "
                f"are {terms(record)}, those of record 0 {terms(records[0])}; give every part of a "
                "step the same terms and the same step=",
                path=f"records[{index}]",
            )


def _merged_base_loss(
    parts: Sequence[BaseLossRecord],
    totals: Sequence[float | None],
    total: float | None,
    size: int,
) -> BaseLossRecord:
    norms = [part["grad_norm"] for part in parts]
    norm = _merged_norm(norms)
    cosines = [part["cosine_to_total"] for part in parts]
    return {
        "value": _sum_of(part["value"] for part in parts),
        "grad_norm": norm,
        "grad_rms": root_mean_square(norm, size),
        "cosine_to_total": _merged_cosine(cosines, norms, norm, totals, total),
        "differentiable": any(part["differentiable"] for part in parts),
        "zero_gradient": _merged_zero(parts, norm),
        "seconds": _sum_of(part["seconds"] for part in parts),
        "non_finite_zeroed": sum(part["non_finite_zeroed"] for part in parts),
        "custom": _merged_custom([part["custom"] for part in parts]),
    }


def _merged_regularizer(
    parts: Sequence[RegularizerRecord],
    totals: Sequence[float | None],
    total: float | None,
    size: int,
) -> RegularizerRecord:
    norms = [part["grad_norm"] for part in parts]
    norm, weight = _merged_norm(norms), parts[0]["weight"]
    cosines = [part["cosine_to_total"] for part in parts]
    return {
        "value": _sum([part["value"] for part in parts]),
        "weight": weight,
        "contribution": _sum_of(part["contribution"] for part in parts),
        "grad_norm": norm,
        "grad_norm_weighted": None if norm is None else abs(weight) * norm,
        "grad_rms": root_mean_square(norm, size),
        "cosine_to_total": _merged_cosine(cosines, norms, norm, totals, total),
        "differentiable": any(part["differentiable"] for part in parts),
        "zero_gradient": _merged_zero(parts, norm),
        "seconds": _sum([part["seconds"] for part in parts]),
        "skipped": any(part["skipped"] for part in parts),
        "error": next((part["error"] for part in parts if part["error"]), None),
        "non_finite_zeroed": sum(part["non_finite_zeroed"] for part in parts),
        "custom": _merged_custom([part["custom"] for part in parts]),
    }


def _merged_zero(
    parts: Sequence[BaseLossRecord] | Sequence[RegularizerRecord], norm: float | None
) -> bool | None:
    """A part that had no tokens says nothing; one that was skipped or zeroed is not known to be."""
    if norm is None:
        return None
    spoiled = any(part.get("skipped") or part["non_finite_zeroed"] for part in parts)
    return norm == 0.0 and not spoiled and any(part["zero_gradient"] for part in parts)


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _sum_of(known) if len(known) == len(values) else None


def _sum_of(values: Iterable[float]) -> float:
    values = [*values]
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # fsum refuses what is too large, and inf - inf
        return float(sum(values))


def _merged_norm(norms: Sequence[float | None]) -> float | None:
    known = [norm for norm in norms if norm is not None]
    return math.hypot(*known) if len(known) == len(norms) else None


def _merged_cosine(
    cosines: Sequence[float | None],
    norms: Sequence[float | None],
    norm: float | None,
    totals: Sequence[float | None],
    total: float | None,
) -> float | None:
    """``Σ cos·|g|·|G| / (|g|·|G|)`` over the parts; divided first, so that nothing overflows."""
    if norm is None or total is None or None in cosines:
        return None
    if not all(map(math.isfinite, [norm, total, *(c or 0.0 for c in cosines)])):
        return None
    if norm == 0.0 or total == 0.0:
        return 0.0
    shares = zip(cosines, norms, totals, strict=True)
    value = _sum_of((c or 0.0) * ((g or 0.0) / norm) * ((t or 0.0) / total) for c, g, t in shares)
    return max(-1.0, min(1.0, value))


def _merged_cosines(records: Sequence[StepRecord]) -> dict[str, dict[str, float]] | None:
    parts = [record["cosines"] for record in records if record["cosines"] is not None]
    if len(parts) < len(records):
        return None
    norms: dict[str, list[float | None]] = {
        name: [record["regularizers"][name]["grad_norm"] for record in records]
        for name in records[0]["regularizers"]
    }
    norms["base_loss"] = [base["grad_norm"] for r in records if (base := r["base_loss"])]
    whole = {name: _merged_norm(of_parts) for name, of_parts in norms.items()}
    return {
        a: {
            b: _merged_cosine([p[a][b] for p in parts], norms[a], whole[a], norms[b], whole[b])
            or 0.0
            for b in others
        }
        for a, others in parts[0].items()
        if all(a in part for part in parts)  # of a loss of the server's no gradient is known
    }


def _merged_custom(parts: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Metrics are reduced as the values are, so they add up; one that a part lacks is 0 there."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _sum([part.get(name, 0.0) for part in parts]) for name in names}
