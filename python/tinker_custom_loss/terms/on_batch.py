"""One term on one batch: what its function is given, and what becomes of its values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tensors.batch import TensorBatch
from .columns import is_present, read_chosen, read_groups
from .given import Given
from .groups import Groups
from .importance import Weighing
from .lazy import lazy
from .reading import MASKED, reading
from .selection import Selection

__all__ = ["Evaluated", "TermOnBatch", "rows", "values_and_metrics"]


class Evaluated(NamedTuple):
    """``loss`` is a scalar tensor; ``gradient`` [N] is ``∂loss/∂logprobs``, if it was wanted."""

    loss: Tensor
    metrics: dict[str, float]
    gradient: Tensor | None = None


class TermOnBatch:
    """One term on one batch: everything that its function, and the reduction, are given.

    ``graph``: somebody may differentiate through its values.
    """

    def __init__(
        self,
        given: Given,
        data: Sequence[Any],
        logprobs: TensorBatch,
        totals: Mapping[str, float] | None = None,
        *,
        graph: bool = True,
    ) -> None:
        made = given.term
        self._given, self._term, self._logprobs, self._graph = given, made, logprobs, graph
        self._given_totals = totals
        self._reading = reading(data, logprobs, given.weights, positions=made.alternatives)
        self._sequences = self._reading.sequences
        if not self._sequences.has_mean and (
            made.scope != "token" or given.reduction.has_mean_over_tokens
        ):
            raise ValueError(
                "negative weights have no mean: it divides by the sum of the weights; take them "
                'with a term of scope "token" and the reduction "token_sum"'
            )
        self._keys: list[str | None] = [*given.keys]
        for key, usual in given.optional:
            # Another key than the usual one was named on purpose.
            self._keys.append(key if key != usual or is_present(usual, data) else None)
        for key in self._keys:
            if key is not None:
                self._reading.raw(key)
        if given.importance:
            self._sampler = self._reading.column(given.sampler)
        self._params = given.own
        if made.scope == "sequence":
            self._params = {**given.own, "sequences": self._sequences}
        if made.scope == "group":
            device = logprobs.flat.device
            ids = read_groups(given.group, data).to(device)
            chosen = read_chosen(given.chosen, data).to(device)
            self._params = {**given.own, "groups": Groups(ids, chosen, self._sequences)}

    @lazy
    def totals(self) -> Mapping[str, float]:
        if self._given_totals is not None:
            return self._given_totals
        return {
            "tokens": self._sequences.weight,
            "sequences": float(len(self._sequences.sizes)),
            "values": float(self._values[0].numel()) if self._term.scope == "group" else 0.0,
        }

    def reduced(self, *, gradient: bool = False) -> Evaluated:
        values, own = self._values
        scale, factors = self._factors
        values = self._weighed(values)
        total = self._sum(values, factors)
        metrics = {"tokens": float(self._sequences.tokens)}
        for name, metric in {**own, **self._importance_metrics}.items():
            summed = total if metric is values else self._sum(metric.detach(), factors)
            metrics[name] = float(summed.detach()) * scale
        slope = self._gradient(scale, factors) if gradient else None
        return Evaluated(_scaled(total, scale), metrics, slope)

    def contributions(self) -> list[Tensor]:
        scale, factors = self._factors
        flat = self._reducible(self._weighed(self._values[0]), factors) * scale
        if self._term.scope != "token":
            return [*flat.unbind()]
        if self._term.alternatives:
            return [*torch.split(flat, list(self._sequences.sizes))]
        return self._logprobs.with_flat(flat).tensors()

    @lazy
    def _factors(self) -> tuple[float, Tensor | None]:
        """One for all values, and one for each of them."""
        if self._term.scope == "token":
            return self._given.reduction.of_tokens(self._sequences, self.totals)
        if self._term.scope == "sequence":
            return self._given.reduction.of_sequences(self._sequences, self.totals)
        return self._given.reduction.of_groups(self.totals), None

    def _sum(self, values: Tensor, factors: Tensor | None) -> Tensor:
        return self._reducible(values, factors).sum()

    def _reducible(self, values: Tensor, factors: Tensor | None) -> Tensor:
        if self._term.scope == "token":
            values = self._selected(self._sequences.selection, values)
        return values if factors is None else values * factors

    def _selected(self, entries: Selection | None, values: Tensor, otherwise: float = 0) -> Tensor:
        if entries is None:
            return values
        if self._graph:
            return entries.of(values, otherwise)
        return entries.of_plain(values, otherwise)

    def _gradient(self, scale: float, factors: Tensor | None) -> Tensor:
        derivative = self._selected(self._seen, self._derivative)
        if self._term.scope == "sequence" and factors is not None:
            factors = self._sequences.spread(factors)
        for each in (self._entries(self._weights), self._reading.entries(factors)):
            if each is not None:
                derivative = derivative * each
        return _scaled(derivative, scale)

    # --- Importance weights, through which nothing is differentiated

    @lazy
    def _weighing(self) -> Weighing | None:
        if not self._given.importance:
            return None
        old = self._reading.logprobs(self._logprobs.flat.detach(), graph=self._graph)
        if self._term.ratio is not None:
            old = self._reading.column(self._given.keys[self._term.ratio])
        per_datum = self._term.scope == "sequence"
        return self._given.importance.weigh(old - self._sampler, self._sequences, per_datum)

    @property
    def _weights(self) -> Tensor | None:
        return None if self._weighing is None else self._weighing.weight

    def _weighed(self, values: Tensor) -> Tensor:
        if self._weights is None:
            return values
        return torch.where(self._weights != 0, values, 0.0) * self._weights

    def _entries(self, weights: Tensor | None) -> Tensor | None:
        """Weights of summands as weights of tokens."""
        if weights is None or self._term.scope == "token":
            return weights
        return self._sequences.spread(weights)

    @lazy
    def _seen(self) -> Selection | None:
        """The entries that have a part in the loss; None: all."""
        kept, weights = self._reading.kept, self._entries(self._weights)
        if weights is None:
            return kept
        weighty = weights != 0
        return Selection(weighty if kept is None else kept.flags & weighty)

    @property
    def _importance_metrics(self) -> dict[str, Tensor]:
        """A value a token, or a datum's sum of these; reduced like the function's own."""
        if self._weighing is None:
            return {}
        weight, cut = self._weighing.weight, self._weighing.cut.to(self._weighing.weight.dtype)
        if self._term.scope == "sequence":
            weight, cut = (x * self._sequences.lengths for x in (weight, cut))
        did = "masked" if self._given.importance.masks else "truncated"
        return {"importance_weight": weight, f"importance_{did}": cut}

    # --- What the function, and its derivative, make of the batch

    @lazy
    def _values(self) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The function's values, in the order of the batch, and its metrics."""
        parts: list[tuple[Tensor, Mapping[str, Tensor]]] = []
        for part in self._parts:
            returned = self._term.__wrapped__(*part.tensors, **self._params)
            values, metrics = values_and_metrics(returned)
            self._check_shape("returned", values, self._expected(part))
            for name, metric in metrics.items():
                self._check_shape(f'returned the metric "{name}"', metric, tuple(values.shape))
            parts.append((values, metrics))
        if len(parts) == 1:
            return parts[0]
        positions = [part.positions for part in self._parts]
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
        for part in self._parts:
            derivative = self._term._derivative(*part.tensors, **self._params)
            self._check_shape(
                "has a derivative that returned", derivative, tuple(part.tensors[0].shape)
            )
            parts.append(derivative.reshape(-1))
        if len(parts) == 1:
            return parts[0]
        return _scattered([part.entries for part in self._parts], parts)

    def _expected(self, part: _Part) -> tuple[int, ...] | None:
        if self._term.scope == "group":
            return None
        if self._term.scope == "sequence":
            return (len(self._sequences.sizes),)
        return tuple(part.tensors[0].shape[:1])

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

    @lazy
    def _parts(self) -> list[_Part]:
        logprobs = self._reading.logprobs(self._logprobs.flat, graph=self._graph)
        columns = [None if key is None else self._reading.column(key) for key in self._keys]
        tensors = [logprobs, *columns]
        if self._weighing is not None:
            tensors = [
                None if x is None else self._selected(self._seen, x, MASKED) for x in tensors
            ]
        if not self._term.alternatives:
            return [_Part(tensors)]
        if self._reading.kind is not None:
            return [_Part([rows(x, self._reading.kind) for x in tensors])]
        return [*_by_rank(tensors, self._logprobs, self._reading.kinds)]


