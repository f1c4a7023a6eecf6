"""Learning a teacher's distribution over the top alternatives, without forgetting the rest."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor

from .pieces import p_times, straight_through
from .ranges import Range
from .term import term

__all__ = ["distill"]

Direction = Literal["forward", "reverse", "jsd"]
Support = Literal["tail", "renormalize"]


@term(scope="token", inputs=("teacher_logprobs",), alternatives=True)
def distill(
    logprob: Tensor,
    teacher: Tensor,
    *,
    direction: Direction = "forward",
    support: Support = "tail",
    beta: Annotated[float, Range(above=0, below=1)] = 0.5,
) -> Tensor:
    """Divergence of teacher q and model p over the K alternatives of [T,K], one value a position.

    - ``"forward"`` (default): ``KL(q ‖ p) = Σ q·log(q/p)``.
    - ``"reverse"``: ``KL(p ‖ q) = Σ p·log(p/q)``.
    - ``"jsd"``: ``β·KL(q ‖ m) + (1-β)·KL(p ‖ m)`` with ``m = βq + (1-β)p`` (GKD, Agarwal et al.
      2024).

    The K alternatives are not everything. With ``support="tail"`` (default) the rest of the mass of
    each, ``1 - Σ``, is one alternative more, so that the model cannot win by moving mass out of
    sight; the value is at most that of the whole vocabulary. With ``"renormalize"`` both are scaled
    to 1 over the K, and the rest does not count. The truncated sum is never clamped; a rest that
    the type cannot tell from none counts as its resolution (1e-7 in single precision), without a
    gradient.

    For [T], tokens sampled from the model, there is the reverse KL only, estimated: the value is
    ``d = ℓ-q``, unbiased, and the gradient ``d·∇ℓ``, an unbiased one of the reverse KL on-policy.

    Args:
        teacher: key of log q, the teacher's logprobs of the same alternatives.

    Unit: nats. An alternative at -inf in p or q adds what the limit says: 0, or +inf where the
    other side has mass in a KL.
    """
    if logprob.ndim == 1:
        _check_sampled(direction)
        d = logprob - teacher
        return straight_through(d, lambda: d.square() / 2)
    _check_teacher(teacher, support)
    log_p, log_q = _extended(logprob, support), _extended(teacher, support)
    if direction == "forward":
        return p_times(log_q, log_q - log_p).sum(-1)
    if direction == "reverse":
        return p_times(log_p, log_p - log_q).sum(-1)
    log_m = _mixture(log_p, log_q, beta)
    values = beta * p_times(log_q, log_q - log_m) + (1 - beta) * p_times(log_p, log_p - log_m)
    return values.sum(-1)


@distill.derivative
def _(
    logprob: Tensor,
    teacher: Tensor,
    *,
    direction: Direction = "forward",
    support: Support = "tail",
    beta: Annotated[float, Range(above=0, below=1)] = 0.5,
) -> Tensor:
    if logprob.ndim == 1:
        _check_sampled(direction)
        return logprob - teacher
    log_p, log_q = _extended(logprob, support), _extended(teacher, support)
    # p·∂value/∂p of every alternative, the rest among them; then by the chain rule to ℓ.
    if direction == "forward":
        pull = -log_q.exp()
    elif direction == "reverse":
        pull = p_times(log_p, log_p - log_q + 1)
    else:
        pull = (1 - beta) * p_times(log_p, log_p - _mixture(log_p, log_q, beta))
    if support == "renormalize":
        return pull - log_p.exp() * pull.sum(-1, keepdim=True)
    slope = pull[:, -1:] / log_p[:, -1:].exp()
    return pull[:, :-1] - logprob.exp() * torch.where(_has_rest(logprob), slope, 0.0)


def _extended(logprob: Tensor, support: Support) -> Tensor:
    """Logprobs that sum to 1: [N,K+1] with the rest as one more alternative, or [N,K]."""
    if support == "renormalize":
        return logprob - torch.logsumexp(logprob, -1, keepdim=True)
    total = logprob.exp().sum(-1, keepdim=True)
    some, least = _has_rest(logprob), math.log(torch.finfo(logprob.dtype).eps)
    rest = torch.where(some, torch.log1p(-torch.where(some, total, 0.0)), least)
    return torch.cat([logprob, rest], -1)


def _has_rest(logprob: Tensor) -> Tensor:
    """Whether the alternatives leave more mass than the type can tell from none."""
    return 1 - logprob.exp().sum(-1, keepdim=True) > torch.finfo(logprob.dtype).eps


def _mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """``log(βq + (1-β)p)``."""
    a, b = log_q + math.log(beta), log_p + math.log1p(-beta)
    top = torch.maximum(a, b).detach()
    top = torch.where(top == -torch.inf, 0.0, top)
    total = (a - top).exp() + (b - top).exp()
    some = total > 0  # a half, at least, of all that is possible
    return torch.where(some, top + torch.where(some, total, 1.0).log(), -torch.inf)


def _check_teacher(teacher: Tensor, support: Support) -> None:
    if support == "renormalize":
        return
    largest = float(teacher.exp().sum(-1).max()) if teacher.numel() else 0.0
    if largest > 1.02:  # rounded to bfloat16 they may exceed 1 by a little
        raise ValueError(
            f"the teacher's probabilities of a position add up to {largest:.4g}, more than 1: give "
            "its logprobs, not its logits, and each alternative once; or say "
            'support="renormalize"'
        )


def _check_sampled(direction: Direction) -> None:
    if direction != "reverse":
        raise ValueError(
            f'the direction "{direction}" needs the alternatives of [T,K] logprobs, but a datum '
            'has logprobs of shape [T]: of sampled tokens only "reverse" can be estimated'
        )
