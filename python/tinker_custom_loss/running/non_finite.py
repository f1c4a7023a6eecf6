"""What happens when a loss or a gradient is nan or infinite, and what is recorded of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NonFiniteError, TermError
from ..record import RegularizerRecord, root_mean_square
from ..regularizer import Regularizer
from ..tensors import gradients as grad
from ..tensors.batch import TensorBatch
from ..tensors.gradients import ParameterGradient
from .differentiation import Evaluation

__all__ = ["CheckedEvaluation", "check_finite", "record_of"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckedEvaluation:
    """An evaluation after its term's ``on_non_finite`` was applied: its gradient is finite.

    ``norm`` is that of the gradient, which is None if there is none, or if it was measured as it
    was made and is not kept.
    """

    evaluation: Evaluation | None
    gradient: Tensor | None
    norm: float
    parameter_gradients: Sequence[ParameterGradient] = ()
    zeroed: int = 0
    error: str | None = None

    @classmethod
    def skipped(cls, error: TermError) -> CheckedEvaluation:
        return cls(None, None, 0.0, error=str(error))


def check_finite(
    term: Regularizer, result: Evaluation | TermError, batch: TensorBatch
) -> CheckedEvaluation:
    """Apply a term's ``on_non_finite`` to what it computed.

    The check costs nothing extra: a norm is finite only if every entry is.
    """
    if isinstance(result, TermError):
        return CheckedEvaluation.skipped(result)
    gradient = result.gradient
    norm = 0.0
    if gradient is not None:
        gradient = grad.aligned(gradient)
        norm = grad.norm(gradient)
    parameters = result.parameter_gradients
    finite = all(part.is_finite() for part in parameters)
    if math.isfinite(result.value) and math.isfinite(norm) and finite:
        return CheckedEvaluation(result, gradient, norm, parameters)
    if term.on_non_finite == "zero":
        zeroed = int(not math.isfinite(result.value))
        if gradient is not None:
            bad = ~torch.isfinite(gradient)
            zeroed += int(bad.sum())
            gradient = gradient.masked_fill(bad, 0.0)
            norm = grad.norm(gradient)
        zeroed_parameters = []
        for part in parameters:
            dense = part.gradient.to_dense()
            bad = ~torch.isfinite(dense)
            zeroed += int(bad.sum())
            finite_part = ParameterGradient(part.parameter, dense.masked_fill(bad, 0.0))
            zeroed_parameters.append(finite_part)
        return CheckedEvaluation(result, gradient, norm, zeroed_parameters, zeroed)
    error = _non_finite_error(term.name, result, gradient, batch)
    if term.on_non_finite == "skip":
        logger.warning("%s; it is skipped, and contributes 0 to this step", error)
        return CheckedEvaluation.skipped(error)
    raise error


def _non_finite_error(
    name: str, evaluation: Evaluation, gradient: Tensor | None, batch: TensorBatch
) -> NonFiniteError:
    """Says whether the input, the loss or only the gradient went wrong, and where."""
    inputs = torch.isfinite(batch.flat).logical_not().nonzero()
    upstream, datum, token = "", None, None
    if len(inputs):
        datum, token = batch.locate(int(inputs[0]))
        others = f" (and {len(inputs) - 1} more)" if len(inputs) > 1 else ""
        upstream = (
            f"; the logprobs themselves are not finite at datum {datum}, token {_index(token)}"
            f"{others}, so mask those positions"
        )
    if gradient is not None and not math.isfinite(grad.norm(gradient)):
        positions = torch.isfinite(gradient).logical_not().nonzero()
        datum, token = batch.locate(int(positions[0]))
        return NonFiniteError(
            f'the gradient of the term "{name}" is {float(gradient[positions[0]])} at datum '
            f"{datum}, token {_index(token)}, and not finite at {len(positions)} of "
            f"{gradient.numel()} positions; its loss is {evaluation.value}"
            + (upstream or "; likely log or division at 0, or sqrt at 0"),
            term=name,
            datum=datum,
            token=token,
        )
    for part in evaluation.parameter_gradients if math.isfinite(evaluation.value) else ():
        if not part.is_finite():
            return NonFiniteError(
                f'the gradient of the term "{name}" with respect to a parameter of shape '
                f"{list(part.parameter.shape)} is not finite; its loss is {evaluation.value}"
                f"{upstream}",
                term=name,
                datum=datum,
                token=token,
            )
    return NonFiniteError(
        f'the loss of the term "{name}" is {evaluation.value}, not a finite number{upstream}',
        term=name,
        datum=datum,
        token=token,
    )


def record_of(
    part: CheckedEvaluation, weight: float, cosine: float | None, size: int, differentiated: bool
) -> RegularizerRecord:
    """What is recorded of one term, with the cosine to the total gradient."""
    evaluation = part.evaluation
    norm = part.norm if differentiated else None
    value = None if evaluation is None else evaluation.value
    return {
        "value": value,
        "weight": weight,
        "contribution": weight * value if value is not None and math.isfinite(value) else 0.0,
        "grad_norm": norm,
        "grad_norm_weighted": None if norm is None else abs(weight) * norm,
        "grad_rms": root_mean_square(norm, size),
        "cosine_to_total": cosine,
        "differentiable": evaluation is not None and evaluation.differentiable,
        "zero_gradient": _is_zero(part, size) if differentiated else None,
        "seconds": None if evaluation is None else evaluation.seconds,
        "skipped": part.error is not None,
        "error": part.error,
        "non_finite_zeroed": part.zeroed,
        "custom": {} if evaluation is None else evaluation.metrics,
    }


def _is_zero(part: CheckedEvaluation, size: int) -> bool:
    """Whether a term had tokens, and its own gradient, not what ``on_non_finite`` made of it, is 0.

    A term of the catalogue, or one written with ``@term``, says how many tokens have a weight.
    """
    done = part.evaluation
    if done is None or not done.differentiable or part.norm != 0.0 or part.zeroed:
        return False
    return done.metrics.get("tokens", size) != 0


def _index(token: tuple[int, ...]) -> str:
    return str(token[0]) if len(token) == 1 else str(list(token))
