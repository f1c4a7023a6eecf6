"""Arrays of ``loss_fn_inputs``, laid out like the logprobs: one flat tensor, entry for entry."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..tensors.batch import Shape, TensorBatch

__all__ = ["read", "read_if_present", "read_numbers", "read_weights"]

_LOG = logging.getLogger(__name__)


def read(key: str, data: Sequence[Any], logprobs: TensorBatch) -> Tensor:
    """``loss_fn_inputs[key]`` of every datum as one tensor [N], aligned with ``logprobs.flat``.

    A TensorData, numpy array or torch tensor of the logprobs' shape. A [T] array serves [T,K]
    logprobs: it is repeated for the K alternatives; a single number serves the whole datum.

    Raises:
        ValueError: a datum lacks the key, or has it in another shape.
    """
    return _aligned(key, _column(key, data), logprobs.shapes, logprobs.flat)


def read_if_present(key: str, data: Sequence[Any], logprobs: TensorBatch) -> Tensor | None:
    """The same, or None if not every datum has the key."""
    if _batch_column(key, data) is None and not all(key in _inputs(datum) for datum in data):
        return None
    return read(key, data, logprobs)


def read_weights(
    weights: str | None, data: Sequence[Any], shapes: tuple[Shape, ...], like: Tensor
) -> Tensor | None:
    """The weight of every entry of ``shapes`` as one tensor [N]; None if all are 1.

    ``"auto"``: a datum's ``weights``, else its ``mask``, else 1, which is said once in the log.
    None: 1. Any other key was named on purpose, and every datum must have it.
    """
    if weights is None:
        return None
    column = _auto_weights(data, shapes) if weights == "auto" else _column(weights, data)
    if column is None:
        return None
    flat = _aligned("weights" if weights == "auto" else weights, column, shapes, like)
    return None if bool((flat == 1).all()) else flat


def read_numbers(key: str, data: Sequence[Any]) -> Tensor:
    """One number a datum, [B]: ``loss_fn_inputs[key]`` is a scalar, or an array of one entry."""
    column = _column(key, data)
    for index, size in enumerate(column.sizes):
        if size != 1:
            raise ValueError(
                f'"{key}" of datum {index} has shape {list(column.shapes[index])}; expected one '
                "number a datum"
            )
    return column.flat


def _inputs(datum: Any) -> Any:
    return getattr(datum, "loss_fn_inputs", {})


def _batch_column(key: str, data: Sequence[Any]) -> TensorBatch | None:
    """Data that came over the port has its columns at hand and need not build a datum for them."""
    column = getattr(data, "column", None)
    return None if column is None else column(key)


def _column(key: str, data: Sequence[Any]) -> TensorBatch:
    column = _batch_column(key, data)
    if column is not None:
        return column
    tensors = []
    for index, datum in enumerate(data):
        inputs = _inputs(datum)
        if key not in inputs:
            has = ", ".join(sorted(inputs)) or "nothing"
            raise ValueError(f'datum {index} has no "{key}" in its loss_fn_inputs; it has: {has}')
        tensors.append(_tensor(inputs[key]))
    return _joined(tensors)


def _auto_weights(data: Sequence[Any], shapes: tuple[Shape, ...]) -> TensorBatch | None:
    for key in ("weights", "mask"):
        column = _batch_column(key, data)
        if column is not None:
            return column
    tensors, without = [], 0
    for datum, shape in zip(data, shapes, strict=True):
        inputs = _inputs(datum)
        found = next((inputs[key] for key in ("weights", "mask") if key in inputs), None)
        without += found is None
        tensors.append(torch.ones(shape, device="cpu") if found is None else _tensor(found))
    if without:
        _warn_of_ones()
    return None if without == len(tensors) else _joined(tensors)


@functools.cache  # once for a run
def _warn_of_ones() -> None:
    _LOG.warning(
        'a datum has neither "weights" nor "mask" in its loss_fn_inputs: every one of its tokens '
        "counts with weight 1, those of its prompt too; give it one of them, or say weights=None"
    )


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    to_torch = getattr(value, "to_torch", None)
    if to_torch is not None:
        return to_torch()  # type: ignore[no-any-return]  # a view of the TensorData's own memory
    return torch.from_numpy(np.array(value))


def _joined(tensors: Sequence[Tensor]) -> TensorBatch:
    if len({tensor.dtype for tensor in tensors}) > 1:
        tensors = [tensor.to(torch.float64) for tensor in tensors]
    return TensorBatch.from_tensors(tensors)


def _aligned(key: str, column: TensorBatch, shapes: tuple[Shape, ...], like: Tensor) -> Tensor:
    flat = column.flat if column.shapes == shapes else _reshaped(key, column, shapes)
    return flat.to(like.device, like.dtype)


def _reshaped(key: str, column: TensorBatch, shapes: tuple[Shape, ...]) -> Tensor:
    parts = []
    pairs = zip(column.tensors(), column.shapes, shapes, strict=True)
    for index, (part, have, want) in enumerate(pairs):
        if have == want:
            parts.append(part.reshape(-1))
        elif have in ((), (1,)):
            parts.append(part.reshape(1).expand(int(np.prod(want))))
        elif len(want) == 2 and have == want[:1]:
            parts.append(part.repeat_interleave(want[1]))
        elif len(have) == 2 and have[:1] == want:
            parts.append(_one_a_position(key, index, part))
        else:
            raise ValueError(
                f'"{key}" of datum {index} has shape {list(have)}, but its logprobs have '
                f"{list(want)}"
            )
    return torch.cat(parts)


def _one_a_position(key: str, index: int, part: Tensor) -> Tensor:
    if bool((part != part[:, :1]).any()):
        raise ValueError(
            f'"{key}" of datum {index} differs between the alternatives of a position, but this '
            "term has one value a position: give it weights of shape [T], under a key that the "
            "parameter weights names, or say weights=None"
        )
    return part[:, 0]
