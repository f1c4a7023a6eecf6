"""One term on one batch: what its function is given, and what becomes of its values."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..tensors.batch import TensorBatch
from .columns import is_present, read, read_chosen, read_groups, read_weights
from .groups import Groups
from .reduction import Reduction, Sequences

if TYPE_CHECKING:
    from .term import Term

__all__ = ["Evaluated", "TermOnBatch"]

_MASKED = -20.0
"""What a function sees where a token has weight 0: a number that every formula can take, and of
which any number of alternatives have a mass below 1."""


@dataclass(frozen=True)
class Evaluated:
    """``loss`` is a scalar tensor; ``gradient`` [N] is ``∂loss/∂logprobs``, if it was wanted."""

    loss: Tensor
    metrics: dict[str, float]
    gradient: Tensor | None = None


class TermOnBatch:
    """One term on one batch: everything that its function, and the reduction, are given."""

    def __init__(
        self,
        made: Term,
        data: Sequence[Any],
        logprobs: TensorBatch,
        params: Mapping[str, Any],
        totals: Mapping[str, float] | None = None,
    ) -> None:
        bound = made.__signature__.bind(data, logprobs, **params)
        bound.apply_defaults()
        given = dict(bound.arguments)
        made.check_params(**params)
        self._term, self._logprobs, flat = made, logprobs, logprobs.flat
        self._reduction = Reduction(given["reduction"], given["normalizer"])
        shapes = logprobs.shapes
        if made.alternatives:
            shapes = tuple(shape[:1] for shape in shapes)
        mask = read_weights(given["weights"], data, shapes, flat)
        if mask is not None and (made.scope != "token" or self._reduction.has_mean_over_tokens):
            _check_mean(mask)
        self._kept = None
        if mask is not None and not bool((kept := mask != 0).all()):
            self._kept = kept
        sizes = tuple(shape[0] for shape in shapes) if made.alternatives else logprobs.sizes
        self._sequences = Sequences(sizes, mask, flat)
        self._given_totals = totals
        repeat = not made.alternatives  # a sampled token's logprob says nothing of alternatives
        self._columns: list[Tensor | None] = [
            *(read(given[name], data, logprobs, repeat=repeat) for name in made.inputs),
            # Another key than the usual one was named on purpose.
            *(
                read(given[name], data, logprobs, repeat=repeat)
                if given[name] != usual or is_present(usual, data)
                else None
                for name, usual in made.optional.items()
            ),
        ]
        reserved = {"data", "logprobs", "weights", "reduction", "normalizer"}
        reserved |= made.inputs.keys() | made.optional.keys()
        if made.scope == "group":
            reserved |= {"group", "chosen"}
        self._params = {key: value for key, value in given.items() if key not in reserved}
        if made.scope == "sequence":
            self._params["sequences"] = self._sequences
        if made.scope == "group":
            ids = read_groups(given["group"], data).to(flat.device)
            chosen = read_chosen(given["chosen"], data).to(flat.device)
            self._params["groups"] = Groups(ids, chosen, self._sequences)

    @functools.cached_property
    def totals(self) -> Mapping[str, float]:
        if self._given_totals is not None:
            return self._given_totals
        mask = self._sequences.mask
        entries = sum(self._sequences.sizes)
        return {
            "tokens": float(entries if mask is None else mask.sum(dtype=torch.float64)),
            "sequences": float(len(self._sequences.sizes)),
            "values": float(self._values[0].numel()) if self._term.scope == "group" else 0.0,
        }

    def reduced(self, *, gradient: bool) -> Evaluated:
        values, own = self._values
        scale, factors = self._factors
        mask = self._sequences.mask
        tokens = sum(self._sequences.sizes) if mask is None else int((mask != 0).sum())
        metrics = {"tokens": float(tokens)}
        for name, metric in own.items():
            metrics[name] = float(self._weighted(metric.detach(), factors).sum()) * scale
        loss = _scaled(self._weighted(values, factors).sum(), scale)
        return Evaluated(loss, metrics, self._gradient(scale, factors) if gradient else None)

    def contributions(self) -> list[Tensor]:
        scale, factors = self._factors
        flat = _scaled(self._weighted(self._values[0], factors), scale)
        if self._term.scope != "token":
            return [*flat.unbind()]
        if self._term.alternatives:
            return [*torch.split(flat, list(self._sequences.sizes))]
        return self._logprobs.with_flat(flat).tensors()

    @functools.cached_property
    def _factors(self) -> tuple[float, Tensor | None]:
        """One for all values, and one for each of them."""
        if self._term.scope == "token":
            return self._reduction.of_tokens(self._sequences, self.totals)
        if self._term.scope == "sequence":
            return self._reduction.of_sequences(self._sequences, self.totals)
        return self._reduction.of_groups(self.totals), None

    def _weighted(self, values: Tensor, factors: Tensor | None) -> Tensor:
        if self._kept is not None and self._term.scope == "token":
            values = torch.where(self._kept, values, 0.0)
        return values if factors is None else values * factors

    def _gradient(self, scale: float, factors: Tensor | None) -> Tensor:
        derivative = self._derivative
        if self._term.scope == "sequence" and factors is not None:
            factors = self._sequences.spread(factors)
        entries = self._entries(self._kept)
        if entries is not None:
            derivative = torch.where(entries, derivative, 0.0)
        factors = self._entries(factors)
        if factors is not None:
            derivative = derivative * factors
        return _scaled(derivative, scale)

    @functools.cached_property
    def _values(self) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The function's values, in the order of the batch, and its metrics."""
        parts: list[tuple[Tensor, Mapping[str, Tensor]]] = []
        for block in self._blocks:
            returned = self._term.__wrapped__(*block.tensors, **self._params)
            values, metrics = _values_and_metrics(returned)
            self._check_shape("returned", values, self._expected(block))
            for name, metric in metrics.items():
                self._check_shape(f'returned the metric "{name}"', metric, tuple(values.shape))
            parts.append((values, metrics))
        if len(parts) == 1:
            return parts[0]
        positions = [block.positions for block in self._blocks]
        names = sorted(set().union(*(metrics for _, metrics in parts)))
        return _scattered(positions, [values for values, _ in parts]), {
            name: _scattered(
                positions, [own.get(name, torch.zeros_like(values)) for values, own in parts]
            )
            for name in names
        }

    @property
    def _derivative(self) -> Tensor:
        assert self._term._derivative is not None
        parts = []
        for block in self._blocks:
            derivative = self._term._derivative(*block.tensors, **self._params)
            self._check_shape(
                "has a derivative that returned", derivative, tuple(block.tensors[0].shape)
            )
            parts.append(derivative.reshape(-1))
        if len(parts) == 1:
            return parts[0]
        return _scattered([block.entries for block in self._blocks], parts)

    def _expected(self, block: _Block) -> tuple[int, ...] | None:
        if self._term.scope == "group":
            return None
        if self._term.scope == "sequence":
            return (len(self._sequences.sizes),)
        return tuple(block.tensors[0].shape[:1])

    def _check_shape(self, did: str, tensor: object, want: tuple[int, ...] | None) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"it {did} a {type(tensor).__name__}; expected a tensor")
        shape = tuple(tensor.shape)
        if shape != want if want is not None else len(shape) != 1:
            expected = "[P], one for each comparison" if want is None else str(list(want))
            raise ValueError(
                f"it {did} a tensor of shape {list(shape)}; a term of scope "
                f'"{self._term.scope}" must give {expected} here'
            )

    @functools.cached_property
    def _blocks(self) -> list[_Block]:
        tensors = [self._logprobs.flat, *self._columns]
        kept = self._entries(self._kept)
        if kept is not None:
            tensors = [x if x is None else torch.where(kept, x, _MASKED) for x in tensors]
        if not self._term.alternatives:
            return [_Block(tensors)]
        return [*_by_rank(tensors, self._logprobs)]

    def _entries(self, per_value: Tensor | None) -> Tensor | None:
        """What is known of every position, for each of its alternatives."""
        if per_value is None or not self._term.alternatives:
            return per_value
        return torch.repeat_interleave(per_value, _alternatives(self._logprobs))


