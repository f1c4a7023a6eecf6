"""What a term may return: a pair of a scalar loss and a dict of numbers."""

from __future__ import annotations

import numbers
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from ..errors import TermError
from ..regularizer import show

__all__ = ["checked"]


def checked(name: str, returned: object) -> tuple[Tensor, dict[str, float]]:
    if not isinstance(returned, (tuple, list)) or len(returned) != 2:
        raise TermError(
            f'the term "{name}" returned {_describe(returned)}; a term returns a pair '
            "(loss, metrics): a scalar torch.Tensor and a dict of numbers",
            term=name,
        )
    loss, metrics = returned
    if not isinstance(loss, Tensor):
        raise TermError(
            f'the term "{name}" returned {_describe(loss)} as its loss; expected a scalar '
            "torch.Tensor computed from the logprobs",
            term=name,
        )
    if loss.numel() != 1:
        raise TermError(
            f'the term "{name}" returned a loss of shape {list(loss.shape)}; expected a scalar: '
            "reduce it, for example with .sum() or .mean()",
            term=name,
        )
    if loss.is_complex():
        raise TermError(f'the term "{name}" returned a complex loss; take .real', term=name)
    if metrics is None:
        metrics = {}
    if not isinstance(metrics, Mapping):
        raise TermError(
            f'the term "{name}" returned {_describe(metrics)} as its metrics; expected a dict '
            "of numbers",
            term=name,
        )
    return loss, {_key(name, key): _number(name, key, value) for key, value in metrics.items()}


def _key(name: str, key: object) -> str:
    if isinstance(key, str):
        return key
    raise TermError(
        f'the term "{name}" returned a metric whose name is {_describe(key)}; expected a string',
        term=name,
    )


def _number(name: str, key: object, value: object) -> float:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value.detach())
    if isinstance(value, (numbers.Real, np.bool_)):
        return float(value)
    raise TermError(
        f'the metric "{key}" of the term "{name}" is {_describe(value)}; expected a number',
        term=name,
    )


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return show(value)
