"""The linearization: from the logprobs of a forward pass to datums that carry its gradient.

Tinker's server knows the loss ``Σ -logprob·weight`` (``cross_entropy``), whose gradient with
respect to the parameters θ is ``-Σ weight·∂logprob/∂θ``. With ``weight = -∂L/∂logprob``, taken on
the client, that is ``Σ ∂L/∂logprob·∂logprob/∂θ = ∂L/∂θ``: the gradient of any loss ``L`` of the
logprobs, although the server never sees it.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tinker
import torch
from tinker import Datum, ForwardBackwardOutput, TensorData
from torch import Tensor

from ..composer import Composer
from ..composition import Composition
from ..errors import RequestError
from ..record import StepRecord
from ..regularizer import BASE_LOSS, LossFn, Regularizer, check_step
from ..tensors.batch import Shape, TensorBatch

__all__ = [
    "Regularizers",
    "composer_of",
    "forward_data",
    "linear_data",
    "linearize",
    "linearize_with",
    "sdk_loss",
    "zero_gradient",
]

Regularizers = Sequence[Regularizer | Mapping[str, Any]]


def linearize(
    data: Sequence[Datum],
    forward_output: ForwardBackwardOutput,
    base_loss_fn: LossFn | None = None,
    regularizers: Regularizers | None = None,
    *,
    step: int = 0,
) -> tuple[list[Datum], StepRecord]:
    """Turn the result of a forward pass into the datums of the backward pass.

    For those who call ``forward`` and ``forward_backward`` themselves::

        output = client.forward(data, "cross_entropy").result()
        linear, telemetry = linearize(data, output, base_loss, regularizers, step=step)
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
        step: the training step, for weight schedules.

    Returns:
        ``(linear_data, telemetry)``: datums with the ``target_tokens`` and the provenance of the
        given ones and ``weights = -∂loss_total/∂logprobs``; and the nested record of the step.

    Raises:
        RequestError: an option is wrong, or data and output do not fit together.
        TermError: a term failed, see :meth:`Composer.compute`.
    """
    composer = composer_of(base_loss_fn, regularizers, step)
    datums, composition = linearize_with(composer, data, forward_output, step)
    return datums, composition.telemetry


def linearize_with(
    composer: Composer,
    data: Sequence[Datum],
    forward_output: ForwardBackwardOutput,
    step: int,
    cancelled: threading.Event | None = None,
) -> tuple[list[Datum], Composition]:
    """:func:`linearize` with a composer that exists already."""
    logprobs = _logprobs(data, forward_output)
    composition = composer.compute(data, logprobs, step=step, cancelled=cancelled)
    return linear_data(data, composition.gradient), composition


def linear_data(data: Sequence[Datum], gradient: TensorBatch) -> list[Datum]:
    """The datums that make the server's backward pass follow ``gradient``."""
    weights = gradient.with_flat(torch.neg(gradient.flat)).tensors()
    return [_sent(datum, _tensor_data(weight)) for datum, weight in zip(data, weights, strict=True)]


def forward_data(data: Sequence[Datum]) -> list[Datum]:
    """What of ``data`` the server needs for a forward pass: the terms' own arrays stay here.

    Raises:
        RequestError: there are no datums, or one of them has no ``target_tokens``.
    """
    if not len(data):
        raise RequestError("the batch is empty: there are no datums", path="data")
    sent = []
    for index, datum in enumerate(data):
        if "target_tokens" not in datum.loss_fn_inputs:
            has = ", ".join(sorted(datum.loss_fn_inputs)) or "nothing"
            raise RequestError(
                f'datum {index} has no "target_tokens" in its loss_fn_inputs, so it has no '
                f"logprobs; it has: {has}",
                path=f"data[{index}].loss_fn_inputs",
            )
        weights = datum.loss_fn_inputs.get("weights")
        sent.append(_sent(datum, _zeros(datum) if weights is None else weights))
    return sent


def zero_gradient(data: Sequence[Datum]) -> list[Datum]:
    """The datums of a backward pass that contributes nothing."""
    return [_sent(datum, _zeros(datum)) for datum in data]


def sdk_loss(base_loss_fn: Any) -> Any:
    """What to hand to the SDK as it is: it would find out in mid-step, and end the client.

    Raises:
        RequestError: it is no loss.
    """
    if base_loss_fn is None:
        raise RequestError(
            "there is nothing to compute: give a base_loss_fn, or at least one regularizer",
            path=BASE_LOSS,
        )
    if not callable(base_loss_fn) and not _is_handle(base_loss_fn):
        raise RequestError(
            "base_loss_fn must be a function of (data, logprobs), got "
            f"{type(base_loss_fn).__name__}; regularizers come after it",
            path=BASE_LOSS,
        )
    return base_loss_fn


