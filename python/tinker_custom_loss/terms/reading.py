"""What the terms of a step read of its datums: each array once, whichever term comes first."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..tensors.batch import TensorBatch
from .columns import read, read_weights
from .lazy import lazy
from .reduction import Sequences
from .selection import Selection

__all__ = ["MASKED", "Reading", "reading"]

MASKED = -20.0
"""What a function sees where a token has weight 0: a number that every formula can take, and of
which any number of alternatives have a mass below 1."""


def reading(
    data: Sequence[Any], logprobs: TensorBatch, weights: str | None, *, positions: bool
) -> Reading:
    """The arrays of these datums, laid out like these logprobs.

    The same object for all terms that ask alike, where the batch is one that is shared.
    """
    shared = {} if logprobs.shared is None else logprobs.shared
    flat = logprobs.flat
    alike = (id(data), weights, positions, flat.dtype, flat.device)
    found: Reading | None = shared.get(alike)
    if found is None:
        if positions and set(map(len, logprobs.shapes)) == {1}:  # then it is the same
            found = reading(data, logprobs, weights, positions=False)
        else:
            found = Reading(data, logprobs, weights, positions)
        found = shared.setdefault(alike, found)  # which keeps data, and so its id
    return found


class Reading:
    """The weights of a batch, and its arrays; a function sees :data:`MASKED` in what is masked.

    ``positions``: there is one weight a position, not one for each of its alternatives.
    """

    def __init__(
        self, data: Sequence[Any], logprobs: TensorBatch, weights: str | None, positions: bool
    ) -> None:
        self._data, self._weights, self._positions = data, weights, positions
        self._logprobs = logprobs.detached().alone()  # what is shared holds this
        self._lock = threading.RLock()
        self._sequences: Sequences | None = None
        self._raw: dict[str, Tensor] = {}
        self._columns: dict[str, Tensor] = {}

    @property
    def sequences(self) -> Sequences:
        """The datums' sizes and weights."""
        if self._sequences is None:
            with self._lock, torch.inference_mode(False), torch.no_grad():
                if self._sequences is None:
                    self._sequences = self._read_sequences()
        return self._sequences

    def _read_sequences(self) -> Sequences:
        logprobs, shapes = self._logprobs, self._logprobs.shapes
        if self._positions:
            shapes = tuple(shape[:1] for shape in shapes)
        sizes = tuple(shape[0] for shape in shapes) if self._positions else logprobs.sizes
        mask = read_weights(self._weights, self._data, shapes, logprobs.flat)
        return Sequences(sizes, mask, logprobs.flat)

    def raw(self, key: str) -> Tensor:
        """The array of every datum under a key, [N], aligned with the logprobs."""
        raw = self._raw.get(key)
        if raw is None:
            with self._lock, torch.inference_mode(False), torch.no_grad():
                raw = self._raw.get(key)
                if raw is None:
                    # a sampled token's logprob says nothing of alternatives
                    raw = read(key, self._data, self._logprobs, repeat=not self._positions)
                    self._raw[key] = raw
        return raw

    def column(self, key: str) -> Tensor:
        """The same as a function is to see it."""
        column = self._columns.get(key)
        if column is None:
            with torch.inference_mode(False), torch.no_grad():
                column = self._columns[key] = self._masked(self.raw(key))
        return column

    def logprobs(self, flat: Tensor, *, graph: bool) -> Tensor:
        """The logprobs [N] as a function is to see them."""
        if self.kept is None:
            return flat
        if graph:
            return self.kept.of(flat, MASKED)
        return self._seen if flat is self._logprobs.flat else self._masked(flat)

    @lazy
    def _seen(self) -> Tensor:
        return self._masked(self._logprobs.flat)

    def _masked(self, plain: Tensor) -> Tensor:
        return plain if self.kept is None else self.kept.of_plain(plain, MASKED)

    @lazy
    def kept(self) -> Selection | None:
        """The entries with a weight; None if all have."""
        if not self._positions:
            return self.sequences.selection
        flags = self.entries(self.sequences.kept)
        return None if flags is None else Selection(flags)

    def entries(self, per_value: Tensor | None) -> Tensor | None:
        """What is known of every position, for each of its alternatives."""
        if per_value is None or not self._positions:
            return per_value
        return torch.repeat_interleave(per_value, _alternatives(self._logprobs))

    @lazy
    def kinds(self) -> list[int]:
        """Of every datum K where its logprobs are [T,K], 0 where they are [T]."""
        return [shape[1] if len(shape) == 2 else 0 for shape in self._logprobs.shapes]

    @lazy
    def kind(self) -> int | None:
        """That of all; None if there are several."""
        if set(map(len, self._logprobs.shapes)) == {1}:
            return 0
        return self.kinds[0] if len(set(self.kinds)) == 1 else None


def _alternatives(logprobs: TensorBatch) -> int | Tensor:
    """The number of alternatives of every position: K, or a tensor [N] where they differ."""
    counts = [shape[1] if len(shape) == 2 else 1 for shape in logprobs.shapes]
    if len(set(counts)) == 1:
        return counts[0]
    each = torch.tensor(counts, device=logprobs.flat.device)
    return each.repeat_interleave(each.new_tensor([shape[0] for shape in logprobs.shapes]))
