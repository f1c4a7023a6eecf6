"""Comparisons of tensors that belong to no graph: by numpy, over the same memory, where it can be,
since torch takes ten times as long."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..fast_paths import fast

__all__ = ["are_not", "count", "known_finite", "same_bits"]


def are_not(tensor: Tensor, value: float) -> Tensor:
    """Which entries are not equal to ``value``, as nan is not."""
    array = _array(tensor)
    return tensor != value if array is None else torch.from_numpy(np.not_equal(array, value))


def count(flags: Tensor) -> int:
    """How many are True."""
    array = _array(flags)
    return int(flags.sum()) if array is None else int(np.count_nonzero(array))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one float type hold the same: nan is nan, and -0 is not 0."""
    integers = torch.int64 if a.dtype == torch.float64 else torch.int32
    a, b = a.detach().view(integers), b.detach().view(integers)
    array, other = _array(a), _array(b)
    if array is None or other is None:
        return torch.equal(a, b)
    return a.data_ptr() == b.data_ptr() or np.array_equal(array, other)


def known_finite(tensor: Tensor) -> bool:
    """Whether every entry is finite; False also where it would take torch to say so."""
    array = _array(tensor)
    return array is not None and bool(np.isfinite(array).all())


def _array(tensor: Tensor) -> np.ndarray[Any, Any] | None:
    """The tensor's memory; None where there is none for numpy: on a GPU, of a type that it does
    not know, in a graph or in ``torch.func``."""
    if tensor.device.type != "cpu" or not fast():
        return None
    try:
        array: np.ndarray[Any, Any] = tensor.numpy()
    except (RuntimeError, TypeError):
        return None
    return array
