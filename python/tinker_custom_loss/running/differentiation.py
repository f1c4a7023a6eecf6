"""A term's own gradient: the leaf that it computes on, and what is taken of its loss."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ChangedLogprobsError, StaleGraphError, TermError
from ..tensors.batch import TensorBatch
from ..tensors.flags import same_bits
from ..tensors.gradients import ParameterGradient
from .returned import checked

__all__ = ["Evaluation", "check_unchanged", "differentiate", "leaf_of"]


class Evaluation(NamedTuple):
    """What one term computed.

    ``gradient`` is ``∂value/∂logprobs`` over the flat buffer [N], unweighted; None if the loss
    does not depend on the logprobs through a graph, or if no gradient was asked for.
    ``parameter_gradients`` are those of all other leaves of its graph, also unweighted.
    """

    value: float
    metrics: dict[str, float | None]
    differentiable: bool
    gradient: Tensor | None
    seconds: float
    parameter_gradients: Sequence[ParameterGradient] = ()
    borrowed: bool = False  # the gradient may be the memory of an input


# Which step's logprobs a leaf stands for; the attribute lives as long as the graph does.
_SOURCE = "_tinker_custom_loss_source"


def leaf_of(logprobs: TensorBatch, *, shares_memory: bool = False) -> TensorBatch:
    """A leaf of a new graph over a copy of the logprobs: each term has its own of both.

    So what a term does to its argument, by whatever way round autograd's version counter, reaches
    neither the caller's memory nor the other terms. Only what is known to change nothing
    ``shares_memory``.
    """
    flat = logprobs.flat.detach()
    leaf = (flat if shares_memory else flat.clone()).requires_grad_(True)
    setattr(leaf, _SOURCE, logprobs.flat)
    return logprobs.with_flat(leaf)


def check_unchanged(name: str, leaf: TensorBatch | None, error: BaseException | None) -> None:
    """Refuse the loss of a term that changed its logprobs: its gradient would be of the others.

    Compared by bytes: a write through numpy or ``.data`` does not count as one anywhere.
    """
    if leaf is None:
        return
    if not same_bits(leaf.flat, getattr(leaf.flat, _SOURCE)):
        raise ChangedLogprobsError(
            f'the term "{name}" changed the logprobs in place, so its gradient would not be that '
            "of its loss; terms must leave their arguments as they are: clone what you change",
            term=name,
        ) from error


def differentiate(
    name: str, returned: object, leaf: TensorBatch, gradients: bool, started: float
) -> Evaluation:
    """Check what a term returned and take its gradients.

    They are taken on their own, with ``torch.autograd.grad``, so that ``.grad`` of nothing is
    touched: a step that fails must leave no trace.
    """
    gradient: Tensor | None = None
    parameters: Sequence[ParameterGradient] = ()
    try:
        loss, metrics = checked(name, returned)
        value = float(loss.detach())
        differentiable = loss.requires_grad
        if differentiable and gradients:
            gradient, parameters = _gradients(name, loss.reshape(()), leaf)
            differentiable = gradient is not None
    except TermError:
        raise
    except Exception as error:
        raise TermError.from_exception(name, error) from error
    seconds = time.perf_counter() - started
    return Evaluation(value, metrics, differentiable, gradient, seconds, parameters)


def _gradients(
    name: str, loss: Tensor, leaf: TensorBatch
) -> tuple[Tensor | None, list[ParameterGradient]]:
    """``∂loss/∂logprobs`` (None: it does not depend on them), and those of all other leaves.

    Where terms share a part of their graphs, say a feature that one of them computed, a loss
    leads to the leaf of another term too; both stand for the same logprobs.
    """
    source = getattr(leaf.flat, _SOURCE)
    logprobs, parameters = [], []
    for found in _leaves(loss):
        stands_for = getattr(found, _SOURCE, None)
        if stands_for is None:
            parameters.append(found)
        elif stands_for is source:
            logprobs.append(found)
        else:
            raise StaleGraphError(
                f'the loss of the term "{name}" depends on the logprobs of another step, through '
                "something that was kept, such as a cached feature, and that part of its gradient "
                "would be lost; compute it anew in each step, or detach it",
                term=name,
            )
    if not logprobs and not parameters:
        return None, []
    # Another term may need what they share; the graph ends with the last loss that refers to it.
    taken: Sequence[Any] = torch.autograd.grad(
        loss, [*logprobs, *parameters], retain_graph=True, allow_unused=True
    )
    for found in logprobs:  # they may have been changed since the terms returned, by others
        check_unchanged(name, leaf.with_flat(found), None)
    parts = [part for part in taken[: len(logprobs)] if part is not None]
    return (
        sum(parts[1:], start=parts[0]) if parts else None,
        [
            ParameterGradient(parameter, gradient)
            for parameter, gradient in zip(parameters, taken[len(logprobs) :], strict=True)
            if gradient is not None
        ],
    )


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """The tensors whose ``.grad`` ``loss.backward()`` would add to."""
    seen: set[Any] = set()
    ahead: list[Any] = [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        ahead.extend(following for following, _ in node.next_functions)
