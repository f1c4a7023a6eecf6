"""A term's own gradient: the leaf that it computes on, and what is taken of its loss."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ChangedLogprobsError, TermError
from ..tensors.batch import TensorBatch
from .returned import checked

__all__ = ["Evaluation", "check_unchanged", "differentiate", "leaf_of"]


@dataclass(frozen=True)
class Evaluation:
    """What one term computed.

    ``gradient`` is ``∂value/∂logprobs`` over the flat buffer [N], unweighted; None if the loss
    does not depend on the logprobs through a graph, or if no gradient was asked for.
    """

    value: float
    metrics: dict[str, float | None]
    differentiable: bool
    gradient: Tensor | None
    seconds: float


def leaf_of(logprobs: TensorBatch) -> TensorBatch:
    """A leaf of a new graph over the same memory: each term has its own.

    ``.data`` rather than ``.detach()``: it counts in-place changes on its own, so that they can
    be told apart by term.
    """
    return logprobs.with_flat(logprobs.flat.data.requires_grad_(True))


def differentiate(
    name: str, returned: object, leaf: TensorBatch, gradients: bool, started: float
) -> Evaluation:
    """Check what a term returned and take its gradient.

    The gradient is taken on its own, with ``torch.autograd.grad``, so that no graph outlives its
    term and ``.grad`` of nothing is touched.
    """
    try:
        loss, metrics = checked(name, returned)
        value = float(loss.detach())
        gradient = None
        differentiable = loss.requires_grad
        if differentiable and gradients:
            (gradient,) = torch.autograd.grad(loss.reshape(()), leaf.flat, allow_unused=True)
            differentiable = gradient is not None
    except TermError:
        raise
    except Exception as error:
        raise TermError.from_exception(name, error) from error
    return Evaluation(value, metrics, differentiable, gradient, time.perf_counter() - started)


def check_unchanged(name: str, leaf: TensorBatch | None, error: BaseException | None) -> None:
    if leaf is not None and leaf.flat._version:
        raise ChangedLogprobsError(
            f'the term "{name}" changed the logprobs in place, which the other terms share; '
            "terms must leave their arguments as they are: clone what you change",
            term=name,
        ) from error
