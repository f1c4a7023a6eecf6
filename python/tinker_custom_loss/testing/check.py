"""``check_term``: what a user asks for, and the batches that it is asked on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError
from ..regularizer import LossFn, Regularizer, nearest
from ..tensors.batch import Shape
from ..wording import counted
from .checked import CHECKS, Batch, CheckedTerm
from .probe import modes_restored

__all__ = ["check_term"]

_SHAPES: tuple[Shape, ...] = ((5,), (1,), (3, 2), (2, 3))


def check_term(
    fn: LossFn,
    *,
    params: Mapping[str, Any] | None = None,
    data: Sequence[Any] | None = None,
    inputs: Mapping[str, Callable[[Shape], Tensor]] | None = None,
    shapes: Sequence[Shape] | None = None,
    seed: int = 0,
    process: bool = False,
    skip: Collection[str] = (),
    eps: float = 1e-6,
    tolerance: float = 1e-4,
) -> None:
    """Check that a term, sync or async, behaves as a training step needs it to.

    Args:
        fn: ``fn(data, logprobs, **params) -> (loss, metrics)``, as a :class:`Regularizer` takes it.
        params: keyword arguments for ``fn``.
        data: datums to use, with logprobs of the shapes of their ``target_tokens``. None: datums
            with random ``target_tokens`` and ``weights`` of 1.
        inputs: what made-up datums hold besides, as functions from a shape to a tensor:
            ``{"advantages": torch.randn}``.
        shapes: one for each datum, [T] or [T,K]. Give ``[(5,), (3,)]`` for a term that is not
            meant for [T,K].
        seed: of the random numbers in all this. Torch's global generator is left as it was.
        process: whether the term must also run with ``run_in_executor="process"``.
        skip: names of checks, of :data:`CHECKS`, that this term need not pass;
            ``"returns"`` and ``"unchanged"`` it must.
        eps: the step of the finite differences; about 1e-2 for a term that computes in float32.
        tolerance: the allowed error of the gradient, relative to its largest entry.

    Raises:
        AssertionError: one line for each check that failed: what is wrong, where, what to do.
        RequestError: the check cannot be made as asked.
    """
    _check_names(skip)
    if data is not None and inputs is not None:
        raise RequestError("give either data, or inputs for datums that are made up, not both")
    with _generator_restored(), modes_restored():
        torch.manual_seed(seed)
        if data is None:
            shapes = _SHAPES if shapes is None else shapes
            data = [_datum(shape, inputs or {}) for shape in shapes]
        elif shapes is None:
            shapes = [tuple(datum.loss_fn_inputs["target_tokens"].shape) for datum in data]
        if not data or len(data) != len(shapes):
            raise RequestError(
                f"got {counted(len(data), 'datum')} and {counted(len(shapes), 'shape')}; "
                "expected one a datum"
            )
        term = Regularizer(fn, 1.0, _name(fn), params=params or {})
        whole = Batch("the whole batch", data, [_random_logprobs(tuple(s)) for s in shapes])
        checked = CheckedTerm(term, whole, seed=seed, eps=eps, tolerance=tolerance)
        failures = checked.failures({*skip} if process else {*skip, "process"})
    if failures:
        lines = "".join(f"\n  {name}: {failure}" for name, failure in failures.items())
        raise AssertionError(
            f'the term "{term.name}" fails {counted(len(failures), "check")}:{lines}'
        )


def _check_names(skip: Collection[str]) -> None:
    if isinstance(skip, str):
        raise RequestError(f"skip is a list of names of checks, got {skip!r}", path="skip")
    for name in skip:
        if name not in CHECKS:
            raise RequestError(f"there is no check {name!r}; {nearest(name, [*CHECKS])}")
        if name in ("returns", "unchanged"):
            raise RequestError(f"{name!r} cannot be skipped: a term that fails it fails every step")


def _name(fn: object) -> str:
    name = getattr(fn, "__name__", type(fn).__name__)
    return name.replace(":", "_").replace("/", "_")


def _random_logprobs(shape: Shape) -> Tensor:
    """[T] or [T,K], between -4 and -0.5: away from 0, where terms may have their corners."""
    return -0.5 - 3.5 * torch.rand(shape)


def _datum(shape: Shape, inputs: Mapping[str, Callable[[Shape], Tensor]]) -> Any:
    import tinker  # half a second, and only here

    made = {key: make(shape) for key, make in inputs.items()}
    tokens = torch.randint(0, 100, (shape[0],)).tolist()
    columns = {
        "target_tokens": torch.randint(0, 100, shape),
        "weights": torch.ones(shape),
        **made,
    }
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens),
        loss_fn_inputs={k: tinker.TensorData.from_torch(v) for k, v in columns.items()},
    )


@contextmanager
def _generator_restored() -> Iterator[None]:
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
