"""Arrays of ``loss_fn_inputs``, laid out like the logprobs: one flat tensor, entry for entry."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..fast_paths import fast
from ..tensors.batch import Shape, TensorBatch
from ..tensors.flags import are_not, count

__all__ = ["is_present", "read", "read_chosen", "read_groups", "read_weights"]

_LOG = logging.getLogger(__name__)
_SAMPLED = {"logprobs", "advantages"}
_DTYPES = {np.dtype(np.float32), np.dtype(np.int64)}


def read(key: str, data: Sequence[Any], logprobs: TensorBatch, *, repeat: bool = True) -> Tensor:
    """``loss_fn_inputs[key]`` of every datum as one tensor [N], aligned with ``logprobs.flat``.

    A TensorData, numpy array or torch tensor of the logprobs' shape. A [T] array serves [T,K]
    logprobs, repeated for the K alternatives, unless ``repeat`` is False; a single number serves
    the whole datum.

    Raises:
        ValueError: a datum lacks the key, or has it in another shape.
    """
    column, shapes = _column(key, data), logprobs.shapes
    flat = column.flat if column.shapes == shapes else _repeated(key, column, shapes, repeat)
    return flat.to(logprobs.flat.device, logprobs.flat.dtype)


def is_present(key: str, data: Sequence[Any]) -> bool:
    """Whether every datum has the key."""
    if hasattr(data, "column"):
        return data.column(key) is not None
    return all(key in _inputs(datum) for datum in data)


def read_weights(
    weights: str | None, data: Sequence[Any], shapes: tuple[Shape, ...], like: Tensor
) -> Tensor | None:
    """The weight of every entry of ``shapes`` as one tensor [N]; None if all are 1.

    ``"auto"``: a datum's ``weights``, else its ``mask``. Else of a datum with ``logprobs`` and
    ``advantages``, from which a loop has taken the mask since the server refuses it, the tokens
    where one of both is not 0: those that were sampled. One of probability 1 and no advantage looks
    as if it were not; where that may be, the log says so once. Else 1, which it says once, too.
    None: 1. Any other key was named on purpose, and every datum must have it.
    """
    if weights is None:
        return None
    column = _auto_weights(data, shapes) if weights == "auto" else _column(weights, data)
    if column is None:
        return None
    flat = column.flat
    if column.shapes != shapes:
        flat = _weights_of("weights" if weights == "auto" else weights, column, shapes)
    flat = flat.to(like.device, like.dtype)
    return flat if count(are_not(flat, 1.0)) else None


def read_groups(key: str, data: Sequence[Any]) -> Tensor:
    """The integer group of every datum, [B]: a scalar, or an array of one entry."""
    ids = _numbers(key, data)
    _check_all(key, ids, ids == ids.floor(), "an integer")
    return ids.to(torch.int64)


def read_chosen(key: str, data: Sequence[Any]) -> Tensor:
    """Whether each datum is chosen, [B], from a 1 or a 0."""
    flags = _numbers(key, data)
    _check_all(key, flags, (flags == 0) | (flags == 1), "0 or 1")
    return flags == 1


def _check_all(key: str, numbers: Tensor, good: Tensor, expected: str) -> None:
    if not bool(good.all()):
        index = int((~good).nonzero()[0, 0])
        raise ValueError(f'"{key}" of datum {index} is {numbers[index]:g}; expected {expected}')


def _numbers(key: str, data: Sequence[Any]) -> Tensor:
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
    values = _values(key, data)
    if values is None:
        for index, inputs in enumerate(map(_inputs, data)):
            if key not in inputs:
                has = ", ".join(sorted(inputs)) or "nothing"
                raise ValueError(
                    f'datum {index} has no "{key}" in its loss_fn_inputs; it has: {has}'
                )
    return _read(key, values or [])


def _values(key: str, data: Sequence[Any]) -> list[Any] | None:
    """What every datum has under a key; None if one has not."""
    try:
        return [datum.loss_fn_inputs[key] for datum in data]
    except (AttributeError, KeyError):
        return None


def _read(key: str, values: Sequence[Any]) -> TensorBatch:
    """What the datums have under a key, in one piece."""
    if fast() and all(hasattr(value, "to_numpy") for value in values):  # TensorData
        arrays = [value.to_numpy() for value in values]
        if {array.dtype for array in arrays} <= _DTYPES:
            shapes = tuple(array.shape for array in arrays)
            flat = np.concatenate([x if x.ndim == 1 else x.reshape(-1) for x in arrays])
            return TensorBatch(torch.from_numpy(flat), shapes)
    return _joined([_tensor(key, index, value) for index, value in enumerate(values)])


def _auto_weights(data: Sequence[Any], shapes: tuple[Shape, ...]) -> TensorBatch | None:
    names: Any = getattr(data, "input_names", None)  # of data that came over the port
    for key in ("weights", "mask"):
        column = _batch_column(key, data)
        if column is not None:
            return column
        if names is None or key in names:  # then each is weighted on its own
            break
    else:  # and none need be built
        if not names >= _SAMPLED:
            if names:
                _warn_of_ones()
            return None
        columns = [_batch_column(key, data) for key in ("logprobs", "advantages")]
        if all(columns):
            parts = zip(*(column.tensors() for column in columns if column), strict=True)
            return _joined([_sampled(index, *pair) for index, pair in enumerate(parts)])
    values = _values("weights", data)
    if values is not None:
        return _read("weights", values)
    tensors, without, unsaid = [], 0, False
    for index, (datum, shape) in enumerate(zip(data, shapes, strict=True)):
        inputs = _inputs(datum)
        found = next((key for key in ("weights", "mask") if key in inputs), None)
        if found is not None:
            tensors.append(_tensor(found, index, inputs[found]))
        elif inputs.keys() >= _SAMPLED:
            pair = (_tensor(key, index, inputs[key]) for key in ("logprobs", "advantages"))
            tensors.append(_sampled(index, *pair))
        else:
            without += 1
            unsaid |= len(inputs) > 0  # a datum without inputs is none: nobody gave data
            tensors.append(torch.ones(shape, device="cpu"))
    if unsaid:
        _warn_of_ones()
    return None if without == len(tensors) else _joined(tensors)


def _sampled(index: int, logprobs: Tensor, advantages: Tensor) -> Tensor:
    """1 for the tokens of a policy's datum that were sampled: a prompt has zeros."""
    sampled = logprobs != 0
    if advantages.shape == logprobs.shape:
        sampled |= advantages != 0
    elif (
        advantages.numel() != 1
    ):  # one number is that of the whole datum, and tells no tokens apart
        raise ValueError(
            f'"advantages" of datum {index} has shape {list(advantages.shape)}, but its "logprobs" '
            f"have {list(logprobs.shape)}"
        )
    flat = sampled.reshape(-1)
    if not bool(flat[int(flat.int().argmax()) if flat.numel() else 0 :].all()):  # not one prompt
        _warn_of_zeros()
    return sampled.to(torch.float32)