class _Part(NamedTuple):
    """Tensors of one shape, and where their positions and entries stand in the whole batch."""

    tensors: Sequence[Any]
    positions: Tensor | None = None
    entries: Tensor | None = None


def values_and_metrics(returned: object) -> tuple[Any, Mapping[str, Any]]:
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


def _by_rank(
    tensors: Sequence[Tensor | None], logprobs: TensorBatch, kinds: Sequence[int]
) -> Iterator[_Part]:
    """The datums of [T] together as [N], and those of each [T,K] as [N,K]."""
    device = logprobs.flat.device
    of_entry = torch.tensor(kinds, device=device).repeat_interleave(
        torch.tensor(logprobs.sizes, device=device)
    )
    of_position = torch.tensor(kinds, device=device).repeat_interleave(
        torch.tensor([shape[0] for shape in logprobs.shapes], device=device)
    )
    for kind in sorted(set(kinds)):
        entries = (of_entry == kind).nonzero()[:, 0]
        parts = [None if x is None else rows(x[entries], kind) for x in tensors]
        yield _Part(parts, (of_position == kind).nonzero()[:, 0], entries)


def rows(tensor: Tensor | None, alternatives: int) -> Tensor | None:
    return tensor if tensor is None or not alternatives else tensor.view(-1, alternatives)


def _scattered(indices: Sequence[Any], parts: Sequence[Tensor]) -> Tensor:
    joined = torch.cat([*parts])
    return torch.empty_like(joined).index_copy(0, torch.cat([*indices]), joined)


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1.0 else tensor * scale
