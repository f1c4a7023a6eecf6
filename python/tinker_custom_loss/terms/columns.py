"""Arrays of ``loss_fn_inputs``, laid out like the logprobs: one flat tensor, entry for entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..tensors.batch import TensorBatch

__all__ = ["optional_column", "required_column"]


def required_column(key: str, data: Sequence[Any], logprobs: TensorBatch) -> Tensor:
    """``loss_fn_inputs[key]`` of every datum as one tensor [N], aligned with ``logprobs.flat``.

    Raises:
        ValueError: a datum lacks the key, or has it in a shape other than its logprobs'. A [T]
            array serves [T,K] logprobs: it is repeated for the K alternatives.
    """
    column = _batch_column(key, data)
    if column is None:
        column = _column_from_datums(key, data)
    aligned = column.shapes == logprobs.shapes
    flat = column.flat if aligned else _broadcast(key, column, logprobs)
    return flat.to(logprobs.flat.device, logprobs.flat.dtype)


def optional_column(key: str | None, data: Sequence[Any], logprobs: TensorBatch) -> Tensor | None:
    """The same, or None if ``key`` is None.

    No datum at all need have ``"weights"``, which every term looks for unasked; any other key was
    named on purpose, and a misspelt one must not mean that everything counts.
    """
    if key is None:
        return None
    if key == "weights" and not _present(key, data):
        return None
    return required_column(key, data, logprobs)


def _present(key: str, data: Sequence[Any]) -> bool:
    return _batch_column(key, data) is not None or any(key in d.loss_fn_inputs for d in data)


def _batch_column(key: str, data: Sequence[Any]) -> TensorBatch | None:
    """Data that came over the port has its columns at hand and need not build a datum for them."""
    column = getattr(data, "column", None)
    return None if column is None else column(key)


def _column_from_datums(key: str, data: Sequence[Any]) -> TensorBatch:
    tensors = []
    for index, datum in enumerate(data):
        value = datum.loss_fn_inputs.get(key)
        if value is None:
            has = ", ".join(sorted(datum.loss_fn_inputs)) or "nothing"
            raise ValueError(f'datum {index} has no "{key}" in its loss_fn_inputs; it has: {has}')
        tensors.append(value.to_torch())
    return TensorBatch.from_tensors(tensors)


def _broadcast(key: str, column: TensorBatch, logprobs: TensorBatch) -> Tensor:
    parts = []
    shapes = zip(column.tensors(), column.shapes, logprobs.shapes, strict=True)
    for index, (part, have, want) in enumerate(shapes):
        if have == want:
            parts.append(part.reshape(-1))
        elif len(want) == 2 and have == want[:1]:
            parts.append(part.repeat_interleave(want[1]))
        else:
            raise ValueError(
                f'"{key}" of datum {index} has shape {list(have)}, but its logprobs have '
                f"{list(want)}"
            )
    return torch.cat(parts)
