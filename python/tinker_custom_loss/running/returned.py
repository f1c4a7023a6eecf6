"""What a term may return: a pair of a scalar loss and a dict of numbers."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..errors import TermError
from ..record import is_record_key
from ..regularizer import BASE_LOSS, show

__all__ = ["checked"]


def checked(name: str, returned: object) -> tuple[Tensor, dict[str, float | None]]:
    """The loss and the metrics of what the term ``name`` returned.

    A plain number is a loss without a graph, so it adds its value and no gradient.

    Raises:
        TermError: it is no such pair, with what it is and what is expected.
    """
    if not isinstance(returned, (tuple, list)) or len(returned) != 2:
        raise TermError(
            f'the term "{name}" returned {_describe(returned)}; a term returns a pair '
            "(loss, metrics): a scalar torch.Tensor and a dict of numbers",
            term=name,
        )
    loss, metrics = returned
    if isinstance(loss, numbers.Real) and not isinstance(loss, bool):
        loss = torch.tensor(float(loss), dtype=torch.float64, device="cpu")
    if not isinstance(loss, Tensor):
        raise TermError(
            f'the term "{name}" returned {_describe(loss)} as its loss; expected a scalar '
            "torch.Tensor computed from the logprobs, or a number",
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
    dotted: dict[str, str] = {}
    for key in metrics:
        _check_key(name, key, dotted)
    return loss, {key: _number(name, key, value) for key, value in metrics.items()}


def _check_key(name: str, key: object, dotted: dict[str, str]) -> None:
    """``dotted`` are the keys before it, by what they are for a logger."""
    if not isinstance(key, str):
        raise TermError(
            f'the term "{name}" returned a metric whose name is {_describe(key)}; expected a '
            "string",
            term=name,
        )
    other = dotted.setdefault(key.replace(":", "."), key)
    if other != key:
        raise TermError(
            f'the term "{name}" returned the metrics "{other}" and "{key}", which are the same '
            'one for a logger, where "." stands for ":"; rename one of them',
            term=name,
        )
    if name == BASE_LOSS and is_record_key(key):
        raise TermError(
            f'the base loss returned a metric "{key}", which would hide that key of the record '
            "among the metrics of the step; rename it",
            term=name,
        )


def _number(name: str, key: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, (Tensor, np.ndarray)) and math.prod(value.shape) == 1:
        value = value.item()
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
