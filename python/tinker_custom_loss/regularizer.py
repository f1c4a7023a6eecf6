"""What a term is: a function of ``(data, logprobs)``, its weight, its name, and what may go wrong.

Every option is checked here, when it is given, so that a training step never fails on a typo.
"""

from __future__ import annotations

import concurrent.futures
import difflib
import functools
import inspect
import math
import numbers
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, NoReturn, Protocol

from torch import Tensor

from .errors import RequestError, TermError

__all__ = [
    "BASE_LOSS",
    "LossFn",
    "Regularizer",
    "check_step",
    "is_coroutine_function",
    "nearest",
    "regularizers_from",
    "show",
]


class LossFn(Protocol):
    """``fn(data, logprobs, **params) -> (loss, metrics)``, or a coroutine function of that shape.

    ``data`` is the list of ``tinker.Datum``, ``logprobs`` a list of float tensors, one a datum,
    each [T] or [T,K]; ``loss`` a scalar tensor, or a number where there is no gradient; ``metrics``
    a dict of numbers or None.
    """

    def __call__(
        self, data: Any, logprobs: list[Tensor], /, *args: Any, **params: Any
    ) -> Returned | Awaitable[Returned]: ...


Returned = tuple[Tensor | float, Mapping[str, Any]]
Weight = float | Callable[[int], float]
Place = bool | Literal["process"] | concurrent.futures.Executor

_MANY = 12
"""So many names are too many to list them all."""

BASE_LOSS = "base_loss"
"""The name under which errors and records speak of the base loss. No regularizer may take it."""


