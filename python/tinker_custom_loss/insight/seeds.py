"""The states of the random generators that a term may draw from: torch's, numpy's, Python's."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Seeds"]


@dataclass(frozen=True, eq=False)
class Seeds:
    """Where this process's global generators stood, that of torch on the CPU."""

    torch: Tensor
    numpy: tuple[Any, ...]
    python: tuple[Any, ...]

    @classmethod
    def here(cls) -> Seeds:
        """Where they stand now."""
        numpy: Any = np.random.get_state()
        return cls(torch.get_rng_state(), numpy, random.getstate())

    def pack(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Their large parts as tensors, the rest as JSON values."""
        version, words, gauss = self.python
        tensors["seeds/torch"] = self.torch
        tensors["seeds/numpy"] = torch.from_numpy(self.numpy[1].astype(np.int64))
        tensors["seeds/python"] = torch.tensor(words, dtype=torch.int64)
        name, _, *rest = self.numpy
        return {"numpy": [name, *rest], "python": [version, gauss]}

    @classmethod
    def unpack(cls, packed: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Seeds:
        """What :meth:`pack` packed."""
        name, *rest = packed["numpy"]
        version, gauss = packed["python"]
        return cls(
            tensors["seeds/torch"],
            (name, tensors["seeds/numpy"].numpy().astype(np.uint32), *rest),
            (version, tuple(tensors["seeds/python"].tolist()), gauss),
        )

    @contextmanager
    def planted(self) -> Iterator[None]:
        """The generators stand there in this block, and where they were after it."""
        before = Seeds.here()
        self._plant()
        try:
            yield
        finally:
            before._plant()

    def _plant(self) -> None:
        torch.set_rng_state(self.torch)
        np.random.set_state(self.numpy)
        random.setstate(self.python)
