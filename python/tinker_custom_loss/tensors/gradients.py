"""The arithmetic on gradients: one buffer, norms, cosines, and the surrogate loss.

All norms and cosines are with respect to *logprobs*, not to any parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ..errors import RequestError

__all__ = [
    "ParameterGradient",
    "aligned",
    "begins_aligned",
    "cosine",
    "dot",
    "norm",
    "sum_parameter_gradients",
    "surrogate",
    "weighted_sum",
]

_BLOCK = 1 << 16
_ALIGNMENT = 64  # bytes
_PRODUCT_MIN, _PRODUCT_MAX = (
    1e-25,
    1e300,
)  # of two norms: in between, no product that counts is lost


def aligned(a: Tensor) -> Tensor:
    """``a``, contiguous and where torch itself would allocate it; a copy if it is not.

    The last bits of a dot product depend on where its arguments begin, and the same step must give
    the same record.
    """
    a = a.contiguous()
    return a if begins_aligned(a) else a.clone()


def begins_aligned(a: Tensor) -> bool:
    """Whether ``a`` begins where torch itself would allocate it."""
    return a.data_ptr() % _ALIGNMENT == 0


def dot(a: Tensor, b: Tensor) -> float:
    """``Σ a_i·b_i`` of two flat tensors, accumulated over blocks in float64.

    One float32 reduction over 20 million values loses four digits. At the same speed, blocks of
    65,536 keep six, and of products that are all the same five.
    """
    if a.numel() <= _BLOCK:
        return float(torch.dot(a, b))
    blocks = math.ceil(a.numel() / _BLOCK)
    parts = [torch.dot(x, y) for x, y in zip(a.chunk(blocks), b.chunk(blocks), strict=True)]
    if a.device.type == "cpu":
        return sum(map(float, parts))
    return float(torch.stack(parts).sum(dtype=torch.float64))


def norm(a: Tensor) -> float:
    """Euclidean norm of a flat tensor; nan or inf if and only if an entry is nan or infinite."""
    square = dot(a, a)
    if math.isfinite(square) and square > 1e-30:
        return math.sqrt(square)
    largest = float(a.abs().max()) if a.numel() else 0.0
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    # Squares over- or underflow.
    return largest * float(torch.linalg.vector_norm(a.double() / largest))


def cosine(a: Tensor, b: Tensor, norm_a: float, norm_b: float) -> float:
    """Cosine of the angle between two flat gradients; 0 where either is zero."""
    if norm_a == 0.0 or norm_b == 0.0:
        return 0.0
    scale = norm_a * norm_b
    value = dot(a, b) / scale if _PRODUCT_MIN < scale < _PRODUCT_MAX else math.nan
    if not math.isfinite(value):  # products over- or underflow
        value = float(torch.dot(a.double() / norm_a, b.double() / norm_b))
    return max(-1.0, min(1.0, value))


def weighted_sum(
    gradients: Sequence[tuple[float, Tensor]], like: Tensor, out: Tensor | None = None
) -> Tensor:
    """``Σ weight·gradient`` in list order, so that it never depends on which term ended first.

    In ``out``, or in memory of its own.
    """
    if not gradients:
        return torch.zeros_like(like) if out is None else out.zero_()
    (weight, first), *rest = gradients
    total = _scaled(first, weight, out)
    for weight, gradient in rest:
        if abs(weight) <= torch.finfo(total.dtype).max:
            total.add_(gradient, alpha=weight)
        else:
            total.add_(_scaled(gradient, weight))
    return total


def _scaled(gradient: Tensor, weight: float, out: Tensor | None = None) -> Tensor:
    if abs(weight) <= torch.finfo(gradient.dtype).max:
        return torch.mul(gradient, weight, out=out)
    scaled = (gradient.double() * weight).to(gradient.dtype)  # 0·weight is 0, not 0·inf
    return scaled if out is None else out.copy_(scaled)


@dataclass(frozen=True, eq=False)
class ParameterGradient:
    """The gradient of a loss with respect to a leaf other than the logprobs: of a head, say."""

    parameter: Tensor
    gradient: Tensor

    def scaled(self, weight: float) -> ParameterGradient:
        return ParameterGradient(self.parameter, _scaled(self.gradient, weight))

    def plus(self, other: ParameterGradient) -> ParameterGradient:
        return ParameterGradient(self.parameter, self.gradient + other.gradient)

    def is_finite(self) -> bool:
        values = self.gradient.coalesce().values() if self.gradient.is_sparse else self.gradient
        return bool(torch.isfinite(values).all())

    def accumulate(self) -> None:
        """Add it to the parameter's ``.grad``, as ``backward()`` does, with the same hooks."""
        with torch.inference_mode(False), torch.no_grad():  # in inference mode it has no edge
            accumulates: Any = get_gradient_edge(self.parameter).node
            accumulates(self.gradient)

    def __repr__(self) -> str:
        return f"ParameterGradient({list(self.parameter.shape)})"


def sum_parameter_gradients(
    weighted: Iterable[tuple[float, Iterable[ParameterGradient]]],
) -> list[ParameterGradient]:
    """``Σ weight·gradient`` of each parameter, in list order."""
    sums: dict[int, ParameterGradient] = {}
    for weight, gradients in weighted:
        for gradient in gradients:
            scaled, key = gradient.scaled(weight), id(gradient.parameter)
            sums[key] = sums[key].plus(scaled) if key in sums else scaled
    return list(sums.values())


def surrogate(
    value: float,
    gradients: Sequence[Tensor],
    logprobs: Sequence[Tensor],
    parameter_gradients: Sequence[ParameterGradient] = (),
) -> Tensor:
    """A scalar whose value is ``value`` and whose backward hands ``gradients`` to ``logprobs``,
    and adds ``parameter_gradients`` to the ``.grad`` of their parameters.

    This is how a gradient that is already known travels through an API that wants to call
    ``loss.backward()`` itself. The scalar is float64, so that the value arrives as it is.
    """
    loss: Tensor = _Surrogate.apply(value, gradients, parameter_gradients, *logprobs)  # type: ignore[no-untyped-call]
    return loss


class _Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(
        value: float,
        gradients: Sequence[Tensor],
        parameter_gradients: Sequence[ParameterGradient],
        *logprobs: Tensor,
    ) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device="cpu")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, gradients, parameter_gradients, *_ = inputs
        ctx.save_for_backward(*gradients)  # a second backward() is refused, as of any graph
        ctx.parameter_gradients = parameter_gradients
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RequestError(
                "a composed loss cannot be differentiated twice (create_graph=True): its terms "
                "have been differentiated already, so the second derivative would be 0; call the "
                "terms yourself, without a Composer, and give their loss to torch.autograd"
            )
        gradients: Sequence[Tensor] = ctx.saved_tensors
        (grad_output,) = grad_outputs
        if grad_output is None:
            return (None, None, None, *(None for _ in gradients))
        scale = float(grad_output)
        for gradient in ctx.parameter_gradients:
            gradient.scaled(scale).accumulate()
        scaled = gradients if scale == 1.0 else [g * scale for g in gradients]
        # Clones: `.grad` belongs to the caller, who may scale it in place.
        return (None, None, None, *(g.clone() for g in scaled))