@dataclass(frozen=True)
class Regularizer:
    """One named, weighted term of a composed loss.

    Args:
        fn: ``fn(data, logprobs, **params) -> (loss, metrics)``, sync or async. See :data:`LossFn`.
            Or the name of a term of the catalogue, such as ``"kl"``, whose function it becomes.
        weight: a finite number of either sign, or a function from the training step (an int) to
            one, for schedules.
        name: unique among the regularizers of a composer; by default the name of ``fn``. Without
            ``:`` and ``/``, which separate the keys of flat records and of Tinker's own metrics.
        params: keyword arguments handed to ``fn``.
        reduction: of a term of the catalogue, or one written with ``@term``: its parameter of that
            name.
        run_in_executor: where ``fn`` runs. ``False``: on the calling thread (an async ``fn`` on
            this package's event loop). ``True``: a thread. ``"process"``: a process of its own,
            started with ``spawn``. Or any ``concurrent.futures.Executor``, such as a Dask
            cluster's. Whatever runs elsewhere differentiates there and returns value, gradient
            and metrics.
        timeout: seconds this term may take in one step, or None. An inline sync function cannot
            be interrupted, so it cannot have one.
        on_error: ``"raise"`` ends the step with a :class:`TermError` that names the term;
            ``"skip"`` lets the term contribute 0 and records the error in the record.
        on_non_finite: what a nan or infinite loss or gradient does. ``"raise"`` and ``"skip"`` as
            above; ``"zero"`` keeps the finite part: gradient entries that are not finite become
            0, a loss that is not finite adds 0, and the record says how many.
        enabled: False leaves the term out altogether.

    Raises:
        RequestError: an option has a value it cannot have. ``path`` names the option.
    """

    fn: LossFn
    weight: Weight
    name: str = None  # type: ignore[assignment]  # never None once it is made
    params: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    reduction: str | None = field(default=None, kw_only=True)
    run_in_executor: Place = field(default=False, kw_only=True)
    timeout: float | None = field(default=None, kw_only=True)
    on_error: Literal["raise", "skip"] = field(default="raise", kw_only=True)
    on_non_finite: Literal["raise", "skip", "zero"] = field(default="raise", kw_only=True)
    enabled: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if self.params is None:
            object.__setattr__(self, "params", {})
        if isinstance(self.fn, str):
            object.__setattr__(self, "fn", _from_catalogue(self.fn))
        if self.name is None:
            object.__setattr__(self, "name", _name_of(self.fn))
        self._check_name()
        self._check_reduction()
        self._check_fn()
        self._check_weight()
        self._check_place_and_timeout()
        self._check_choice("on_error", ("raise", "skip"))
        self._check_choice("on_non_finite", ("raise", "skip", "zero"))
        if not isinstance(self.enabled, bool):
            self._refuse("enabled", "True or False", self.enabled)

    @property
    def title(self) -> str:
        """What messages call it."""
        return "the base loss" if self.name == BASE_LOSS else f'regularizer "{self.name}"'

    @cached_property
    def is_async(self) -> bool:
        """Whether ``fn`` is a coroutine function."""
        return is_coroutine_function(self.fn)

    def check_step(self, step: int | None) -> None:
        """Refuse to guess the step of a schedule.

        Raises:
            RequestError: the weight is a schedule, and the step is None.
        """
        if step is None and callable(self.weight):
            raise RequestError(
                f"the weight of {self.title} is a schedule, and nobody said which step this is; "
                "give step=, or train through with_regularizers(training_client), which counts",
                path="step",
            )

    def weight_at(self, step: int | None) -> float:
        """The weight at a training step; None: at a step that nobody knows.

        Raises:
            RequestError: the weight is a schedule, and the step is not known.
            TermError: the schedule raised, or gave something that is not a finite number.
        """
        if not callable(self.weight):
            return float(self.weight)
        self.check_step(step)
        assert step is not None
        try:
            weight = self.weight(step)
        except Exception as error:
            raise TermError.from_exception(self.name, error) from error
        if not _is_finite_number(weight):
            raise TermError(
                f'the weight schedule of the term "{self.name}" gave {weight!r} at step {step}; '
                "expected a finite number",
                term=self.name,
            )
        return float(weight)

    @classmethod
    def from_spec(cls, spec: Regularizer | Mapping[str, Any]) -> Regularizer:
        """A regularizer from a dict with the keys ``fn``, ``weight`` and any other option."""
        if isinstance(spec, Regularizer):
            return spec
        if not isinstance(spec, Mapping):
            raise RequestError(
                f"expected a Regularizer or a dict with the keys fn and weight, got {show(spec)}"
            )
        allowed = [f.name for f in fields(cls)]
        for key in spec:
            if key not in allowed:
                raise RequestError(
                    f"unknown option {key!r}; {nearest(str(key), allowed)}", path=str(key)
                )
        for key in ("fn", "weight"):
            if key not in spec:
                raise RequestError(f'the required option "{key}" is missing', path=key)
        return cls(**spec)

    def _check_name(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise RequestError(
                f'invalid value for "name": expected a non-empty string, got {show(self.name)}',
                path="name",
            )
        if ":" in self.name or "/" in self.name:
            self._refuse(
                "name",
                'a string without ":" and "/", which separate the keys of a record',
                self.name,
            )

    def _check_reduction(self) -> None:
        """It becomes one of the parameters, under which a term knows it."""
        if self.reduction is None:
            return
        if not hasattr(self.fn, "check_params"):
            raise RequestError(
                f"{self.title} has a reduction, but its function does its own: only terms of the "
                "catalogue and those written with @term have that option",
                path="reduction",
            )
        if self.params.get("reduction", self.reduction) != self.reduction:
            raise RequestError(
                f"{self.title} has two reductions, {self.reduction!r} and, in its params, "
                f"{self.params['reduction']!r}",
                path="reduction",
            )
        object.__setattr__(self, "params", {**self.params, "reduction": self.reduction})

    def _check_fn(self) -> None:
        if not callable(self.fn):
            self._refuse("fn", "a function of (data, logprobs)", self.fn)
        if not isinstance(self.params, Mapping) or not all(isinstance(k, str) for k in self.params):
            self._refuse("params", "a dict of keyword arguments", self.params)
        check_params = getattr(self.fn, "check_params", None)
        if check_params is not None:
            try:
                check_params(**self.params)
            except (TypeError, ValueError) as error:
                raise RequestError(f"{self.title}: {error}", path="params") from error
        try:
            signature = inspect.signature(self.fn)
        except (TypeError, ValueError):
            return  # some builtins have none: the call itself will tell
        try:
            signature.bind([], [], **self.params)
        except TypeError as error:
            raise RequestError(
                f"the function of {self.title} cannot be called as "
                f"fn(data, logprobs{''.join(f', {key}=…' for key in self.params)}): {error}; "
                f"its signature is {signature}",
                path="params" if self.params else "fn",
            ) from error

    def _check_weight(self) -> None:
        if not callable(self.weight) and not _is_finite_number(self.weight):
            self._refuse("weight", "a finite number, or a function of the step", self.weight)

    def _check_place_and_timeout(self) -> None:
        place = self.run_in_executor
        if not isinstance(place, (bool, concurrent.futures.Executor)) and place != "process":
            self._refuse(
                "run_in_executor", 'False, True, "process" or a concurrent.futures.Executor', place
            )
        if self.timeout is None:
            return
        if not _is_finite_number(self.timeout) or self.timeout <= 0:
            self._refuse("timeout", "a positive number of seconds, or None", self.timeout)
        if place is False and not self.is_async:
            raise RequestError(
                f"{self.title} has a timeout but runs inline, where nothing can "
                'interrupt it; set run_in_executor to True, "process" or an executor, or make '
                "its function async",
                path="timeout",
            )

    def _check_choice(self, option: str, allowed: Sequence[str]) -> None:
        value = getattr(self, option)
        if value not in allowed:
            self._refuse(option, " or ".join(f'"{choice}"' for choice in allowed), value)

    def _refuse(self, option: str, expected: str, got: object) -> NoReturn:
        raise RequestError(
            f'invalid value for "{option}" of {self.title}: expected {expected}, got {show(got)}',
            path=option,
        )


def regularizers_from(
    specs: Sequence[Regularizer | Mapping[str, Any]] | None,
) -> tuple[Regularizer, ...]:
    """Check a list of regularizers, each on its own and their names against each other."""
    if specs is None:
        return ()
    if isinstance(specs, (str, bytes, Mapping)) or not isinstance(specs, Sequence):
        raise RequestError(
            f"regularizers must be a list of Regularizer or dict, got {show(specs)}",
            path="regularizers",
        )
    regularizers: list[Regularizer] = []
    seen: dict[str, int] = {}
    for index, spec in enumerate(specs):
        where = f"regularizers[{index}]"
        try:
            regularizer = Regularizer.from_spec(spec)
        except RequestError as error:
            path = f"{where}.{error.path}" if error.path else where
            raise RequestError(f"{where}: {error}", path=path) from error
        name = regularizer.name
        if name == BASE_LOSS:
            raise RequestError(
                f'{where}: the name "{BASE_LOSS}" is reserved for the base loss; choose another',
                path=f"{where}.name",
            )
        if name in seen:
            raise RequestError(
                f'{where}: the name "{name}" is already taken by regularizers[{seen[name]}]; '
                "the record is keyed by name, so names must differ",
                path=f"{where}.name",
            )
        seen[name] = index
        regularizers.append(regularizer)
    return tuple(regularizers)


def check_step(step: object) -> None:
    """Refuse what is neither a training step, counted from 0, nor None: not known.

    Raises:
        RequestError: naming what it is.
    """
    if step is None or (isinstance(step, int) and not isinstance(step, bool) and step >= 0):
        return
    raise RequestError(
        f'invalid value for "step": expected a non-negative integer, got {show(step)}',
        path="step",
    )


def nearest(wrong: str, names: Sequence[str]) -> str:
    """A clause that lists ``names``, the ones most like ``wrong`` first; of many only these."""
    ranked = sorted(
        names, key=lambda name: -difflib.SequenceMatcher(None, wrong.lower(), name.lower()).ratio()
    )
    if len(ranked) > _MANY:
        return f"of {len(ranked)}, the nearest are: {', '.join(ranked[:3])}"
    return "known are: " + ", ".join(ranked) if ranked else "none are known"


def _from_catalogue(name: str) -> LossFn:
    from .terms import CATALOGUE  # it is not everyone's, and knows nothing of this module

    if name not in CATALOGUE:
        raise RequestError(
            "expected a function of (data, logprobs), or the name of a term of the catalogue; it "
            f'has no "{name}"; {nearest(name, [*CATALOGUE])}',
            path="fn",
        )
    return CATALOGUE[name]


def _name_of(fn: object) -> str:
    while isinstance(fn, functools.partial):
        fn = fn.func
    name = getattr(fn, "__name__", None)
    if isinstance(name, str) and name.isidentifier():
        return name
    raise RequestError(
        f"{show(fn)} has no name of its own; give the regularizer one with name=", path="name"
    )


def is_coroutine_function(fn: object) -> bool:
    """Whether a function, partial or callable object returns a coroutine when called."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(
        getattr(fn, "__call__", None)  # noqa: B004 - the method itself is wanted
    )


def _is_finite_number(value: object) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:  # an int beyond all floats
        return False


def show(value: object) -> str:
    """A value as error messages show it: its repr, cut short, and its type."""
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"{text} ({type(value).__name__})"
