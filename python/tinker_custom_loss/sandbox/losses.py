"""The losses of the service, by name: sums over tokens of functions of their logprobs.

ℓ is a target's logprob under the model, μ its logprob under the sampler, A its advantage, and
ρ = exp(ℓ - μ). Formulas, keys and defaults are those of the service's documentation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from .examples import Examples

__all__ = ["CROSS_ENTROPY", "LOSSES", "Loss", "loss_named"]


@dataclass(frozen=True)
class Loss:
    """One value a target: ``per_token(logprobs, *inputs, **config)``, all flat.

    ``inputs`` are the ``loss_fn_inputs`` that it reads beside ``target_tokens``, of their shapes.
    ``config`` has every key of ``loss_fn_config`` with its value.
    """

    name: str
    inputs: tuple[str, ...]
    per_token: Callable[..., Tensor]
    config: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, logprobs: Tensor, examples: Examples, part: slice = slice(None)) -> Tensor:
        """The values of the flat targets in ``part``.

        :raises RequestError: an input is missing.
        """
        columns = [examples.column(name, self.name).flat[part] for name in self.inputs]
        return self.per_token(logprobs, *columns, **self.config)


def _cross_entropy(logprobs: Tensor, weights: Tensor) -> Tensor:
    return -logprobs * weights


def _importance_sampling(logprobs: Tensor, sampler: Tensor, advantages: Tensor) -> Tensor:
    return -(logprobs - sampler).exp() * advantages


def _ppo(
    logprobs: Tensor,
    sampler: Tensor,
    advantages: Tensor,
    *,
    clip_low_threshold: float,
    clip_high_threshold: float,
) -> Tensor:
    ratio = (logprobs - sampler).exp()
    clipped = ratio.clamp(clip_low_threshold, clip_high_threshold)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def _cispo(
    logprobs: Tensor,
    sampler: Tensor,
    advantages: Tensor,
    *,
    clip_low_threshold: float,
    clip_high_threshold: float,
) -> Tensor:
    ratio = (logprobs.detach() - sampler).exp()
    return -ratio.clamp(clip_low_threshold, clip_high_threshold) * logprobs * advantages


def _dro(logprobs: Tensor, sampler: Tensor, advantages: Tensor, *, beta: float) -> Tensor:
    return beta / 2 * (logprobs - sampler).square() - logprobs * advantages


CROSS_ENTROPY = Loss("cross_entropy", ("weights",), _cross_entropy)

_POLICY = ("logprobs", "advantages")

LOSSES = {
    loss.name: loss
    for loss in (
        CROSS_ENTROPY,
        Loss("importance_sampling", _POLICY, _importance_sampling),
        Loss("ppo", _POLICY, _ppo, {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
        Loss("cispo", _POLICY, _cispo, {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}),
        Loss("dro", _POLICY, _dro, {"beta": 0.05}),
    )
}


def loss_named(name: object, config: Mapping[str, object] | None = None) -> Loss:
    """The loss ``name`` with the values of ``config`` in place of its defaults.

    :raises RequestError: no such loss, a key that it does not have, or a value that is no finite
        number.
    """
    loss = LOSSES.get(name) if isinstance(name, str) else None
    if loss is None:
        raise RequestError(
            f"the sandbox computes the losses {', '.join(LOSSES)}, not {name!r}; write any other "
            "as a custom loss of the logprobs",
            path="loss_fn",
        )
    values = dict(loss.config)
    for key, value in (config or {}).items():
        path = f"loss_fn_config.{key}"
        if key not in values:
            known = ", ".join(values) or "none"
            raise RequestError(
                f"{loss.name} has no {key!r} in its loss_fn_config; its keys are: {known}",
                path=path,
            )
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):  # type: ignore[arg-type]
            raise RequestError(f"expected a finite number, got {value!r}", path=path)
        values[key] = float(value)  # type: ignore[arg-type]
    low, high = values.get("clip_low_threshold"), values.get("clip_high_threshold")
    if low is not None and high is not None and not low <= high:
        raise RequestError(
            f"clip_low_threshold {low} is above clip_high_threshold {high}", path="loss_fn_config"
        )
    return Loss(loss.name, loss.inputs, loss.per_token, values)
