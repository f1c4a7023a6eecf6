"""Divergence from reference logprobs, with estimators whose gradients are what they claim."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..tensors.batch import TensorBatch
from .columns import optional_column, required_column
from .reduction import by_rank, reduce
from .term import term

__all__ = ["kl"]


@term
def kl(
    data: Sequence[Any],
    logprobs: TensorBatch,
    *,
    reference: str = "reference_logprobs",
    estimator: str = "k2",
    weights: str | None = "weights",
    reduction: str = "sum",
) -> tuple[Tensor, dict[str, float]]:
    """``KL(model ‖ reference)``, the reverse KL, against logprobs that ride in the datum.

    For [T] logprobs of tokens sampled from the model, with ``d = logprob - reference``:

    - ``"k2"`` (default): ``½·d²``. On-policy, its gradient ``d·∇logprob`` is an unbiased estimate
      of the reverse KL's gradient. Its value is biased, but low in variance.
    - ``"k3"``: the value ``exp(-d) - 1 + d``, unbiased and never negative, with the gradient of
      k2 (straight through). The gradient of k3 itself would be the *forward* KL's.
    - ``"k1"``: the value ``d``, unbiased, may be negative; also with the gradient of k2, since
      on-policy the gradient of d itself has mean zero and trains nothing.

    The estimators are J. Schulman's, "Approximating KL Divergence" (2020).

    For [T,K] logprobs of K alternatives the sum over the support is exact, value and gradient:
    ``Σ_k p_k·(logprob_k - reference_k)`` with ``p = exp(logprob)``; ``estimator`` plays no part.

    Args:
        reference: key of ``loss_fn_inputs`` with the reference logprobs, of the logprobs' shape.
        estimator: see above.
        weights: key of ``loss_fn_inputs`` with per-token weights; if no datum has it, or it is
            None, every weight is 1.
        reduction: ``"sum"`` (default), ``"mean"`` or ``"sequence_mean"``.

    Unit: nats. A token of weight 0 gets a gradient of exactly 0, whatever its logprobs are.
    """
    if estimator not in _VALUES:
        raise ValueError(
            f"unknown estimator {estimator!r}; expected one of {', '.join(sorted(_VALUES))}"
        )
    mask = optional_column(weights, data, logprobs)
    log_p, log_q = logprobs.flat, required_column(reference, data, logprobs)
    if mask is not None:
        log_p = torch.where(mask != 0, log_p, 0.0)
        log_q = torch.where(mask != 0, log_q, 0.0)
    values = by_rank(logprobs, [log_p, log_q], functools.partial(_sampled, estimator), _exact)
    return reduce(values, mask, logprobs, reduction)


_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: torch.exp(-d) - 1 + d,
}


def _sampled(estimator: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    d = log_p - log_q
    k2 = d.square() / 2
    if estimator == "k2":
        return k2
    return _VALUES[estimator](d.detach()) + (k2 - k2.detach())


def _exact(log_p: Tensor, log_q: Tensor) -> Tensor:
    possible = log_p != -torch.inf  # p = 0 adds 0, and its gradient must not be 0·inf
    safe_p = torch.where(possible, log_p, 0.0)
    safe_q = torch.where(possible, log_q, 0.0)
    return safe_p.exp() * (safe_p - safe_q)
