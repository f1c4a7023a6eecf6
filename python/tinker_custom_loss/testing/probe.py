"""A function around a term that sees what its call leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Awaitable, Coroutine, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..regularizer import LossFn, is_coroutine_function

__all__ = ["Probe", "modes_restored"]


class Probe:
    """``fn`` is the term, called as it would be alone; the rest is what was seen.

    Attributes:
        changed: the first datum whose logprobs were changed in place, or None.
        modes: a sentence for each of torch's modes that was left changed.
        reached_back: whether the graph of a loss has a part in common with that of an earlier one.
    """

    def __init__(self, fn: LossFn) -> None:
        self.changed: int | None = None
        self.modes: list[str] = []
        self.reached_back = False
        self._earlier: set[Any] = set()
        self._gradients: dict[Tensor, Tensor | None] = {}
        self.fn = _around(fn, self)

    def call(self, fn: LossFn, data: Any, logprobs: list[Tensor], **params: Any) -> Any:
        """Call a function; what it returns may have to be awaited."""
        given = [x.detach().clone() for x in logprobs]
        modes = _modes()
        try:
            returned = fn(data, logprobs, **params)
        finally:
            self.note_modes(modes, "it leaves", "set it in a with block")
            self._compare(given, logprobs)
        if inspect.isawaitable(returned):
            return self._await(returned, given, logprobs)
        self._follow(returned, logprobs)
        return returned

    async def _await(
        self, awaitable: Awaitable[Any], given: list[Tensor], logprobs: Sequence[Tensor]
    ) -> Any:
        async def alone() -> Any:
            return await awaitable

        try:
            with _tasks_watched(self):
                returned = await _Watched(alone(), self)
        finally:
            self._compare(given, logprobs)
        self._follow(returned, logprobs)
        return returned

    def restore_gradients(self) -> None:
        """Give parameters that the losses led to the ``.grad`` that they had at first."""
        for parameter, gradient in self._gradients.items():
            parameter.grad = gradient

    def note_modes(self, before: dict[str, object], how: str, advice: str) -> None:
        """Note which of torch's modes are not what they were."""
        for mode, value in _modes().items():
            if value != before[mode]:
                note = f"{how} {mode} at {value}, where it was {before[mode]}: {advice}"
                if note not in self.modes:
                    self.modes.append(note)

    def _compare(self, given: list[Tensor], logprobs: Sequence[Tensor]) -> None:
        for datum, (before, after) in enumerate(zip(given, logprobs, strict=True)):
            if self.changed is None and not torch.equal(before, after.detach()):
                self.changed = datum

    def _follow(self, returned: Any, logprobs: Sequence[Tensor]) -> None:
        """Follow the graph of the loss that was returned; keep it, to know it again."""
        if not isinstance(returned, (tuple, list)) or not isinstance(returned[0], Tensor):
            return
        nodes, leaves = _graph([returned[0]])
        own = _graph(logprobs)[1]
        for parameter in leaves - own - self._gradients.keys():
            gradient = parameter.grad
            self._gradients[parameter] = None if gradient is None else gradient.clone()
        self.reached_back |= bool((nodes | leaves) & self._earlier)
        # A parameter is a leaf of every call; the logprobs are leaves of their own call alone.
        self._earlier |= nodes | own


def _around(fn: LossFn, probe: Probe) -> LossFn:
    """A function that calls ``fn`` through the probe, with its parameters, and async if it is."""

    def call(data: Any, logprobs: list[Tensor], **params: Any) -> Any:
        return probe.call(fn, data, logprobs, **params)

    async def call_async(data: Any, logprobs: list[Tensor], **params: Any) -> Any:
        return await probe.call(fn, data, logprobs, **params)

    around: Any = call_async if is_coroutine_function(fn) else call
    with contextlib.suppress(TypeError, ValueError):  # some builtins have no signature
        around.__signature__ = inspect.signature(fn)
    wrapped: LossFn = around
    return wrapped


def _graph(tensors: Sequence[Tensor]) -> tuple[set[Any], set[Any]]:
    """The operations, and the leaves, that the graphs of tensors lead to."""
    nodes: set[Any] = set()
    leaves = {x for x in tensors if x.grad_fn is None and x.requires_grad}
    to_visit: list[Any] = [x.grad_fn for x in tensors if x.grad_fn is not None]
    while to_visit:
        node = to_visit.pop()
        if node is None or node in nodes:
            continue
        if hasattr(node, "variable"):  # AccumulateGrad, the end of a path
            leaves.add(node.variable)
            continue
        nodes.add(node)
        to_visit += [following for following, _ in node.next_functions]
    return nodes, leaves


def _modes() -> dict[str, object]:
    """Torch's modes: the first three belong to the thread, the last to the process."""
    return {
        "gradients (torch.no_grad, torch.set_grad_enabled)": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "the default dtype": torch.get_default_dtype(),
    }


@contextlib.contextmanager
def modes_restored() -> Iterator[None]:
    """Leave the modes that a function can change for good as they were."""
    grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)


@contextlib.contextmanager
def _tasks_watched(probe: Probe) -> Iterator[None]:
    """Watch the tasks that are started meanwhile, such as those of asyncio.gather, as well."""
    loop = asyncio.get_running_loop()
    inner = loop.get_task_factory()
    make: Any = inner or (lambda loop, coroutine, **how: asyncio.Task(coroutine, loop=loop, **how))

    def factory(loop: Any, coroutine: Any, **how: Any) -> Any:
        return make(loop, _Watched(coroutine, probe), **how)

    loop.set_task_factory(factory)
    try:
        yield
    finally:
        loop.set_task_factory(inner)


class _Watched(Coroutine[Any, Any, Any]):
    """A coroutine whose every step is seen from outside, as other tasks of its loop see it."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], probe: Probe) -> None:
        self._coroutine = coroutine
        self._probe = probe

    def _step(self, step: Any, *args: Any) -> Any:
        modes = _modes()
        try:
            return step(*args)
        finally:
            self._probe.note_modes(
                modes,
                "it gives up the event loop with",
                "other tasks of the loop run in that mode; end the with block before the await",
            )

    def send(self, value: Any) -> Any:
        return self._step(self._coroutine.send, value)

    def throw(self, *error: Any) -> Any:
        return self._step(self._coroutine.throw, *error)

    def close(self) -> None:
        self._coroutine.close()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self.send(None)

    def __await__(self) -> Any:
        return self
