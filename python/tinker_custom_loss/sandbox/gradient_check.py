"""Is the linearized gradient the gradient? Here the model's own parameters can tell.

A Tinker server never sees a custom loss: it gets ``weights = -∂loss/∂logprobs``, and its parameter
gradient of ``Σ -logprob · weight`` is that of the custom loss, by the chain rule. Against it stands
autograd from end to end, through the terms and the model at once, which only a local model allows.
"""

from __future__ import annotations

import asyncio
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..composer import Composer
from ..regularizer import regularizers_from

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ..regularizer import LossFn, Regularizer
    from .examples import Examples
    from .model import LanguageModel

__all__ = ["GradientCheck", "check_gradient"]


@dataclass(frozen=True)
class GradientCheck:
    """Both parameter gradients compared: largest absolute difference, largest absolute entry."""

    max_abs_difference: float
    max_abs_gradient: float


def check_gradient(
    model: LanguageModel,
    examples: Examples,
    data: Sequence[Any],
    base_loss_fn: LossFn | None = None,
    regularizers: Sequence[Regularizer | Mapping[str, Any]] | None = None,
    *,
    base_params: Mapping[str, Any] | None = None,
    step: int | None = None,
) -> GradientCheck:
    """Compare the composer's way with end-to-end autograd, on ``model`` as it is now.

    ``data`` are the datums that the terms see, ``examples`` the same ones for the model. Each
    stochastic term should draw the same numbers when it is called twice. Accumulated gradients
    stay as they are.

    :raises CustomLossError: as :class:`Composer` does.
    """
    composer = Composer(base_loss_fn, regularizers, base_params=base_params)
    detached = model.forward(examples).logprobs
    gradient = composer.compute(data, detached, step=step).gradient
    weights = gradient.with_flat(-gradient.flat)
    linearized = model.differentiate(examples.weighted(weights))[1]

    logprobs = model.logprobs(examples).tensors()
    loss: Tensor | float = 0.0
    if base_loss_fn is not None:
        loss = _loss(base_loss_fn(data, logprobs, **(base_params or {})))
    for term in regularizers_from(regularizers):
        if term.enabled:
            loss = loss + term.weight_at(step) * _loss(term.fn(data, logprobs, **term.params))
    assert isinstance(loss, torch.Tensor)
    direct = torch.autograd.grad(loss, model.parameters, materialize_grads=True, allow_unused=True)

    return GradientCheck(
        max(float((a - b).abs().max()) for a, b in zip(linearized, direct, strict=True)),
        max(float(b.abs().max()) for b in direct),
    )


def _loss(returned: Any) -> Tensor:
    if inspect.isawaitable(returned):
        returned = asyncio.run(_awaited(returned))
    loss: Tensor = returned[0]
    return loss.reshape(())


async def _awaited(awaitable: Any) -> Any:
    return await awaitable
