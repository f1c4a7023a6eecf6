"""Terms for the properties of any composition, and what they must come to. Importable by any
process.

Every term is a function of ``(data, logprobs)`` in closed form, so that the same loss can be
written as one function and differentiated by autograd at once.
"""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass

import torch


def curvature(logprobs):
    return sum(x.square().sum() for x in logprobs)


def entropy_like(logprobs):
    return sum((x.exp() * x).sum() for x in logprobs)


def across_datums(logprobs):
    means = torch.stack([x.mean() for x in logprobs])
    return (means - means.mean()).square().sum() + means[0].square()


def last_datum_only(logprobs):
    return torch.logsumexp(logprobs[-1].flatten(), 0)


FORMULAS = (curvature, entropy_like, across_datums, last_datum_only)


@dataclass(frozen=True)
class Drawn:
    """One term of an example."""

    formula: object
    scale: float
    weight: float
    slope: float  # weight + slope · step, if it is not 0
    place: str
    rank: int  # when it ends, roughly
    fault: str | None
    policy: str

    def weight_at(self, step):
        return self.weight + self.slope * step

    def as_regularizer(self, name):
        policies = {"on_error": self.policy if self.policy != "zero" else "raise"}
        return {
            "fn": _in_place[self.place],
            "weight": self.weight_at if self.slope else self.weight,
            "name": name,
            "params": {
                "formula": self.formula,
                "scale": self.scale,
                "rank": self.rank,
                "fault": self.fault,
            },
            "run_in_executor": {"thread": True, "process": "process"}.get(self.place, False),
            "on_non_finite": self.policy,
            **policies,
        }

    @property
    def ends_the_step(self):
        """Whether a step with this term fails."""
        if self.fault == "raises":
            return self.policy != "skip"
        return self.fault is not None and self.policy == "raise"

    @property
    def skipped(self):
        return self.fault is not None and self.policy == "skip"

    def loss(self, logprobs, step):
        """What it must add to the loss, in a graph; nothing where it is skipped."""
        if self.skipped:
            return 0.0 * logprobs[0].sum()
        kept = list(logprobs)
        if self.fault == "nan_gradient":  # at the first value, which keeps no gradient
            first = kept[0].flatten()
            first = torch.cat([first[:1].detach(), first[1:]])
            kept[0] = first.view(kept[0].shape)
        loss = self.weight_at(step) * self.scale * self.formula(kept)
        if self.fault == "nan_loss":  # adds nothing, but keeps its gradient
            loss = loss - loss.detach()
        return loss


def term(data, logprobs, *, formula, scale, rank, fault):
    time.sleep(rank / 500)  # terms end in a random order, whatever the order that was given
    return _result(logprobs, formula, scale, fault)


async def awaits(data, logprobs, *, formula, scale, rank, fault):
    await asyncio.sleep(rank / 500)
    return _result(logprobs, formula, scale, fault)


async def awaits_children(data, logprobs, *, formula, scale, rank, fault):
    """Some children await without gradients, as a judge does, while others make the graph."""

    async def judge(x, patience):
        with torch.no_grad():
            await asyncio.sleep(patience / 1000)
            return x.exp().mean()

    async def part(x, patience):
        await asyncio.sleep(patience / 1000)
        return 1.0 * x

    async with asyncio.TaskGroup() as group:
        for i, x in enumerate(logprobs):
            group.create_task(judge(x, (i + rank) % 4))
        parts = [group.create_task(part(x, (rank - i) % 4)) for i, x in enumerate(logprobs)]
    return _result([task.result() for task in parts], formula, scale, fault)


async def awaits_without_gradients(data, logprobs, *, formula, scale, rank, fault):
    with torch.no_grad():
        await asyncio.wait_for(asyncio.sleep(rank / 500), 60)
    return _result(logprobs, formula, scale, fault)


def _result(logprobs, formula, scale, fault):
    if fault == "raises":
        raise LookupError("no such reward")
    loss = scale * formula(logprobs)
    if fault == "nan_loss":
        loss = loss + torch.nan
    if fault == "nan_gradient":
        first = logprobs[0].flatten()[0]
        loss = loss + (first - first.detach()).sqrt()
    return loss, {"datums": len(logprobs)}


class Shared:
    """What the terms of a step have in common: parameters, and a feature that the first of them
    that runs computes for all."""

    def __init__(self):
        values = (0.75, -0.25)
        self.parameters = [torch.nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in values]
        self._feature = None
        self._lock = threading.Lock()

    def feature(self, logprobs):
        with self._lock:
            if self._feature is None:
                scale, _ = self.parameters
                self._feature = [(0.5 * x).exp() * scale for x in logprobs]
            return self._feature


@dataclass(frozen=True)
class Linked:
    """One term of an example whose terms have parameters and parts of their graphs in common."""

    formula: object
    weight: float
    place: str
    has_parameters: bool
    shares: bool

    def loss(self, logprobs, shared):
        inputs = shared.feature(logprobs) if self.shares else logprobs
        if self.has_parameters:
            scale, shift = shared.parameters
            inputs = [scale * x + shift for x in inputs]
        return self.formula(inputs) + logprobs[0].sum()

    def as_regularizer(self, name, shared):
        def term(data, logprobs):
            return self.loss(logprobs, shared), {}

        async def awaits(data, logprobs):
            await asyncio.sleep(0)
            return self.loss(logprobs, shared), {}

        return {
            "fn": awaits if self.place == "async" else term,
            "weight": self.weight,
            "name": name,
            "run_in_executor": self.place == "thread",
        }


_in_place = {
    "inline": term,
    "thread": term,
    "process": term,
    "async": awaits,
    "children": awaits_children,
    "no_grad": awaits_without_gradients,
}

PLACES = tuple(_in_place)
