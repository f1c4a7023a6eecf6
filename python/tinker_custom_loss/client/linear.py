"""The linearization: from the logprobs of a forward pass to datums that carry its gradient.

Tinker's server knows the loss ``Σ -logprob·weight`` (``cross_entropy``), whose gradient with
respect to the parameters θ is ``-Σ weight·∂logprob/∂θ``. With ``weight = -∂L/∂logprob``, taken on
the client, that is ``Σ ∂L/∂logprob·∂logprob/∂θ = ∂L/∂θ``: the gradient of any loss ``L`` of the
logprobs, although the server never sees it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tinker import Datum, ForwardBackwardOutput, TensorData

from ..composer import Composer
from ..composition import Composition
from ..errors import RequestError
from ..record import StepRecord
from ..tensors.batch import Shape, TensorBatch
from ..wording import counted
from . import sdk
from .arguments import BaseLoss, Regularizers, checked_data, checked_step, composer_of

_ARRAYS_OF_A_STEP = 8  # as large as the batch, with those of a user's function and of autograd
_MOST_KEPT = (32 << 20) - (1 << 16)  # glibc pays no heed to blocks of 32 MiB and more
_kept = 0

__all__ = ["forward_data", "linear_data", "linearize", "linearize_with", "zero_gradient"]


def linearize(
    data: Iterable[Datum],
    forward_output: ForwardBackwardOutput,
    base_loss_fn: BaseLoss | None = None,
    regularizers: Regularizers | None = None,
    *,
    step: int | None = None,
    totals: Mapping[str, Any] | None = None,
) -> tuple[list[Datum], StepRecord]:
    """Turn the result of a forward pass into the datums of the backward pass.

    For those who call ``forward`` and ``forward_backward`` themselves::

        output = client.forward(data, "cross_entropy").result()
        linear, record = linearize(data, output, base_loss, regularizers, step=step)
        client.forward_backward(linear, "cross_entropy").result()

    It reads the numpy buffers inside ``TensorData`` and writes one of its own, of which the new
    weights are views. Nothing that it is given is modified.

    Args:
        data: the datums of the forward pass, each with ``target_tokens``.
        forward_output: its result, with ``logprobs`` of each datum, of the shape of its
            ``target_tokens``: [T] or [T,K].
        base_loss_fn: as in :class:`Composer`; also a ``tinker.LossHandle``, or a Composer (then
            without ``regularizers``).
        regularizers: as in :class:`Composer`.
        step: the training step; needed if a weight is a function of it.
        totals: of the whole step, where these datums are a part of it: :meth:`Composer.totals`.

    Returns:
        ``(linear_data, record)``: datums with the ``target_tokens`` and the provenance of the
        given ones and ``weights = -∂loss_total/∂logprobs``; and the nested record of the step.

    Raises:
        RequestError: an option is wrong, or data and output do not fit together.
        TermError: a term failed, see :meth:`Composer.compute`.
    """
    datums = checked_data(data)
    composer = composer_of(base_loss_fn, regularizers, datums)
    composer.check_step(checked_step(step))
    linear, composition = linearize_with(composer, datums, forward_output, step, totals)
    return linear, composition.record


def linearize_with(
    composer: Composer,
    data: Sequence[Datum],
    forward_output: ForwardBackwardOutput,
    step: int | None,
    totals: Mapping[str, Any] | None = None,
    cancelled: threading.Event | None = None,
) -> tuple[list[Datum], Composition]:
    """:func:`linearize` with a composer that exists already."""
    logprobs = _logprobs(data, forward_output)
    _keep_freed(_ARRAYS_OF_A_STEP * logprobs.flat.nbytes)
    composition = composer.compute(data, logprobs, step=step, totals=totals, cancelled=cancelled)
    return linear_data(data, composition.gradient), composition


def linear_data(data: Sequence[Datum], gradient: TensorBatch) -> list[Datum]:
    """The datums that make the server's backward pass follow ``gradient``."""
    flat, start = torch.neg(gradient.flat).numpy(), 0
    linear = []
    for datum, shape, size in zip(data, gradient.shapes, gradient.sizes, strict=True):
        linear.append(_sent(datum, _tensor_data(flat[start : start + size], shape)))
        start += size
    return linear


