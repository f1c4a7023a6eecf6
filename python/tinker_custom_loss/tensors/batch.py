"""All tensors of one kind of a batch, one per datum, in one piece of memory.

A thousand logprob tensors cost about four times one tensor of their total size to differentiate,
so everything inside this package works on :class:`TensorBatch`, and only a user's function gets
the plain list of views that it expects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import RequestError
from ..wording import counted

__all__ = ["Shape", "TensorBatch", "check_out", "checked_batch"]

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False, repr=False)
class TensorBatch:
    """``flat`` [N] holds the tensors of ``shapes`` one after another, row-major.

    ``N`` is the sum of the products of the shapes. Shapes may differ in rank.
    """

    flat: Tensor
    shapes: tuple[Shape, ...]
    shared: dict[Any, Any] | None = None
    """What several readers of one batch need not each work out: theirs, for as long as a step."""

    def __post_init__(self) -> None:
        if self.flat.ndim != 1 or self.flat.numel() != sum(self.sizes):
            raise RequestError(
                f"the shapes of {len(self.shapes)} tensors hold {sum(self.sizes)} values, "
                f"but the buffer has shape {list(self.flat.shape)}"
            )

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor]) -> TensorBatch:
        """Copy ``tensors`` (any shapes, one dtype and device) into one buffer."""
        shapes = tuple(tuple(t.shape) for t in tensors)
        if not tensors:
            return cls(torch.empty(0, device="cpu"), shapes)
        return cls(torch.cat([t if t.ndim == 1 else t.reshape(-1) for t in tensors]), shapes)

    @classmethod
    def known(cls, flat: Tensor, shapes: tuple[Shape, ...], sizes: tuple[int, ...]) -> TensorBatch:
        """Of shapes with these ``sizes``, which are known to fit the buffer."""
        batch = object.__new__(cls)
        batch.__dict__.update(flat=flat, shapes=shapes, sizes=sizes, shared=None)
        return batch

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of values of each tensor."""
        return tuple(map(math.prod, self.shapes))

    def __len__(self) -> int:
        return len(self.shapes)

    def tensors(self) -> list[Tensor]:
        """One view a datum, of its own shape; no copy, differentiable through ``flat``."""
        return [
            part if len(shape) == 1 else part.view(shape)
            for part, shape in zip(
                torch.split(self.flat, list(self.sizes)), self.shapes, strict=True
            )
        ]

    def with_flat(self, flat: Tensor) -> TensorBatch:
        """The same shapes, and what is shared, over another buffer of the same size."""
        if flat.shape != self.flat.shape:
            raise ValueError(f"expected a buffer of shape {list(self.flat.shape)}")
        batch = object.__new__(TensorBatch)  # its shapes and sizes are known to fit
        batch.__dict__.update(flat=flat, shapes=self.shapes, sizes=self.sizes, shared=self.shared)
        return batch

    def detached(self) -> TensorBatch:
        """The same, and of no graph."""
        return self.with_flat(self.flat.detach()) if self.flat.requires_grad else self

    def sharing(self) -> TensorBatch:
        """The same, for readers who share what they work out, until the data may change."""
        batch = self.with_flat(self.flat)
        batch.__dict__["shared"] = {}
        return batch

    def alone(self) -> TensorBatch:
        """The same, with nothing that is shared."""
        batch = self.with_flat(self.flat)
        batch.__dict__["shared"] = None
        return batch

    def locate(self, position: int) -> tuple[int, tuple[int, ...]]:
        """``(datum, token)`` of the value at ``flat[position]``; token indexes its shape."""
        for datum, size in enumerate(self.sizes):
            if position < size:
                index = np.unravel_index(position, self.shapes[datum])
                return datum, tuple(int(i) for i in index)
            position -= size
        raise IndexError(position)

    def __repr__(self) -> str:
        shapes = ", ".join(str(list(shape)) for shape in self.shapes[:3])
        more = f", … {len(self)} in all" if len(self) > 3 else ""
        dtype = str(self.flat.dtype).removeprefix("torch.")
        return f"TensorBatch({dtype}, [{shapes}{more}])"