@dataclass(frozen=True)
class _Block:
    """Tensors of one shape, and where their positions and entries stand in the whole batch."""

    tensors: Sequence[Any]
    positions: Tensor | None = None
    entries: Tensor | None = None


def _check_mean(mask: Tensor) -> None:
    if mask.numel() and bool(mask.min() < 0):
        raise ValueError(
            "negative weights have no mean: it divides by the sum of the weights; take them with a "
            'term of scope "token" and the reduction "token_sum"'
        )


def _values_and_metrics(returned: object) -> tuple[Any, Mapping[str, Any]]:
    if not isinstance(returned, tuple):
        return returned, {}
    if len(returned) != 2:
        raise TypeError(
            f"it returned {len(returned)} things; expected values, or values and metrics"
        )
    values, metrics = returned
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"its metrics are a {type(metrics).__name__}; expected a mapping of names to tensors"
        )
    return values, metrics


def _alternatives(logprobs: TensorBatch) -> int | Tensor:
    """The number of alternatives of every position: K, or a tensor [N] where they differ."""
    counts = [shape[1] if len(shape) == 2 else 1 for shape in logprobs.shapes]
    if len(set(counts)) == 1:
        return counts[0]
    each = torch.tensor(counts, device=logprobs.flat.device)
    return each.repeat_interleave(each.new_tensor([shape[0] for shape in logprobs.shapes]))


def _by_rank(tensors: Sequence[Tensor | None], logprobs: TensorBatch) -> Iterator[_Block]:
    """The datums of [T] together as [N], and those of each [T,K] as [N,K]."""
    kinds = [shape[1] if len(shape) == 2 else 0 for shape in logprobs.shapes]
    if len(set(kinds)) == 1:
        yield _Block([_rows(x, kinds[0]) for x in tensors])
        return
    device = logprobs.flat.device
    of_entry = torch.tensor(kinds, device=device).repeat_interleave(
        torch.tensor(logprobs.sizes, device=device)
    )
    of_position = torch.tensor(kinds, device=device).repeat_interleave(
        torch.tensor([shape[0] for shape in logprobs.shapes], device=device)
    )
    for kind in sorted(set(kinds)):
        entries = (of_entry == kind).nonzero()[:, 0]
        parts = [None if x is None else _rows(x[entries], kind) for x in tensors]
        yield _Block(parts, (of_position == kind).nonzero()[:, 0], entries)


def _rows(tensor: Tensor | None, alternatives: int) -> Tensor | None:
    return tensor if tensor is None or not alternatives else tensor.view(-1, alternatives)


def _scattered(indices: Sequence[Any], parts: Sequence[Tensor]) -> Tensor:
    joined = torch.cat([*parts])
    return torch.empty_like(joined).index_copy(0, torch.cat([*indices]), joined)


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1.0 else tensor * scale
