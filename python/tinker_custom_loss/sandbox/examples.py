"""What one forward or forward_backward works on: tokens, targets, what a loss reads beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..errors import RequestError
from ..tensors.batch import TensorBatch
from ..wording import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    import tinker

__all__ = ["COLUMNS", "VOCABULARY", "Examples"]

COLUMNS = ("weights", "logprobs", "advantages")
"""What losses read beside the targets."""

VOCABULARY = 512
"""Tokens 0 to 255 are bytes, 256 stands for the beginning of a text, the rest are free."""


@dataclass(frozen=True)
class Examples:
    """A batch of datums.

    ``tokens`` holds an int64 [T] a datum. ``target_tokens`` holds an int64 [T], the token that
    should follow each position, or [T,K], K alternatives at each position; the two may be mixed.
    ``weights``, the sampler's ``logprobs`` and ``advantages`` hold float32 values of the targets'
    shapes, or are None where a loss does without them.

    :raises RequestError: counts or shapes that disagree, a token outside the vocabulary, a value
        that is not finite; ``path`` says where.
    """

    tokens: TensorBatch
    target_tokens: TensorBatch
    weights: TensorBatch | None = None
    logprobs: TensorBatch | None = None
    advantages: TensorBatch | None = None

    def __post_init__(self) -> None:
        self._check_count("target_tokens", self.target_tokens)
        for i, (tokens, targets) in enumerate(
            zip(self.tokens.shapes, self.target_tokens.shapes, strict=True)
        ):
            if len(tokens) != 1:
                raise RequestError(
                    f"model_input has shape {list(tokens)}; expected [T]",
                    path=f"data[{i}].model_input",
                )
            if targets[:1] != tokens or len(targets) > 2:
                raise RequestError(
                    f"target_tokens has shape {list(targets)}, but the model input has "
                    f"{tokens[0]} tokens; expected [{tokens[0]}] or [{tokens[0]}, K]",
                    path=_input_path(i, "target_tokens"),
                )
        self._check_vocabulary("model_input", self.tokens)
        self._check_vocabulary("target_tokens", self.target_tokens)
        for name in COLUMNS:
            column = getattr(self, name)
            if column is not None:
                self._check_column(name, column)

    @classmethod
    def from_datums(cls, data: Sequence[tinker.Datum]) -> Examples:
        """Tokens and targets of ``data``, without weights."""
        return cls(
            TensorBatch.from_tensors([torch.tensor(datum.model_input.to_ints()) for datum in data]),
            TensorBatch.from_tensors(
                [datum.loss_fn_inputs["target_tokens"].to_torch() for datum in data]
            ),
        )

    def weighted(self, weights: TensorBatch) -> Examples:
        """The same tokens and targets with other weights."""
        return replace(self, weights=weights)

    def column(self, name: str, loss: str) -> TensorBatch:
        """:raises RequestError: these examples have no such column, which ``loss`` reads."""
        column: TensorBatch | None = getattr(self, name)
        if column is None:
            raise RequestError(
                f"{loss} needs {name} beside target_tokens, one a target",
                path="data[0].loss_fn_inputs",
            )
        return column

    def __len__(self) -> int:
        return len(self.tokens)

    def _check_count(self, key: str, batch: TensorBatch) -> None:
        if len(batch) != len(self.tokens):
            raise RequestError(
                f"got {counted(len(self.tokens), 'datum')}, but "
                f"{counted(len(batch), 'tensor')} of {key}",
                path="data",
            )

    def _check_vocabulary(self, key: str, batch: TensorBatch) -> None:
        if batch.flat.dtype != torch.int64:
            raise RequestError(
                f"{key} must be int64, got {str(batch.flat.dtype).removeprefix('torch.')}",
                path="data",
            )
        outside = (batch.flat < 0) | (batch.flat >= VOCABULARY)
        if outside.any():
            position = int(outside.nonzero()[0])
            datum, index = batch.locate(position)
            raise RequestError(
                f"token {int(batch.flat[position])} is outside the sandbox's vocabulary of "
                f"{VOCABULARY}: bytes are 0 to 255, the beginning of a text is 256",
                path=_input_path(datum, key) + str(list(index)),
            )

    def _check_column(self, key: str, column: TensorBatch) -> None:
        self._check_count(key, column)
        for i, (expected, got) in enumerate(
            zip(self.target_tokens.shapes, column.shapes, strict=True)
        ):
            if expected != got:
                raise RequestError(
                    f"{key} has shape {list(got)}, but target_tokens has {list(expected)}; "
                    "there must be one a target",
                    path=_input_path(i, key),
                )
        if column.flat.dtype != torch.float32:
            raise RequestError(f"{key} must be float32", path="data")
        finite = column.flat.isfinite()
        if not finite.all():
            position = int((~finite).nonzero()[0])
            datum, index = column.locate(position)
            raise RequestError(
                f"{key} holds {float(column.flat[position])}, which would spread to every "
                "parameter of the model",
                path=_input_path(datum, key) + str(list(index)),
            )


def _input_path(datum: int, key: str) -> str:
    if key == "model_input":
        return f"data[{datum}].model_input"
    return f'data[{datum}].loss_fn_inputs["{key}"]'