def checked_batch(data: Sequence[object], logprobs: Sequence[Tensor] | TensorBatch) -> TensorBatch:
    """Logprobs as one float32 or float64 buffer, after checking that they fit the data.

    Raises:
        RequestError: the counts differ, the batch is empty, or something is no float tensor.
    """
    for path, value in (("data", data), ("logprobs", logprobs)):
        if not hasattr(value, "__len__"):
            raise RequestError(
                f"{path} is a {type(value).__name__}; expected a list with one entry a datum",
                path=path,
            )
    if len(data) != len(logprobs):
        raise RequestError(
            f"got {counted(len(data), 'datum')} but "
            f"{counted(len(logprobs), 'logprob tensor')}; expected one tensor a datum",
            path="logprobs",
        )
    if not len(logprobs):
        raise RequestError("the batch is empty: there are no datums", path="data")
    if isinstance(logprobs, TensorBatch):
        flat = logprobs.flat
        _check_float(flat, 0)
        if flat.dtype not in (torch.float32, torch.float64):
            return logprobs.with_flat(flat.float())
        return logprobs.with_flat(flat.clone()) if flat.is_inference() else logprobs
    for index, tensor in enumerate(logprobs):
        if not isinstance(tensor, Tensor):
            raise RequestError(
                f"logprobs[{index}] is a {type(tensor).__name__}; expected a torch.Tensor",
                path=f"logprobs[{index}]",
            )
        _check_float(tensor, index)
        if tensor.ndim not in (1, 2):
            raise RequestError(
                f"logprobs[{index}] has shape {list(tensor.shape)}; expected [T] or [T,K]",
                path=f"logprobs[{index}]",
            )
    return _common_buffer(logprobs)


def check_out(out: Tensor, batch: TensorBatch, given: Sequence[Tensor] | TensorBatch) -> None:
    """Whether ``out`` can hold a gradient like the logprobs that were ``given``.

    Raises:
        RequestError: it cannot.
    """
    homes = [given.flat] if isinstance(given, TensorBatch) else given
    kinds = {(home.dtype, home.device) for home in homes}
    wanted = f"a contiguous tensor of {batch.flat.numel()} values, outside of any graph"
    if len(kinds) > 1 or kinds != {(out.dtype, out.device)}:
        have = ", ".join(f"{dtype} on {device}" for dtype, device in kinds)
        problem = f"is of {out.dtype} on {out.device}, but the logprobs are of {have}"
    elif out.shape != batch.flat.shape or not out.is_contiguous() or out.requires_grad:
        problem = f"has shape {list(out.shape)}, strides {list(out.stride())}" + (
            " and requires a gradient" if out.requires_grad else ""
        )
    elif any(_overlap(out, home) for home in homes):
        problem = "is in memory of the logprobs"
    else:
        return
    raise RequestError(f"out {problem}; expected {wanted}, of the logprobs' type", path="out")


def _overlap(a: Tensor, b: Tensor) -> bool:
    (first, end), (other, other_end) = map(_addresses, (a, b))
    return first < other_end and other < end


def _addresses(tensor: Tensor) -> tuple[int, int]:
    """Where its first value begins, and its last one ends."""
    start, size = tensor.data_ptr(), tensor.element_size()
    if not tensor.numel():
        return start, start
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return start, start + size * (1 + sum((n - 1) * stride for n, stride in strides))


def _check_float(tensor: Tensor, index: int) -> None:
    if not tensor.is_floating_point():
        raise RequestError(
            f"logprobs[{index}] has dtype {str(tensor.dtype).removeprefix('torch.')}; expected a "
            "floating point type",
            path=f"logprobs[{index}]",
        )


def _common_buffer(logprobs: Sequence[Tensor]) -> TensorBatch:
    """Copy logprobs ([T] or [T,K] each) into one buffer.

    The buffer is float64 if any tensor is, else float32 (half precision is widened); it lies on
    the device of the first tensor.
    """
    kinds = {(t.dtype, t.device) for t in logprobs}
    dtype = torch.float64 if any(kind == torch.float64 for kind, _ in kinds) else torch.float32
    device = logprobs[0].device
    with torch.no_grad():
        if kinds != {(dtype, device)}:
            logprobs = [t.to(device, dtype) for t in logprobs]
        return TensorBatch.from_tensors(logprobs)
