"""Divergence from reference logprobs, with estimators whose gradients are what they claim."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .pieces import is_sampled, p_times, straight_through
from .term import term

__all__ = ["kl"]

Estimator = Literal["k1", "k2", "k3", "k3_weighted", "exact"]


@term(scope="token", inputs=("reference_logprobs",), optional=("logprobs",), alternatives=True)
def kl(
    logprob: Tensor,
    reference: Tensor,
    sampler: Tensor | None,
    *,
    estimator: Estimator = "k2",
) -> tuple[Tensor, dict[str, Tensor]]:
    """``KL(model ‖ reference)``, the reverse KL, against logprobs that ride in the datum.

    For sampled tokens ([T], and [T,1]), with ``d = ℓ-r``:

    - ``"k2"`` (default): ``½d²``. On-policy, its gradient ``d·∇ℓ`` is an unbiased estimate of the
      reverse KL's gradient. Its value is biased, but low in variance.
    - ``"k3"``: the value ``exp(-d) - 1 + d``, unbiased and never negative, with the gradient of
      k2 (straight through). The gradient of k3 itself would be the *forward* KL's.
    - ``"k1"``: the value ``d``, unbiased, may be negative; also with the gradient of k2, since
      on-policy the gradient of d itself has mean zero and trains nothing.
    - ``"k3_weighted"``: ``ρ·(exp(-d) - 1 + d)`` with ``ρ = exp(ℓ-μ)`` differentiated too: value
      and gradient, ``ρ·d·∇ℓ``, are unbiased off-policy as well. Needs the sampler's logprobs.

    The first three are biased off-policy, by the ratio ρ that is missing.

    For [T,K], K at least 2, the sum over the alternatives is exact whatever the estimator, value
    and gradient: ``Σ_k p·(ℓ-r)`` with ``p = exp(ℓ)``, one value a position. ``"exact"`` insists
    on it and refuses sampled tokens.

    Args:
        reference: key of r, the reference logprobs.
        sampler: key of μ, the sampler's logprobs; only k3_weighted looks at them.
        estimator: see above.

    Unit: nats. The metric ``kl`` is the value. At ℓ = -inf an alternative adds 0, and a sampled
    token has an infinite value (with k3_weighted ``exp(r-μ)``, and the gradient 0).
    J. Schulman, "Approximating KL Divergence" (2020).
    """
    if not is_sampled(logprob):
        values = p_times(logprob, logprob - reference).sum(-1)
        return values, {"kl": values}
    d = (logprob - reference).reshape(-1)
    if estimator == "k2":
        values = _k2(d)
    elif estimator == "k1":
        values = straight_through(d, lambda: _k2(d))
    elif estimator == "k3":
        values = straight_through(_k3(d), lambda: _k2(d))
    else:
        mu = _sampler(sampler, estimator).reshape(-1)
        x = logprob.reshape(-1) - mu
        near = d > -20  # beyond, exp(-d) overflows before the product with ρ brings it back
        values = torch.where(
            near,
            p_times(x, _k3(torch.where(near, d, 0.0))),
            torch.exp(reference.reshape(-1) - mu) + p_times(x, d - 1),
        )
    return values, {"kl": values}


@kl.derivative
def _(
    logprob: Tensor,
    reference: Tensor,
    sampler: Tensor | None,
    *,
    estimator: Estimator = "k2",
) -> Tensor:
    if not is_sampled(logprob):
        return p_times(logprob, logprob - reference + 1)
    d = logprob - reference
    if estimator in ("k1", "k2", "k3"):
        return d
    return p_times(logprob - _sampler(sampler, estimator), d)


def _k2(d: Tensor) -> Tensor:
    return d.square().mul_(0.5)  # in place: fresh memory costs more than the product


def _k3(d: Tensor) -> Tensor:
    return torch.where(d == -torch.inf, torch.inf, torch.expm1(-d) + d)


def _sampler(sampler: Tensor | None, estimator: str) -> Tensor:
    if estimator == "exact":
        raise ValueError(
            'estimator "exact" sums over the alternatives of [T,K] logprobs, but here are tokens '
            "sampled one at a position; use k1, k2, k3 or k3_weighted for them"
        )
    if sampler is None:
        raise ValueError(
            'estimator "k3_weighted" needs the sampler\'s logprobs, which not every datum has '
            'under "logprobs"; name their key by the parameter sampler, or use k2'
        )
    return sampler
