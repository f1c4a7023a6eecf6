"""Pieces of which several equations are made, each right at 0 and at -inf."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..tensors.flags import known_finite

__all__ = [
    "advantage_times",
    "at_label",
    "check_alternatives",
    "is_sampled",
    "log1mexp",
    "p_times",
    "straight_through",
]


def is_sampled(logprob: Tensor) -> bool:
    """Whether each position has one sampled token ([N], and [N,1]), not alternatives."""
    return logprob.ndim == 1 or logprob.shape[1] == 1


def p_times(logprob: Tensor, factor: Tensor) -> Tensor:
    """``exp(ℓ)·factor``; where ℓ = -inf it is 0, value and gradient, whatever the factor."""
    if not torch.is_grad_enabled():
        product = logprob.exp() * factor
        if known_finite(product):
            return product
    possible = logprob != -torch.inf
    safe = torch.where(possible, logprob, 0.0)
    return torch.where(possible, safe.exp() * torch.where(possible, factor, 0.0), 0.0)


def straight_through(value: Tensor, surrogate: Callable[[], Tensor]) -> Tensor:
    """``value`` with the gradient of ``surrogate()``, also where both are infinite."""
    if not torch.is_grad_enabled():
        return value
    result: Tensor = _StraightThrough.apply(value, surrogate())  # type: ignore[no-untyped-call]
    return result


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, surrogate: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor]:
        return None, grad_outputs[0]


def advantage_times(advantage: Tensor, factor: Tensor) -> Tensor:
    """``A·factor``; 0 where A = 0, also where the factor is infinite."""
    if not torch.is_grad_enabled():
        product = advantage * factor
        if known_finite(product):
            return product
    return advantage * torch.where(advantage != 0, factor, 0.0)


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 - e^x)`` for x <= 0 without cancellation; -inf at 0.

    Mächler, "Accurately computing log(1 - exp(-|a|))" (2012).
    """
    near = x > -math.log(2)
    close = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, close, far)


def at_label(logprob: Tensor, label: int) -> Tensor:
    """1 in the column of the label, else 0: [1,K]."""
    indicator = torch.zeros_like(logprob[:1])
    indicator[:, label] = 1
    return indicator


def check_alternatives(name: str, logprob: Tensor, label: int) -> None:
    """Whether the logprobs have alternatives, and the label is one of them."""
    if logprob.ndim == 1:
        raise ValueError(
            f"{name} compares the alternatives of [T,K] logprobs, but a datum has logprobs of "
            "shape [T]; give it targets of shape [T,K]"
        )
    if not 0 <= label < logprob.shape[1]:
        raise ValueError(
            f"label must be a column of the [T,{logprob.shape[1]}] logprobs, got {label}"
        )
