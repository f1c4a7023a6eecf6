"""A term under check: each check of :data:`~tinker_custom_loss.testing.CHECKS`, one method."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..composer import Composer
from ..errors import ChangedLogprobsError, CustomLossError, StaleGraphError
from ..regularizer import LossFn, Regularizer
from .probe import Probe, modes_restored

__all__ = ["CHECKS", "Batch", "CheckedTerm"]

CHECKS = {
    "returns": "runs on a batch and returns a finite scalar and a dict of numbers",
    "shapes": "takes [T], [T,K], one datum alone and lengths that differ",
    "unchanged": "leaves the logprobs as they are, through numpy and .data too",
    "data": "leaves the datums as they are",
    "modes": "leaves torch's modes as they are, also while it awaits",
    "graph": "keeps no autograd graph from one call to the next",
    "deterministic": "gives the same loss and gradient for the same batch",
    "gradient": "has the gradient that finite differences in float64 find",
    "process": "can be pickled, and gives the same in a process (only with process=True)",
}
"""Each check's name, and what a term that passes it does."""

_POSITIONS = 64  # where the gradient is compared; two evaluations each


@dataclass(frozen=True)
class Batch:
    """Datums and their logprobs, and how messages speak of them."""

    label: str
    data: Sequence[Any]
    logprobs: list[Tensor]


@dataclass(frozen=True)
class _Evaluated:
    loss: float
    gradient: Tensor | None  # [N], None without a graph