def composer_of(base_loss_fn: Any, regularizers: Regularizers | None, step: int) -> Composer:
    """The composer for one step's arguments.

    Raises:
        RequestError: an argument is wrong.
    """
    check_step(step)
    if isinstance(base_loss_fn, Composer):
        if regularizers is not None:
            raise RequestError(
                "base_loss_fn is a Composer, which has its own regularizers; give the others to it",
                path="regularizers",
            )
        return base_loss_fn
    if _is_handle(base_loss_fn):
        base_loss_fn = _client_side(base_loss_fn)
    return Composer(base_loss_fn, regularizers)


def _logprobs(data: Sequence[Datum], output: ForwardBackwardOutput) -> TensorBatch:
    """The logprobs of a forward pass, copied once, into one float32 buffer."""
    if len(output.loss_fn_outputs) != len(data):
        raise RequestError(
            f"there are {len(data)} datums but the forward pass has outputs for "
            f"{len(output.loss_fn_outputs)}; expected one a datum",
            path="forward_output.loss_fn_outputs",
        )
    if not len(data):
        raise RequestError("the batch is empty: there are no datums", path="data")
    arrays: list[np.ndarray[Any, Any]] = []
    for index, (datum, record) in enumerate(zip(data, output.loss_fn_outputs, strict=True)):
        where = f"forward_output.loss_fn_outputs[{index}]"
        if "logprobs" not in record:
            raise RequestError(
                f'the output of datum {index} has no "logprobs"; it has: '
                f"{', '.join(sorted(record)) or 'nothing'}",
                path=where,
            )
        array = record["logprobs"].to_numpy()
        targets = datum.loss_fn_inputs.get("target_tokens")
        if targets is None or _shape(targets) != array.shape:
            have = "none" if targets is None else f"shape {list(_shape(targets))}"
            raise RequestError(
                f"the logprobs of datum {index} have shape {list(array.shape)}, its target_tokens "
                f"{have}; is this the output of these datums?",
                path=f"{where}.logprobs",
            )
        arrays.append(array)
    flat = np.concatenate([array.reshape(-1) for array in arrays], dtype=np.float32)
    return TensorBatch(torch.from_numpy(flat), tuple(array.shape for array in arrays))


def _sent(datum: Datum, weights: TensorData) -> Datum:
    """The datum as the server gets it, with all else that this SDK's datums have (provenance)."""
    inputs = {"target_tokens": datum.loss_fn_inputs["target_tokens"], "weights": weights}
    return dataclasses.replace(datum, loss_fn_inputs=inputs)


def _tensor_data(weight: Tensor) -> TensorData:
    """Wrapped without a copy; [T,K] that is mostly zeros as CSR, as the SDK itself sends it."""
    if weight.ndim == 2:
        return TensorData.from_torch_sparse(weight)
    return TensorData(data=weight.numpy(), dtype="float32", shape=list(weight.shape))


def _zeros(datum: Datum) -> TensorData:
    return _tensor_data(torch.zeros(_shape(datum.loss_fn_inputs["target_tokens"])))


def _shape(tensor: TensorData) -> Shape:
    return tuple(tensor.to_numpy().shape if tensor.shape is None else tensor.shape)


def _is_handle(loss: object) -> bool:
    handle = getattr(tinker, "LossHandle", None)  # since tinker 0.38
    return handle is not None and isinstance(loss, handle)


def _client_side(handle: Any) -> Callable[[Sequence[Datum], Sequence[Tensor]], Any]:
    """A ``tinker.LossHandle`` as a loss of the whole batch, run here.

    The losses of the datums are summed; a metric named ``…:mean`` is a mean over datums, any
    other a sum, as the handle's documentation says.
    """

    def loss_handle(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> Any:
        losses = []
        metrics: dict[str, list[float]] = {}
        for index, (datum, values) in enumerate(zip(data, logprobs, strict=True)):
            for key in handle.input_names:
                if key not in datum.loss_fn_inputs:
                    raise KeyError(
                        f"datum {index} has no loss_fn_inputs[{key!r}], which the loss "
                        f"{handle.name!r} takes"
                    )
            inputs = [datum.loss_fn_inputs[key].to_torch() for key in handle.input_names]
            loss, its_metrics = handle.graph(values, *inputs)
            losses.append(loss)
            for key, value in its_metrics.items():
                metrics.setdefault(key, []).append(float(value.detach()))
        reduced = {
            key: math.fsum(values) / (len(data) if key.endswith(":mean") else 1)
            for key, values in metrics.items()
        }
        return torch.stack(losses).sum(), reduced

    return loss_handle
