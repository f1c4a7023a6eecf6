"""A batch in blocks that fit the processor's cache: some of its positions, one beside the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Block", "Flags", "NotInBlocksError", "blocks"]

Flags = np.ndarray[Any, np.dtype[np.bool_]]

_POSITIONS = 1 << 16
_LONG_RUN = 1 << 11
"""So many positions in a row are sooner cut out as a slice than each by its index."""
_WIDEST = 8


class NotInBlocksError(Exception):
    """A term's function raised: it is to be evaluated on the whole batch, which says what."""


def blocks(positions: int, width: int, kept: Flags | None) -> Iterator[Block]:
    """A batch of so many positions, of ``width`` values each, in blocks of about the same size.

    None of the positions but those that are ``kept`` counts; None: all do.
    """
    share = 1.0 if kept is None else max(np.count_nonzero(kept) / positions, 1 / _WIDEST)
    count = max(1, round(positions * width * share / _POSITIONS))
    size = -(-positions // count)
    size += -size % 16  # so that each begins where memory would
    for start in range(0, positions, size):
        stop = min(start + size, positions)
        yield Block(positions, start, stop, None if kept is None else kept[start:stop])


class Block:
    """The positions from ``start`` to ``stop`` of a batch, of which some are kept."""

    def __init__(self, positions: int, start: int, stop: int, kept: Flags | None) -> None:
        self._positions, self._start, self._stop = positions, start, stop
        self._cut: dict[int, Tensor] = {}
        self._runs = [(start, stop)]
        self._indices: Any = None
        self.count = stop - start
        if kept is None:
            return
        self.count = int(np.count_nonzero(kept))
        changes = np.flatnonzero(kept[1:] != kept[:-1])
        if self.count < _LONG_RUN * (len(changes) // 2 + 1) and not self.is_whole:
            self._indices = np.flatnonzero(kept) + start
            return
        edges = [start] if kept[0] else []
        edges += (changes + (start + 1)).tolist()
        edges += [stop] if kept[-1] else []
        self._runs = [*zip(edges[::2], edges[1::2], strict=True)]

    @property
    def is_whole(self) -> bool:
        """Whether all of its positions are kept."""
        return self.count == self._stop - self._start

    def all_of(self, tensor: Tensor) -> Tensor:
        """A view of what a tensor [N] has for its positions, kept or not."""
        per = tensor.numel() // self._positions
        if self._stop - self._start == self._positions:
            return tensor
        return tensor[self._start * per : self._stop * per]

    def of(self, tensor: Tensor) -> Tensor:
        """What a tensor [N] has for the positions that are kept, in one piece; only to be read.

        The tensor has one value, or one for each alternative, for every position of the batch.
        """
        found = self._cut.get(id(tensor))  # which lives as long as the step
        if found is None:
            found = self._cut[id(tensor)] = self._of(tensor)
        return found

    def _of(self, tensor: Tensor) -> Tensor:
        per = tensor.numel() // self._positions
        if self._indices is not None:
            rows = tensor.numpy().reshape(-1, per)
            return torch.from_numpy(rows.take(self._indices, axis=0).reshape(-1))
        if len(self._runs) == 1:
            ((start, stop),) = self._runs
            whole = stop - start == self._positions
            return tensor if whole else tensor[start * per : stop * per]
        array = tensor.numpy()
        runs = [array[start * per : stop * per] for start, stop in self._runs]
        return torch.from_numpy(np.concatenate(runs))

    def spread(self, values: Tensor, out: Tensor) -> None:
        """Write ``values``, one or as many for each position that is kept, to where these are in
        ``out``, which is :meth:`all_of` some tensor; and 0 to where the others are."""
        per = out.numel() // (self._stop - self._start)
        into, array = out.zero_().numpy(), values.numpy()
        if self._indices is not None:
            into.reshape(-1, per)[self._indices - self._start] = array.reshape(-1, per)
            return
        at = 0
        for start, stop in self._runs:
            size = (stop - start) * per
            into[(start - self._start) * per :][:size] = array[at : at + size]
            at += size
