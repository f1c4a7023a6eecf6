"""Datums that came over the wire: columns of tensors that become ``tinker.Datum`` when touched."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor

from ..tensors.batch import Shape, TensorBatch
from ..wording import counted
from .shapes import Shapes

if TYPE_CHECKING:
    import tinker

__all__ = ["Column", "WireData", "whole_batch"]


def whole_batch(flat: Tensor, shapes: Shapes) -> TensorBatch:
    """Tensors of which every datum has one."""
    return TensorBatch.known(flat, cast("tuple[Shape, ...]", shapes), shapes.sizes)


class Column:
    """A tensor a datum, in one buffer ``flat`` [N]; the shape is None where a datum has none."""

    def __init__(self, flat: Tensor, shapes: Sequence[Shape | None]) -> None:
        self.flat = flat
        # They are no Shapes if they did not come over a wire.
        self.shapes = shapes if isinstance(shapes, Shapes) else Shapes.known(shapes)

    @cached_property
    def normal(self) -> Tensor:
        """``flat`` in the type that a ``tinker.TensorData`` has: float32 or int64."""
        return self.flat.to(torch.float32 if self.flat.is_floating_point() else torch.int64)

    @cached_property
    def batch(self) -> TensorBatch | None:
        """The whole column; None if some datum has no such tensor."""
        return whole_batch(self.normal, self.shapes) if self.shapes.whole else None

    def arrays(self) -> Iterator[Any]:
        """A numpy view a datum, of its own shape, or None."""
        flat, start = self.normal.numpy(), 0
        for shape, size in zip(self.shapes, self.shapes.sizes, strict=True):
            if shape is None:
                yield None
            else:
                end = start + size
                yield flat[start:end].reshape(shape)
                start = end


class WireData(Sequence["tinker.Datum"]):
    """The datums of a request. They are built, all of them, when the first one is looked at.

    ``chunks`` has an entry a datum: keyword arguments of its model input's chunks, or None where
    ``tokens`` has the model input. To everything but the building it is a list that cannot be
    changed; it pickles as a plain list.
    """

    def __init__(
        self,
        count: int,
        inputs: Mapping[str, Column],
        tokens: Column | None = None,
        chunks: Sequence[list[dict[str, Any]] | None] | None = None,
    ) -> None:
        self._count = count
        self._inputs = inputs
        self._tokens = tokens
        self._chunks = chunks
        self._lock = threading.Lock()
        self._built: list[tinker.Datum] | None = None

    def column(self, key: str) -> TensorBatch | None:
        """``loss_fn_inputs[key]`` of all datums, as it lay on the wire; None if not all have it."""
        column = self._inputs.get(key)
        return None if column is None else column.batch

    @property
    def input_names(self) -> Set[str]:
        """The keys of ``loss_fn_inputs``, of which every datum has some."""
        return self._inputs.keys()

    @property
    def _datums(self) -> list[tinker.Datum]:
        if self._built is None:
            with self._lock:
                if self._built is None:
                    self._built = self._build()
        return self._built

    def _build(self) -> list[tinker.Datum]:
        import tinker  # 0.6 s that a worker whose terms never look at a datum need not spend

        inputs: list[dict[str, tinker.TensorData]] = [{} for _ in range(self._count)]
        for key, column in self._inputs.items():
            for datum_inputs, array in zip(inputs, column.arrays(), strict=True):
                if array is not None:
                    datum_inputs[key] = tinker.TensorData.from_numpy(array)
        return [
            tinker.Datum(model_input=model_input, loss_fn_inputs=datum_inputs)
            for model_input, datum_inputs in zip(self._model_inputs(), inputs, strict=True)
        ]

    def _model_inputs(self) -> Iterator[tinker.ModelInput]:
        import tinker

        chunks = self._chunks or [None] * self._count
        tokens = self._tokens.arrays() if self._tokens else iter([None] * self._count)
        kinds = {
            "encoded_text": tinker.EncodedTextChunk,
            "image": tinker.types.ImageChunk,
            "image_asset_pointer": tinker.types.ImageAssetPointerChunk,
        }
        for own, ids in zip(chunks, tokens, strict=True):
            if own is not None:
                parts = [kinds[chunk["type"]](**chunk) for chunk in own]
            elif ids is not None:
                # The ids are integers already; to check each again would take most of the time.
                parts = [tinker.EncodedTextChunk.model_construct(tokens=ids.tolist())]
            else:
                parts = []
            yield tinker.ModelInput.model_construct(chunks=parts)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> tinker.Datum: ...
    @overload
    def __getitem__(self, index: slice) -> list[tinker.Datum]: ...
    def __getitem__(self, index: int | slice) -> tinker.Datum | list[tinker.Datum]:
        return self._datums[index]

    def __iter__(self) -> Iterator[tinker.Datum]:
        return iter(self._datums)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if isinstance(other, (list, WireData)):
            return self._datums == list(other)
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Sequence[tinker.Datum]) -> list[tinker.Datum]:
        return [*self._datums, *other]

    def __radd__(self, other: Sequence[tinker.Datum]) -> list[tinker.Datum]:
        return [*other, *self._datums]

    def copy(self) -> list[tinker.Datum]:
        """A plain list of the datums."""
        return list(self._datums)

    def __reduce__(self) -> tuple[type[list[Any]], tuple[list[tinker.Datum]]]:
        return list, (self._datums,)

    def __repr__(self) -> str:
        inputs = ", ".join(self._inputs) or "none"
        return f"WireData({counted(self._count, 'datum')}, loss_fn_inputs: {inputs})"