def forward_data(data: Sequence[Datum]) -> list[Datum]:
    """What of ``data`` the server needs for a forward pass: the terms' own arrays stay here."""
    sent = []
    for datum in data:
        weights = datum.loss_fn_inputs.get("weights")
        sent.append(_sent(datum, _zeros(datum) if weights is None else weights))
    return sent


def zero_gradient(data: Sequence[Datum]) -> list[Datum]:
    """The datums of a backward pass that contributes nothing."""
    return [_sent(datum, _zeros(datum)) for datum in data]


def _keep_freed(size: int) -> None:
    """Have glibc keep this much freed memory, in bytes, for the next step.

    It returns to the kernel what is free beyond twice the largest block that was ever freed, and
    pages that are fetched anew cost a step more than its arithmetic. So one such block is freed,
    of which no page was touched. To another allocator this says nothing.
    """
    global _kept
    size = min(size, _MOST_KEPT)
    if size > _kept:
        _kept = size
        np.empty(size, np.uint8)


def _logprobs(data: Sequence[Datum], output: ForwardBackwardOutput) -> TensorBatch:
    """The logprobs of a forward pass, copied once, into one float32 buffer."""
    if len(output.loss_fn_outputs) != len(data):
        raise RequestError(
            f"got {counted(len(data), 'datum')} but the forward pass has outputs for "
            f"{len(output.loss_fn_outputs)}; expected one a datum",
            path="forward_output.loss_fn_outputs",
        )
    arrays: list[np.ndarray[Any, Any]] = []
    for index, (datum, record) in enumerate(zip(data, output.loss_fn_outputs, strict=True)):
        if "logprobs" not in record:
            raise RequestError(
                f'the output of datum {index} has no "logprobs"; it has: '
                f"{', '.join(sorted(record)) or 'nothing'}",
                path=f"forward_output.loss_fn_outputs[{index}]",
            )
        array = record["logprobs"].to_numpy()
        shape = _shape(datum.loss_fn_inputs["target_tokens"])
        if shape != array.shape:
            raise RequestError(
                f"the logprobs of datum {index} have shape {list(array.shape)}, its target_tokens "
                f"shape {list(shape)}; is this the output of these datums?",
                path=f"forward_output.loss_fn_outputs[{index}].logprobs",
            )
        arrays.append(array)
    flat = np.concatenate([x if x.ndim == 1 else x.reshape(-1) for x in arrays], dtype=np.float32)
    return TensorBatch(torch.from_numpy(flat), tuple(array.shape for array in arrays))


def _sent(datum: Datum, weights: TensorData) -> Datum:
    """The datum as the server gets it."""
    inputs = {"target_tokens": datum.loss_fn_inputs["target_tokens"], "weights": weights}
    return sdk.with_inputs(datum, inputs)


def _tensor_data(weights: np.ndarray[Any, Any], shape: Shape) -> TensorData:
    """Wrapped without a copy; [T,K] that is mostly zeros as CSR, as the SDK itself sends it."""
    if len(shape) == 2:
        return TensorData.from_torch_sparse(torch.from_numpy(weights).view(shape))
    return TensorData(data=weights, dtype="float32", shape=list(shape))


def _zeros(datum: Datum) -> TensorData:
    shape = _shape(datum.loss_fn_inputs["target_tokens"])
    return _tensor_data(np.zeros(math.prod(shape), np.float32), shape)


def _shape(tensor: TensorData) -> Shape:
    return tuple(tensor.to_numpy().shape if tensor.shape is None else tensor.shape)
