"""The shapes of a batch in one piece: a thousand short arrays take longer to read than to use.

They are 32-bit little-endian numbers: of each datum how many sizes it has, and the sizes.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Iterable, Sequence

import numpy as np

from ..errors import ProtocolError, RequestError
from ..tensors.batch import Shape

__all__ = ["Shapes", "pack_shapes", "read_shapes"]

_NONE = 0xFFFFFFFF  # in place of how many: this datum has no such tensor
_MAX_RANK = 8


class Shapes(tuple[Shape | None, ...]):
    """The shape a datum, None where it has no such tensor, with what else is known of them.

    Attributes:
        sizes: the number of values of each tensor.
        wire: the same as they are written.
        whole: whether every datum has a tensor.
    """

    sizes: tuple[int, ...]
    wire: bytes
    whole: bool

    @classmethod
    def of(cls, shapes: Iterable[Shape | None], sizes: Iterable[int], wire: bytes) -> Shapes:
        """What was read from ``wire``."""
        self = cls(shapes)
        self.sizes, self.wire, self.whole = tuple(sizes), wire, None not in self
        return self

    @classmethod
    def known(cls, shapes: Sequence[Shape | None]) -> Shapes:
        """Of shapes that are not written yet."""
        return _read(pack_shapes(shapes))


def pack_shapes(shapes: Sequence[Shape | None]) -> bytes:
    """Shapes as they are written."""
    if isinstance(shapes, Shapes):
        return shapes.wire
    numbers: list[int] = []
    for shape in shapes:
        numbers += (_NONE,) if shape is None else (len(shape), *shape)
    return struct.pack(f"<{len(numbers)}I", *numbers)


def read_shapes(wire: bytes, path: str) -> Shapes:
    """The shapes at a ``path`` of a message. Batches of one request mostly have the same ones.

    Raises:
        ProtocolError: they end where there should be more.
        RequestError: a tensor has too many sizes.
    """
    try:
        return _read(wire)
    except EOFError as error:
        raise ProtocolError(f"the shapes at `{path}` {error}", path=path) from None
    except OverflowError as error:
        raise RequestError(f"{error} at `{path}`", path=path) from None


@functools.lru_cache(maxsize=8)
def _read(wire: bytes) -> Shapes:
    if len(wire) % 4:
        raise EOFError(f"are {len(wire)} bytes; expected 4 a number")
    numbers = np.frombuffer(wire, "<u4")
    if len(numbers) % 2 == 0 and bool((numbers[::2] == 1).all()):  # all are [T]
        lengths = numbers[1::2].tolist()
        return Shapes.of(zip(lengths, strict=True), lengths, wire)
    shapes: list[Shape | None] = []
    rest = iter(numbers.tolist())
    for rank in rest:
        if rank == _NONE:
            shapes.append(None)
            continue
        if rank > _MAX_RANK:
            raise OverflowError(f"expected at most {_MAX_RANK} sizes a tensor")
        shape = tuple(size for _, size in zip(range(rank), rest, strict=False))
        if len(shape) < rank:
            raise EOFError(f"end within those of datum {len(shapes)}")
        shapes.append(shape)
    return Shapes.of(shapes, (0 if s is None else math.prod(s) for s in shapes), wire)
