"""A kept step, computed again: as it was, or with other weights and other terms."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..composer import Composer
from ..description import function_named
from ..errors import RequestError
from ..observer import ObservedStep
from ..regularizer import BASE_LOSS, nearest
from ..tensors import gradients as grad
from ..terms import CATALOGUE
from ..terms.registry import load_module
from .comparison import comparison
from .kept import KeptStep, Outcome, Unknown, outcome_of, read_step

__all__ = ["Replay", "replay"]

_MEASURED = ("seconds", "compute_seconds")


@dataclass(frozen=True, repr=False)
class Replay:
    """A step as it was and as it came out ``again``; ``changes`` are sentences, none if it was to
    be the same."""

    step: KeptStep
    again: Outcome
    changes: Sequence[str] = ()

    @property
    def is_same(self) -> bool:
        """Whether loss, record (but for seconds) and every bit of the gradient are as they were,
        or the same error came, about the same datum and token."""
        was, now = self.step.outcome, self.again
        if was.error is not None or now.error is not None:
            return was.error == now.error
        assert was.gradients is not None
        assert now.gradients is not None
        return (
            was.loss_total == now.loss_total
            and without_seconds(was.record) == without_seconds(now.record)
            and len(was.gradients) == len(now.gradients)
            and all(map(_equal, was.gradients, now.gradients))
        )

    @property
    def gradient_change(self) -> tuple[float, float, float] | None:
        """Of the gradient with respect to the logprobs: the norm as it was, the norm now, and the
        cosine between the two. None where one of them failed."""
        was, now = self.step.outcome.gradients, self.again.gradients
        if was is None or now is None:
            return None
        before, after = (torch.cat([g.double().reshape(-1).cpu() for g in gs]) for gs in (was, now))
        norms = grad.norm(before), grad.norm(after)
        return (*norms, grad.cosine(before, after, *norms))

    def __str__(self) -> str:
        return "\n".join(comparison(self))

    def __repr__(self) -> str:
        what = "; ".join(self.changes) or ("the same" if self.is_same else "not the same")
        return f"Replay({str(self.step.path)!r}, {what})"


def replay(
    path: str | os.PathLike[str] | KeptStep,
    *,
    load: Iterable[str] = (),
    weights: Mapping[str, float] | None = None,
    drop: Iterable[str] = (),
    add: Iterable[Mapping[str, Any]] = (),
    replace: Mapping[str, Any] | None = None,
    term_gradients: bool = False,
    drop_unknown: bool = False,
) -> Replay:
    """Compute a kept step again.

    Its datums, logprobs, totals and random generators are those of the step. Its terms are had by
    their names: those of the catalogue, and those of the modules in ``load``; no other module is
    imported, whatever the file names.

    Args:
        path: of the file, or what :func:`read_step` gave.
        load: modules, or paths of ``.py`` files, with the terms that are not of the catalogue.
        weights: by the names of regularizers, in place of those that they had at that step.
        drop: names of terms to leave out.
        add: further regularizers: dicts as a :class:`Composer` takes them, whose ``fn`` may also
            be ``"module:name"``.
        replace: by the name of a term, another function: a callable or its name. Where the term
            had none that can be looked up, as a lambda has none, that is no change but the way
            to say what it was.
        term_gradients: keep each term's own gradient in what comes out ``again``.
        drop_unknown: leave out a term that cannot be had, rather than raise.

    Raises:
        RequestError: the file cannot be read, a term cannot be had, or an argument names nothing.
    """
    step = path if isinstance(path, KeptStep) else read_step(path)
    terms = _Terms(step, load, drop_unknown)
    composer, changes = terms.composer(weights or {}, set(drop), list(add), dict(replace or {}))
    observed = ObservedStep(composer, step.data, step.logprobs, step.step, step.totals)
    error: BaseException | None = None
    threads = torch.get_num_threads()
    torch.set_num_threads(step.threads)  # in how many parts a sum is added up
    try:
        with step.seeds.planted():
            observed.composition = composer.compute(
                step.data,
                step.logprobs,
                step=step.step,
                totals=step.totals,
                term_gradients=term_gradients,
            )
    except RequestError:
        raise
    except Exception as failure:
        error = failure
    finally:
        torch.set_num_threads(threads)
        composer.close()
    return Replay(step, outcome_of(observed, error), changes)


class _Terms:
    """The terms of a kept step, had by their names."""

    def __init__(self, step: KeptStep, load: Iterable[str], drop_unknown: bool) -> None:
        self._step = step
        self._modules: dict[str, ModuleType] = {}
        for target in load:
            module = load_module(target)
            self._modules[module.__name__] = module
        self._drop_unknown = drop_unknown
        self._changes: list[str] = []

    def composer(
        self,
        weights: Mapping[str, float],
        drop: set[str],
        add: Sequence[Mapping[str, Any]],
        replace: dict[str, Any],
    ) -> tuple[Composer, list[str]]:
        step, told = self._step, self._step.description
        names = [each["name"] for each in told["regularizers"]]
        base = step.base_loss
        there = names + [BASE_LOSS] * (base is not None)
        for option, given in (("drop", drop), ("replace", replace)):
            _check_names(option, given, there)
        _check_names("weight", weights, names)
        base_fn, base_params = None, None
        if base is not None and BASE_LOSS not in drop:
            base_fn = self._fn(BASE_LOSS, told["base_loss"], replace)
            if base_fn is not None:
                base_params = self._params(BASE_LOSS, base["params"])
        regularizers = []
        for described, exact in zip(told["regularizers"], step.regularizers, strict=True):
            name = described["name"]
            if name in drop:
                continue
            fn = self._fn(name, described, replace)
            if fn is None:
                continue
            regularizers.append(
                {
                    "fn": fn,
                    "name": name,
                    "weight": self._weight(name, exact["weight"], weights),
                    "params": self._params(name, exact["params"]),
                    "run_in_executor": _place(described["run_in_executor"]),
                    **{
                        option: described[option]
                        for option in ("timeout", "on_error", "on_non_finite", "enabled")
                    },
                }
            )
        self._changes += [f'without "{name}"' for name in sorted(drop)]
        for spec in add:
            regularizers.append(self._added(spec))
        return Composer(base_fn, regularizers, base_params=base_params), self._changes

    def _fn(self, name: str, described: Mapping[str, Any], replace: Mapping[str, Any]) -> Any:
        fn = described["fn"]
        if name in replace:
            other = replace[name]
            if fn is not None:
                self._changes.append(f'"{name}" computed by {_shown(other)}')
            return self._given(other)
        if fn is None:
            problem = (
                f'the term "{name}" was {described["unnamed"]}, which cannot be had by a name; '
                f"give what it is (--replace {name}=module:function), or leave it out "
                f"(--drop {name})"
            )
        else:
            try:
                return self._named(fn)
            except RequestError as error:
                problem = f'the term "{name}" was {fn}: {error}'
                target = described.get("load")
                if target and fn.partition(":")[0] not in self._modules:
                    problem = (
                        f'the term "{name}" was {fn}; a file imports nothing by itself: give '
                        f"--load {target}"
                    )
        if self._drop_unknown:
            self._changes.append(f'without "{name}", which cannot be had here')
            return None
        raise RequestError(problem, path=name)

    def _given(self, fn: Any) -> Any:
        """A function, or what a name means that the caller gave, whose module may be imported."""
        if not isinstance(fn, str) or fn in CATALOGUE:
            return CATALOGUE[fn] if isinstance(fn, str) else fn
        target, colon, path = fn.rpartition(":")
        if colon and target not in self._modules:
            module = load_module(target)
            self._modules[module.__name__] = module
            fn = f"{module.__name__}:{path}"
        return self._named(fn)

    def _named(self, fn: str) -> Any:
        if fn in CATALOGUE:
            return CATALOGUE[fn]
        module_name, colon, path = fn.partition(":")
        if not colon:
            raise RequestError(f'the catalogue has no "{fn}"; {nearest(fn, [*CATALOGUE])}')
        module = self._modules.get(module_name)
        if module is None:
            raise RequestError(f'the module "{module_name}" is not loaded; give --load')
        found = function_named(module, path)
        if not callable(found):
            raise RequestError(f'"{module_name}" has no function "{path}"')
        return found

    def _weight(self, name: str, weight: Any, weights: Mapping[str, float]) -> float:
        if name in weights:
            was = "unknown" if isinstance(weight, dict) else f"{weight:g}"
            if weight != weights[name]:
                self._changes.append(f'"{name}" weighted {weights[name]:g} rather than {was}')
            return weights[name]
        if isinstance(weight, dict):
            raise RequestError(
                f'the weight of "{name}" at this step could not be had: {weight["unknown"]}; give '
                f"one (--weight {name}=…)",
                path=name,
            )
        return float(weight)

    def _params(self, name: str, params: Mapping[str, Any]) -> Mapping[str, Any]:
        for key, value in params.items():
            if isinstance(value, Unknown):
                raise RequestError(
                    f'the param "{key}" of the term "{name}" was {value.what}, which no file '
                    f"holds; leave the term out (--drop {name})",
                    path=name,
                )
        return params

    def _added(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(spec, Mapping):
            raise RequestError("what is added must be a dict with the keys fn and weight")
        own = dict(spec)
        if isinstance(own.get("fn"), str):
            name = own["fn"].rpartition(":")[2]
            own.setdefault("name", name.rpartition(".")[2])
            own["fn"] = self._given(own["fn"])
        self._changes.append(f"with {_shown(spec.get('fn'))}, weighted {spec.get('weight')}")
        return own


def _check_names(option: str, given: Iterable[str], there: Sequence[str]) -> None:
    for name in given:
        if name not in there:
            raise RequestError(
                f'{option}: the step had no term "{name}"; {nearest(name, there)}', path=option
            )


def _place(place: Any) -> Any:
    return place if isinstance(place, bool) or place == "process" else True


def _shown(fn: Any) -> str:
    return fn if isinstance(fn, str) else getattr(fn, "__qualname__", repr(fn))


def without_seconds(value: Any) -> Any:
    """A record without what is measured with a clock; floats as text, of which nan is equal."""
    if isinstance(value, Mapping):
        return {k: without_seconds(v) for k, v in value.items() if k not in _MEASURED}
    return repr(value) if isinstance(value, float) else value


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    bits = (tensor.cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*bits)  # 0.0 and -0.0 are equal numbers