@functools.cache  # once for a run
def _warn_of_zeros() -> None:
    _LOG.warning(
        'a datum has neither "weights" nor "mask" in its loss_fn_inputs, and tokens behind its '
        'prompt, or all, whose "logprobs" and "advantages" are both 0: they are taken not to have '
        "been sampled, and do not count; where they may have been, with probability 1, give the "
        "datum one of the two"
    )


@functools.cache  # once for a run
def _warn_of_ones() -> None:
    _LOG.warning(
        'a datum has neither "weights" nor "mask" in its loss_fn_inputs: every one of its tokens '
        "counts with weight 1, those of its prompt too; give it one of them, or say weights=None"
    )


def _tensor(key: str, index: int, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    to_torch = getattr(value, "to_torch", None)
    if to_torch is not None:
        return to_torch()  # type: ignore[no-any-return]  # a view of the TensorData's own memory
    try:
        return torch.from_numpy(np.array(value))
    except (TypeError, ValueError) as error:  # text, None, rows of different lengths
        raise ValueError(
            f'"{key}" of datum {index} is no array of numbers, but {value!r:.60}'
        ) from error


def _joined(tensors: Sequence[Tensor]) -> TensorBatch:
    if len({tensor.dtype for tensor in tensors}) > 1:
        tensors = [tensor.to(torch.float64) for tensor in tensors]
    return TensorBatch.from_tensors(tensors)


def _repeated(key: str, column: TensorBatch, shapes: tuple[Shape, ...], repeat: bool) -> Tensor:
    parts = []
    for index, (part, want) in enumerate(zip(column.tensors(), shapes, strict=True)):
        have = tuple(part.shape)
        alike = repeat or len(want) == 1 or want[1] == 1
        if have == want or (len(have) == 2 and have == (*want, 1)):
            parts.append(part.reshape(-1))
        elif have == () or (have == (1,) and alike):
            parts.append(part.reshape(1).expand(math.prod(want)))
        elif have == want[:1] and alike:
            parts.append(part.repeat_interleave(want[1]))
        else:
            raise ValueError(
                f'"{key}" of datum {index} has shape {list(have)}, but its logprobs have '
                f"{list(want)}"
            )
    return torch.cat(parts)


def _weights_of(key: str, column: TensorBatch, shapes: tuple[Shape, ...]) -> Tensor:
    """Weights, of which the alternatives of a position may have one each if they are the same."""
    parts = []
    for index, (part, want) in enumerate(zip(column.tensors(), shapes, strict=True)):
        if part.ndim == 2 and tuple(part.shape[:1]) == want:
            if bool((part != part[:, :1]).any()):
                raise ValueError(
                    f'"{key}" of datum {index} differs between the alternatives of a position, but '
                    "this term has one value a position: give it weights of shape [T], under a key "
                    "that the parameter weights names, or say weights=None"
                )
            part = part[:, 0]
        parts.append(part)
    return _repeated(key, _joined(parts), shapes, repeat=True)
