"""The record of one step: what each term did, nested for code and flat for loggers.

Gradient norms, RMS values and cosines are with respect to *logprobs* (one entry per token, or per
token and alternative), not to the model's parameters. ``grad_rms = grad_norm / sqrt(N)`` over the
step's N logprob values, comparable between batches of different size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["TermRecord", "flatten", "step_record"]


@dataclass(frozen=True)
class TermRecord:
    """One term in one step. None stands for what was not computed.

    ``contribution`` is ``weight · value``, what the term added to ``loss_total``;
    ``cosine_to_total`` is that of its weighted gradient and the total gradient (-1: it works
    against the step, 0: unrelated, or either is zero).
    """

    value: float | None
    weight: float
    contribution: float
    custom: Mapping[str, float]
    grad_norm: float | None
    cosine_to_total: float | None
    differentiable: bool
    seconds: float | None
    non_finite_zeroed: int = 0
    error: str | None = None

    def as_dict(self, size: int) -> dict[str, Any]:
        """The record of a regularizer; ``size`` is the number of logprob values of the step."""
        norm = self.grad_norm
        return {
            "value": self.value,
            "weight": self.weight,
            "contribution": self.contribution,
            "grad_norm": norm,
            "grad_norm_weighted": None if norm is None else abs(self.weight) * norm,
            "grad_rms": None if norm is None else _rms(norm, size),
            "cosine_to_total": self.cosine_to_total,
            "differentiable": self.differentiable,
            "seconds": self.seconds,
            "skipped": self.error is not None,
            "error": self.error,
            "non_finite_zeroed": self.non_finite_zeroed,
            "custom": dict(self.custom),
        }


def step_record(
    *,
    loss_total: float,
    base_loss: TermRecord | None,
    regularizers: Mapping[str, TermRecord],
    total_grad_norm: float | None,
    size: int,
    datums: int,
    step: int,
    seconds: float,
) -> dict[str, Any]:
    """The nested record of one step.

    The keys of a regularizer are always the same; ``base_loss`` has them too, without those that
    only a weighted term has, and is None when there is no base loss.
    """
    base = None
    if base_loss is not None:
        base = base_loss.as_dict(size)
        for key in ("weight", "contribution", "grad_norm_weighted", "skipped", "error"):
            del base[key]
    return {
        "loss_total": loss_total,
        "regularizer_total": math.fsum(record.contribution for record in regularizers.values()),
        "base_loss": base,
        "regularizers": {name: record.as_dict(size) for name, record in regularizers.items()},
        "total_grad_norm": total_grad_norm,
        "total_grad_rms": None if total_grad_norm is None else _rms(total_grad_norm, size),
        "logprob_count": size,
        "datum_count": datums,
        "step": step,
        "seconds": seconds,
    }


def flatten(record: Mapping[str, Any]) -> dict[str, float]:
    """The flat form, for W&B, TensorBoard and the like: ``regularizers/<name>/value`` and so on.

    Only floats: truth values become 0.0 and 1.0; what is None or text is left out. A ``:`` in the
    name of a custom metric becomes ``.``, because Tinker splits metric names there.
    """
    flat: dict[str, float] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{prefix}/{key}" if prefix else str(key), inner)
        elif isinstance(value, (int, float)):
            flat[prefix.replace(":", ".")] = float(value)

    walk("", record)
    return flat


def _rms(norm: float, size: int) -> float:
    return norm / math.sqrt(size) if size else 0.0
