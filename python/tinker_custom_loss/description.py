"""A composition in words that JSON can hold: what was composed, by which names, of which versions.

A function is described by the name under which it can be had again: that of the catalogue, or
``module:name``, as ``--load`` offers it. One without such a name, such as a lambda, is described by
a sentence.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import math
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

from .regularizer import Regularizer, show

__all__ = ["describe_terms", "function_named", "name_of_function", "versions"]

_SAMPLED_STEPS = (0, 1, 10, 100, 1_000, 10_000)
_PACKAGE = __name__.partition(".")[0]


def describe_terms(
    base_loss: Regularizer | None, regularizers: Sequence[Regularizer]
) -> dict[str, Any]:
    """What :meth:`Composer.describe` returns."""
    return {
        "base_loss": None if base_loss is None else _function(base_loss),
        "regularizers": [_described(term) for term in regularizers],
        "versions": versions(),
    }


@functools.cache
def versions() -> dict[str, str | None]:
    """The versions of this package, torch, tinker and Python; None of what is not installed."""
    try:
        tinker: str | None = importlib.metadata.version("tinker")
    except importlib.metadata.PackageNotFoundError:
        tinker = None
    return {
        "tinker_custom_loss": str(sys.modules[_PACKAGE].__version__),
        "torch": str(torch.__version__),
        "tinker": tinker,
        "python": platform.python_version(),
    }


def name_of_function(fn: Any) -> tuple[str | None, str]:
    """``(name, where)``: a name of the catalogue and ``""``, or ``module:name`` and what to load
    for it, a module or a file; or None and why it has no name."""
    from .terms import CATALOGUE  # it knows nothing of this module

    fn = _without_own_wrappers(fn)
    name = getattr(fn, "__name__", None)
    if isinstance(name, str) and CATALOGUE.get(name) is fn:
        return name, ""
    if isinstance(fn, functools.partial):
        return None, f"a partial of {show(fn.func)}"
    module, path = getattr(fn, "__module__", None), getattr(fn, "__qualname__", None)
    if not isinstance(path, str) or not isinstance(module, str):
        return None, f"an object of the class {type(fn).__module__}.{type(fn).__qualname__}"
    if path.endswith("<lambda>"):
        return None, f"a lambda in {module}"
    if "<locals>" in path:
        return None, f"a function within a function, {path} in {module}"
    found = function_named(sys.modules.get(module), path)
    if found is not fn:
        return None, f"{path} in {module}, which means something else there by now"
    if module != "__main__":
        return f"{module}:{path}", module
    main = sys.modules["__main__"]
    if spec := getattr(main, "__spec__", None):  # python -m
        return f"{spec.name}:{path}", spec.name
    file = getattr(main, "__file__", None)
    if file is None:
        return None, f"{path}, which was typed into an interpreter"
    return f"{Path(file).stem}:{path}", str(Path(file).resolve())


def function_named(module: object, path: str) -> Any:
    """What ``path``, names with dots between, means in a module; None if nothing."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _without_own_wrappers(fn: Any) -> Any:
    while isinstance(fn, FunctionType) and hasattr(fn, "__wrapped__"):
        if not fn.__globals__.get("__name__", "").startswith(f"{_PACKAGE}.port."):
            break
        fn = fn.__wrapped__
    return fn


def _described(term: Regularizer) -> dict[str, Any]:
    place = term.run_in_executor
    return {
        "name": term.name,
        **_function(term),
        "weight": _weight(term),
        "run_in_executor": place if isinstance(place, (bool, str)) else type(place).__qualname__,
        "timeout": term.timeout,
        "on_error": term.on_error,
        "on_non_finite": term.on_non_finite,
        "enabled": term.enabled,
    }


def _function(term: Regularizer) -> dict[str, Any]:
    """``params`` are those given, ``defaults`` those that were left to the function."""
    name, where = name_of_function(term.fn)
    described: dict[str, Any] = {"fn": name}
    if name is None:
        described["unnamed"] = where
    elif where:
        described["load"] = where
    described["scope"] = getattr(term.fn, "scope", "batch")
    described["params"] = {key: _plain(value) for key, value in term.params.items()}
    described["defaults"] = {
        key: _plain(value) for key, value in _defaults(term.fn).items() if key not in term.params
    }
    return described


def _defaults(fn: Any) -> dict[str, Any]:
    try:
        parameters = [*inspect.signature(fn).parameters.values()]
    except (TypeError, ValueError):
        return {}
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {p.name: p.default for p in parameters if p.kind in named and p.default is not p.empty}


def _weight(term: Regularizer) -> Any:
    if not callable(term.weight):
        return float(term.weight)
    name, where = name_of_function(term.weight)
    values: dict[str, float] = {}
    for step in _SAMPLED_STEPS:
        try:
            values[str(step)] = term.weight_at(step)
        except Exception:  # a schedule may know only some steps; one that fails there says so then
            continue
    return {"schedule": name or where, "at": values}


def _plain(value: object) -> Any:
    """A value as JSON has it; else what it is, in words."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}, {str(value.dtype).removeprefix('torch.')}"
    return show(value)