class CheckedTerm:
    """One term under check, on batches of random log-probabilities."""

    def __init__(
        self, term: Regularizer, whole: Batch, *, seed: int, eps: float, tolerance: float
    ) -> None:
        self._term = term
        self._whole = whole
        self._seed = seed
        self._eps = eps
        self._tolerance = tolerance
        self._probe = Probe(term.fn)

    def failures(self, skip: set[str]) -> dict[str, str]:
        """What each check that failed has to say, by its name."""
        found: dict[str, str] = {}
        try:
            batch = self._find_batch(found)
            if batch is not None:
                self._check_side_effects(batch, found)
                if not (found.keys() - skip) & {"unchanged", "data", "graph"}:
                    self._check_results(batch, found, skip)
        finally:
            self._probe.restore_gradients()
        return {name: found[name] for name in CHECKS if name in found and name not in skip}

    def _find_batch(self, found: dict[str, str]) -> Batch | None:
        """The largest batch that the term can be run on."""
        errors: dict[str, CustomLossError] = {}
        works = None
        batches = self._batches()
        for batch in batches:
            try:
                self._evaluate(copy.deepcopy(batch.data), batch.logprobs, fn=self._probe.fn)
                works = batch
            except CustomLossError as error:
                errors[batch.label] = error
        changed = [e for e in errors.values() if isinstance(e, ChangedLogprobsError)]
        if changed:
            found["unchanged"] = str(changed[0])
            return None
        stale = [e for e in errors.values() if isinstance(e, StaleGraphError)]
        if stale:
            found["graph"] = str(stale[0])
            return None
        if works is None:
            found["returns"] = str(next(iter(errors.values())))
        elif errors:
            failed = "; ".join(f"{label}: {why}" for label, why in errors.items())
            found["shapes"] = (
                f"it works on {works.label} and fails on others: {failed}. If it is not meant for "
                "those, give check_term the shapes that it is meant for"
            )
        return works

    def _batches(self) -> list[Batch]:
        data, logprobs = self._whole.data, self._whole.logprobs

        batches = []
        for ndim, letters in ((1, "[T]"), (2, "[T,K]")):
            alike = [i for i, x in enumerate(logprobs) if x.ndim == ndim]
            if alike:
                label = f"datums of {letters} alone"
                batch = Batch(label, [data[i] for i in alike], [logprobs[i] for i in alike])
                shape = list(batch.logprobs[0].shape)
                batches += [
                    Batch(f"one datum of {shape}", batch.data[:1], batch.logprobs[:1]),
                    batch,
                ]
        return [*batches, self._whole]

    def _check_side_effects(self, batch: Batch, found: dict[str, str]) -> None:
        """What one call leaves behind: in its arguments, in torch's modes, in the next call."""
        data = copy.deepcopy(batch.data)
        before = _contents(data)
        probe = self._probe
        other = [x - 0.125 for x in batch.logprobs]
        try:
            for logprobs in (batch.logprobs, batch.logprobs, other):
                self._evaluate(data, logprobs, fn=probe.fn)
        except ChangedLogprobsError as error:
            found["unchanged"] = str(error)
        except CustomLossError as error:
            found["graph"] = (
                f"it passes once and fails when it is called again: {error}. It keeps something "
                "from the first call, such as a cached tensor with its graph: detach it, or "
                "compute it anew in each call"
            )
        if probe.changed is not None:
            found["unchanged"] = (
                f"it changed the logprobs of datum {probe.changed} in place, which other terms "
                "share; clone what you change (x.numpy() and x.data are the same memory)"
            )
        for index, (ours, theirs) in enumerate(zip(before, _contents(data), strict=True)):
            if ours != theirs:
                found["data"] = (
                    f"it changed datum {index}, which other terms and the next step see; work on "
                    "copies"
                )
        if probe.modes:
            found["modes"] = "; ".join(probe.modes)
        if probe.reached_back:
            found["graph"] = (
                "the graph of its loss leads back to the logprobs of an earlier call, whose "
                "gradient nobody takes: it keeps a tensor with its graph, say in a cache. "
                "Detach it, or compute it anew in each call"
            )

    def _check_results(self, batch: Batch, found: dict[str, str], skip: set[str]) -> None:
        first, second = (
            self._evaluate(copy.deepcopy(batch.data), batch.logprobs) for _ in range(2)
        )
        if first.loss != second.loss or not _equal(first.gradient, second.gradient):
            what = (
                f"losses of {first.loss!r} and {second.loss!r}"
                if first.loss != second.loss
                else "the same loss and two gradients"
            )
            found["deterministic"] = (
                f"two calls with the same batch gave {what}, so a step cannot be repeated. Draw "
                "from a torch.Generator that a parameter seeds, add up async results in a fixed "
                "order, and keep no state between calls"
            )
        if "gradient" not in skip and ("deterministic" not in found or "deterministic" in skip):
            self._check_gradient(batch, found)
        if "process" not in skip:
            self._check_process(batch, found)

    def _check_gradient(self, batch: Batch, found: dict[str, str]) -> None:
        logprobs = [x.double() for x in batch.logprobs]
        flat = torch.cat([x.flatten() for x in logprobs])
        seeded = functools.partial(self._evaluate, copy.deepcopy(batch.data), seeded=True)

        def loss_at(position: int, change: float) -> float:
            moved = flat.clone()
            moved[position] += change
            parts = torch.split(moved, [x.numel() for x in logprobs])
            views = [part.view(x.shape) for part, x in zip(parts, logprobs, strict=True)]
            return seeded(views, gradients=False).loss

        try:
            evaluated = seeded(logprobs)
            positions = torch.randperm(len(flat))[:_POSITIONS].sort().values
            numeric = torch.tensor(
                [
                    (loss_at(int(i), self._eps) - loss_at(int(i), -self._eps)) / (2 * self._eps)
                    for i in positions
                ],
                dtype=torch.float64,
            )
        except CustomLossError as error:
            found["gradient"] = (
                f"it fails on float64 logprobs: {error}. Make constants in the type of the "
                "logprobs, with .to(x.dtype) or x.new_tensor(…)"
            )
            return
        analytic = torch.zeros_like(flat) if evaluated.gradient is None else evaluated.gradient
        analytic = analytic[positions].double()
        allowed = self._tolerance * float(numeric.abs().max())
        allowed += 1e-15 * max(1.0, abs(evaluated.loss)) / self._eps  # rounding of the losses
        wrong = ((analytic - numeric).abs() > allowed).nonzero().flatten()
        if not len(wrong):
            return
        if evaluated.gradient is None:
            found["gradient"] = (
                "its loss changes with the logprobs, but has no graph back to them, so it trains "
                "nothing: compute it without .item(), .detach(), .data, numpy and torch.no_grad()"
            )
            return
        worst = wrong[(analytic - numeric)[wrong].abs().argmax()]
        found["gradient"] = (
            f"∂loss/∂logprob at {_place(int(positions[worst]), logprobs)} is "
            f"{float(analytic[worst]):.6g} by autograd and {float(numeric[worst]):.6g} by finite "
            f"differences (wrong at {len(wrong)} of {len(positions)} positions). Look for "
            ".detach(), .item(), .data or a custom autograd.Function; a gradient that is meant to "
            'differ wants skip=("gradient",), one in float32 eps=1e-2 and tolerance=1e-2'
        )

    def _check_process(self, batch: Batch, found: dict[str, str]) -> None:
        here = self._evaluate(batch.data, batch.logprobs, seeded=True)
        try:
            there = self._evaluate(batch.data, batch.logprobs, process=True)
        except CustomLossError as error:
            found["process"] = f"it cannot run in a process: {error}"
            return
        if not math.isclose(here.loss, there.loss, rel_tol=1e-5, abs_tol=1e-7) or not _equal(
            here.gradient, there.gradient, rtol=1e-4, atol=1e-6
        ):
            found["process"] = (
                f"its loss is {here.loss!r} here and {there.loss!r} in a process, or its gradient "
                "differs: it depends on state of this process (a global, a cache, the environment)"
                "; hand it over in params or in the datums"
            )

    def _evaluate(
        self,
        data: Sequence[Any],
        logprobs: Sequence[Tensor],
        *,
        fn: LossFn | None = None,
        gradients: bool = True,
        seeded: bool = False,
        process: bool = False,
    ) -> _Evaluated:
        term = self._term
        regularizer = Regularizer(
            fn or term.fn,
            1.0,
            term.name,
            params=term.params,
            run_in_executor="process" if process else False,
        )
        # The base loss lets a term without a graph pass: that is for the gradient to say.
        composer = Composer(_zero, [regularizer])
        if seeded:
            torch.manual_seed(self._seed)
        with modes_restored():
            if not gradients:
                return _Evaluated(composer.compute_loss(data, logprobs).loss_total, None)
            composition = composer.compute(data, logprobs, term_gradients=True)
        gradient = composition.term_gradients.get(term.name)
        return _Evaluated(composition.loss_total, None if gradient is None else gradient.flat)


def _zero(data: Sequence[Any], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return 0.0 * torch.cat([x.flatten() for x in logprobs]).sum(), {}


def _contents(data: Sequence[Any]) -> list[bytes]:
    """Each datum as bytes that differ when something in it does."""
    # Copied first, since pickle writes down which parts are one object.
    return [pickle.dumps(copy.deepcopy(datum)) for datum in data]


def _equal(a: Tensor | None, b: Tensor | None, rtol: float = 0.0, atol: float = 0.0) -> bool:
    if a is None or b is None:
        return a is b
    return torch.allclose(a, b, rtol=rtol, atol=atol)


def _place(position: int, logprobs: Sequence[Tensor]) -> str:
    for datum, x in enumerate(logprobs):
        if position < x.numel():
            token = [int(i) for i in torch.unravel_index(torch.tensor(position), x.shape)]
            return f"datum {datum}, token {token[0] if len(token) == 1 else token}"
        position -= x.numel()
    raise IndexError(position)
