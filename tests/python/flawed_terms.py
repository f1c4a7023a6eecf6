"""Terms with one flaw each, named after the check of check_term that they fail. Importable by any
process."""

from __future__ import annotations

import asyncio
import os

import torch


def _squares(logprobs):
    return sum(x.square().sum() for x in logprobs)


def sound(data, logprobs, *, scale=1.0):
    return scale * _squares(logprobs), {"datums": len(data)}


async def sound_and_async(data, logprobs):
    async def judge(x):
        with torch.no_grad():
            score = x.exp().sum()
        await asyncio.sleep(0)
        return score

    scores = await asyncio.gather(*map(judge, logprobs))
    return sum(s * x.sum() for s, x in zip(scores, (x.detach() for x in logprobs), strict=True)) * (
        0 * logprobs[0].sum()
    ) + _squares(logprobs), {}


# --- returns


def returns_no_pair(data, logprobs):
    return _squares(logprobs)


def returns_a_vector(data, logprobs):
    return torch.stack([x.sum() for x in logprobs]).expand(len(logprobs) + 1, -1), {}


def returns_text(data, logprobs):
    return _squares(logprobs), {"note": "fine"}


def returns_nan(data, logprobs):
    return _squares(logprobs) * torch.nan, {}


def raises(data, logprobs):
    raise LookupError("no such reward")


# --- shapes


def one_rank_alone(data, logprobs):
    return torch.cat(logprobs).square().sum(), {}


def lengths_alike(data, logprobs):
    return torch.stack(logprobs).square().sum(), {}


def not_one_alone(data, logprobs):
    return torch.stack([x.mean() for x in logprobs]).std(), {}


# --- unchanged


def changes_in_place(data, logprobs):
    with torch.no_grad():
        logprobs[1].clamp_(min=-1.0)
    return _squares(logprobs), {}


def changes_through_data(data, logprobs):
    logprobs[0].data.mul_(1.5)
    return _squares(logprobs), {}


def changes_through_numpy(data, logprobs):
    logprobs[0].detach().numpy()[0] = -7.0
    return _squares(logprobs), {}


async def changes_while_awaited(data, logprobs):
    await asyncio.sleep(0)
    logprobs[0].detach().numpy()[0] = -7.0
    return _squares(logprobs), {}


# --- data


def changes_a_column(data, logprobs):
    data[0].loss_fn_inputs["weights"] = data[0].loss_fn_inputs["target_tokens"]
    return _squares(logprobs), {}


def adds_a_column(data, logprobs):
    data[-1].loss_fn_inputs["seen"] = data[-1].loss_fn_inputs["weights"]
    return _squares(logprobs), {}


# --- modes


def leaves_gradients_off(data, logprobs):
    loss = _squares(logprobs)
    torch.set_grad_enabled(False)
    return loss, {}


def leaves_another_dtype(data, logprobs):
    torch.set_default_dtype(torch.float64)
    return _squares(logprobs), {}


async def awaits_without_gradients(data, logprobs):
    with torch.no_grad():
        scores = [x.exp() for x in logprobs]
        await asyncio.sleep(0)
    return sum((s * x).sum() for s, x in zip(scores, logprobs, strict=True)) * 0 + _squares(
        logprobs
    ), {}


async def awaits_in_autocast(data, logprobs):
    with torch.autocast("cpu"):
        await asyncio.sleep(0)
    return _squares(logprobs), {}


async def a_child_awaits_without_gradients(data, logprobs):
    async def judge():
        with torch.no_grad():
            await asyncio.sleep(0)

    await asyncio.gather(judge(), judge())
    return _squares(logprobs), {}


# --- graph


class CachesAFeature:
    """The feature of the first call, with the graph that leads to that call's logprobs."""

    def __init__(self):
        self._feature = None

    def __call__(self, data, logprobs):
        if self._feature is None:
            self._feature = sum(x.exp().sum() for x in logprobs)
        return self._feature + _squares(logprobs), {}


class CachesByBatch:
    """As a cache by ``id(data)`` does."""

    def __init__(self):
        self._features = {}

    def __call__(self, data, logprobs):
        if id(data) not in self._features:
            self._features[id(data)] = [data, [3 * x for x in logprobs]]
        return _squares(self._features[id(data)][1]), {}


class CachesAGraphOfParameters:
    """What a parameter gives, computed once: its graph is freed by the first gradient."""

    def __init__(self):
        self._scale = torch.nn.Parameter(torch.ones(())).exp()

    def __call__(self, data, logprobs):
        return self._scale * _squares(logprobs), {}


# --- deterministic


def draws_from_the_global_generator(data, logprobs):
    return sum((x + 0.1 * torch.randn(x.shape, dtype=x.dtype)).square().sum() for x in logprobs), {}


class Counts:
    def __init__(self):
        self._calls = 0

    def __call__(self, data, logprobs):
        self._calls += 1
        return self._calls * _squares(logprobs), {}


# --- gradient


def detaches_a_factor(data, logprobs):
    return sum((x.detach() * x).sum() for x in logprobs), {}


def has_no_graph(data, logprobs):
    return torch.tensor(_squares(logprobs).item()), {}


def forgets_a_datum(data, logprobs):
    return _squares([*logprobs[:-1], logprobs[-1].detach()]), {}


def wants_float32(data, logprobs):
    return sum(torch.dot(x.flatten(), torch.ones(x.numel())) for x in logprobs), {}


# --- process


def depends_on_its_process(data, logprobs):
    return (os.getpid() % 1000 + 1) * _squares(logprobs), {}


FLAWED = {
    "returns": [returns_no_pair, returns_a_vector, returns_text, returns_nan, raises],
    "shapes": [one_rank_alone, lengths_alike, not_one_alone],
    "unchanged": [
        changes_in_place,
        changes_through_data,
        changes_through_numpy,
        changes_while_awaited,
    ],
    "data": [changes_a_column, adds_a_column],
    "modes": [
        leaves_gradients_off,
        leaves_another_dtype,
        awaits_without_gradients,
        awaits_in_autocast,
        a_child_awaits_without_gradients,
    ],
    "graph": [CachesAFeature, CachesByBatch, CachesAGraphOfParameters],
    "deterministic": [draws_from_the_global_generator, Counts],
    "gradient": [detaches_a_factor, has_no_graph, forgets_a_datum, wants_float32],
    "process": [depends_on_its_process],
}
"""By check; a class is made anew for each test."""
