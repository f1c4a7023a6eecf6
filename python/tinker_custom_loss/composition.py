"""From what each term computed to one loss, one gradient and one record."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import NonFiniteError, TermError
from .record import RegularizerRecord, StepRecord, flatten, step_record
from .regularizer import BASE_LOSS, Regularizer
from .running.differentiation import Evaluation
from .running.evaluation import is_of_catalogue
from .running.measured import Measured, measured
from .running.non_finite import CheckedEvaluation, check_finite, record_of
from .running.together import Results
from .tensors import gradients as grad
from .tensors.batch import TensorBatch
from .tensors.gradients import ParameterGradient

__all__ = ["ComposedLoss", "Composition", "Step"]

logger = logging.getLogger(__name__)

_warned_of_zero: set[tuple[str, str]] = set()  # a client makes a new composer at every step


@dataclass(frozen=True)
class ComposedLoss:
    """The loss of one step, without its gradient.

    Attributes:
        loss_total: the composed loss, in double precision.
        record: the record of the step, see :mod:`tinker_custom_loss.record`.
    """

    loss_total: float
    record: StepRecord

    @property
    def flat_record(self) -> dict[str, float]:
        """The record under flat keys such as ``regularizers/<name>/value``."""
        return flatten(self.record)

    def __repr__(self) -> str:
        return f"ComposedLoss(loss_total={self.loss_total:.6g}, {self._regularizers})"

    @property
    def _regularizers(self) -> str:
        return f"regularizers=[{', '.join(self.record['regularizers'])}]"


@dataclass(frozen=True, repr=False)
class Composition(ComposedLoss):
    """The loss of one step and its gradient.

    Attributes:
        gradient: ``∂loss_total/∂logprobs`` over one buffer (not negated), in the dtype and on the
            device of the logprobs; if those differ, in float32 or float64, on the first's device.
        term_gradients: each differentiable term's own unweighted gradient by name (the base loss
            under ``"base_loss"``), if asked for; else empty.
        parameter_gradients: ``∂loss_total`` with respect to leaves of the terms' own, such as the
            weights of a head. :meth:`Composer.compute` has added them to their ``.grad``.
    """

    gradient: TensorBatch
    term_gradients: Mapping[str, TensorBatch] = field(default_factory=dict)
    parameter_gradients: Sequence[ParameterGradient] = ()
    _gradients: Sequence[Tensor] | None = None  # where no single buffer can hold them

    @property
    def gradients(self) -> list[Tensor]:
        """``∂loss_total/∂logprobs``, one tensor a datum: of its logprobs' shape [T] or [T,K], in
        their dtype and on their device."""
        return self.gradient.tensors() if self._gradients is None else list(self._gradients)

    def cosines(self) -> tuple[list[str], Tensor]:
        """Names, and the [n,n] matrix of cosines between the terms' own gradients.

        A negative entry is a conflict: to first order, a step that lowers one term raises the
        other. Needs ``term_gradients=True``.
        """
        names = list(self.term_gradients)
        flats = [batch.flat for batch in self.term_gradients.values()]
        norms = [grad.norm(flat) for flat in flats]
        matrix = [
            [grad.cosine(a, b, norms[i], norms[j]) for j, b in enumerate(flats)]
            for i, a in enumerate(flats)
        ]
        cosines = torch.tensor(matrix, dtype=torch.float64, device="cpu")
        return names, cosines.reshape(len(names), len(names))

    def __repr__(self) -> str:
        return (
            f"Composition(loss_total={self.loss_total:.6g}, gradient={self.gradient!r}, "
            f"{self._regularizers})"
        )


@dataclass(frozen=True)
class Step:
    """One step of a composer: its terms, and what they were given.

    ``given`` are the logprobs as the caller has them, ``batch`` the same in one buffer.
    ``schedule_step`` is the step for weight schedules, ``started`` a ``time.perf_counter()``,
    ``out`` where the gradient is to be, which may be where it was made.
    """

    terms: Sequence[Regularizer]
    weights: Sequence[float]
    given: Sequence[Tensor] | TensorBatch
    batch: TensorBatch
    schedule_step: int | None
    started: float
    out: Tensor | None = None

    def composed_loss(self, results: Sequence[Evaluation | TermError]) -> ComposedLoss:
        """The loss and its record.

        Raises:
            NonFiniteError: a term's loss, or the sum of all, is not finite.
        """
        return ComposedLoss(*self._recorded(self._checked(results), None))

    def composition(self, results: Results, keep_term_gradients: bool) -> Composition:
        """The loss, its gradient and the record.

        Raises:
            NonFiniteError: a loss or gradient, or the sum of all, is not finite.
            TermError: no term is differentiable.
        """
        found = results.measured
        if found is None:
            checked = self._checked(results.evaluations)
            found = self._measured(checked, results.evaluations)
        else:
            checked = [
                CheckedEvaluation.skipped(each)
                if isinstance(each, TermError)
                else CheckedEvaluation(each, each.gradient, norm, each.parameter_gradients)
                for each, norm in zip(results.evaluations, found.norms, strict=True)
            ]
        total = found.total
        if not found.total_norm < torch.finfo(total.dtype).max:
            raise NonFiniteError(
                "the sum of the weighted gradients overflows, although each one is finite; "
                "lower the weights",
                term=self._names,
            )
        loss_total, record = self._recorded(checked, found)
        self._warn_of_zero_gradients(record)
        kept = {}
        for term, part in zip(self.terms, checked, strict=True):
            if keep_term_gradients and part.gradient is not None:
                own = part.gradient
                if results.measured is None:  # then it may be the total, or the memory of an input
                    own = own.clone()
                kept[term.name] = self.batch.with_flat(own)
        gradient, gradients = self._bring_home(total)
        parameters = self._parameter_gradients(checked)
        return Composition(loss_total, record, gradient, kept, parameters, gradients)

    def _checked(self, results: Sequence[Evaluation | TermError]) -> list[CheckedEvaluation]:
        return [
            check_finite(term, result, self.batch)
            for term, result in zip(self.terms, results, strict=True)
        ]

    def _measured(
        self, checked: Sequence[CheckedEvaluation], results: Sequence[Evaluation | TermError]
    ) -> Measured:
        gradients = [part.gradient for part in checked]
        if not any(part.gradient is not None or part.error for part in checked):
            names = ", ".join(f'"{term.name}"' for term in self.terms)
            raise TermError(
                f"no term is differentiable: {names} returned constants, without a graph back to "
                "the logprobs, so there is no gradient to train with; compute the loss from the "
                "logprobs without .item(), .detach() or numpy",
                term=self.terms[0].name,
            )
        borrowed = any(isinstance(each, Evaluation) and each.borrowed for each in results)
        norms = [part.norm for part in checked]
        return measured(self.weights, gradients, norms, self.batch.flat, own=not borrowed)

    def _recorded(
        self, checked: Sequence[CheckedEvaluation], found: Measured | None
    ) -> tuple[float, StepRecord]:
        size = self.batch.flat.numel()
        records = {
            term.name: record_of(
                part,
                weight,
                None if found is None else found.with_total[index],
                size,
                found is not None,
            )
            for index, (term, part, weight) in enumerate(
                zip(self.terms, checked, self.weights, strict=True)
            )
        }
        loss_total = self._sum_of_contributions(records)
        base_loss = records.pop(BASE_LOSS, None)
        return loss_total, step_record(
            loss_total=loss_total,
            regularizer_total=self._sum_of_contributions(records),
            base_loss=base_loss,
            regularizers=records,
            total_grad_norm=None if found is None else found.total_norm,
            cosines=None if found is None else self._of_pairs(found),
            size=size,
            datums=len(self.batch),
            schedule_step=self.schedule_step,
            compute_seconds=time.perf_counter() - self.started,
        )

    def _of_pairs(self, found: Measured) -> dict[str, dict[str, float]]:
        names = [term.name for term in self.terms]
        return {
            name: {names[j]: found.pairs[i, j] for j in range(i + 1, len(names))}
            for i, name in enumerate(names[:-1])
        }

    def _warn_of_zero_gradients(self, record: StepRecord) -> None:
        """Of terms that train nothing, most often because of a detach too many.

        Not of the catalogue's: their gradients are proven, and are 0 where the data say so, as the
        kl's of a model that is still its own reference. The record has it all the same.
        """
        for term, weight in zip(self.terms, self.weights, strict=True):
            of_term = record["regularizers"].get(term.name) or record["base_loss"]
            assert of_term is not None
            if not of_term["zero_gradient"] or weight == 0.0 or is_of_catalogue(term.fn):
                continue
            key = (term.name, getattr(term.fn, "__qualname__", ""))
            if key not in _warned_of_zero:
                _warned_of_zero.add(key)
                logger.warning(
                    'the gradient of the term "%s" is exactly 0 at every logprob of a batch with '
                    "tokens in it, so it trained nothing; if that is not where its formula is "
                    "flat, as a hinge is, look for .detach(), .item() or a comparison between the "
                    "logprobs and its loss (said once; zero_gradient in the record says it of "
                    "every step)",
                    term.name,
                )

    @staticmethod
    def _sum_of_contributions(records: Mapping[str, RegularizerRecord]) -> float:
        contributions = {name: record["contribution"] for name, record in records.items()}
        try:
            total = math.fsum(contributions.values())
        except (OverflowError, ValueError):  # it raises where a float would be inf or nan
            total = math.nan
        if math.isfinite(total):
            return total
        terms = ", ".join(f'"{name}": {value:.6g}' for name, value in contributions.items())
        raise NonFiniteError(
            "the sum of the weighted losses overflows, although each loss is finite; lower the "
            f"weights (the contributions are {terms})",
            term=", ".join(contributions),
        )

    def _parameter_gradients(self, checked: Sequence[CheckedEvaluation]) -> list[ParameterGradient]:
        parts = [part.parameter_gradients for part in checked]
        sums = grad.sum_parameter_gradients(zip(self.weights, parts, strict=True))
        if not all(part.is_finite() for part in sums):
            raise NonFiniteError(
                "the sum of the weighted gradients of a parameter overflows, although each one is "
                "finite; lower the weights",
                term=self._names,
            )
        return sums

    def _bring_home(self, total: Tensor) -> tuple[TensorBatch, list[Tensor] | None]:
        """The gradient in the dtype and on the device given; and as a list, if those are many."""
        given = self.given
        homes = [given.flat] if isinstance(given, TensorBatch) else given
        if len({(home.dtype, home.device) for home in homes}) == 1:
            fitting = self._fitting(total, homes[0])
            if self.out is not None and self.out is not total:
                with torch.inference_mode():  # in which it may have been made
                    self.out.copy_(fitting)
                fitting = self.out
            return self.batch.with_flat(fitting), None
        widest = self.batch.with_flat(total)
        pairs = zip(widest.tensors(), homes, strict=True)
        return widest, [self._fitting(gradient, home) for gradient, home in pairs]

    def _fitting(self, gradient: Tensor, like: Tensor) -> Tensor:
        home = gradient.to(like.device, like.dtype)
        if like.element_size() < gradient.element_size() and not home.isfinite().all():
            dtype = str(like.dtype).removeprefix("torch.")
            raise NonFiniteError(
                f"the gradient is finite, but does not fit into {dtype}, the type of the logprobs; "
                "give them as float32, or lower the weights",
                term=self._names,
            )
        return home

    @property
    def _names(self) -> str:
        return ", ".join(term.name for term in self.terms)
