"""What a name from outside may mean: the built-in terms, and what the user loaded at start-up.

A name is looked up here and nowhere else. No module is ever imported because a name arrived.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from ..errors import CustomLossError, RequestError
from ..regularizer import is_coroutine_function, nearest
from . import CATALOGUE, Term

__all__ = ["LoadError", "Registry", "load_module"]


class LoadError(CustomLossError):
    """A module or file that was to be loaded cannot be.

    ``error_type`` and ``traceback`` are those of what it raised, if it raised.
    """

    kind: ClassVar[str] = "startup"

    def __init__(
        self, message: str, *, error_type: str | None = None, traceback: str | None = None
    ) -> None:
        super().__init__(message)
        self.error_type = error_type
        self.traceback = traceback


class Registry:
    """The terms that may be named: ``"l2"`` if built in, ``"my_losses:topology"`` if loaded.

    Args:
        load: module names (``"my_losses"``, ``"package.losses"``), or paths of ``.py`` files, whose
            module name is then the file's stem. A module offers what its ``__all__`` lists, or
            else the public functions and callable objects that it defines, as far as they can
            be called as ``fn(data, logprobs)``. Classes are not terms.

    Raises:
        LoadError: a module or file cannot be imported, or offers nothing.
    """

    def __init__(self, load: Sequence[str] = ()) -> None:
        self._terms: dict[str, Callable[..., Any]] = dict(CATALOGUE)
        self._modules: dict[str, ModuleType] = {}
        for target in load:
            module = load_module(target)
            if self._modules.setdefault(module.__name__, module) is not module:
                raise LoadError(f'"{target}" and another file are both named "{module.__name__}"')
            offered = dict(_offered(module, target))
            if not offered:
                raise LoadError(
                    f'"{target}" offers no term: it defines no public function that can be called '
                    "as fn(data, logprobs)"
                )
            self._terms |= {f"{module.__name__}:{name}": fn for name, fn in offered.items()}

    def resolve(self, name: str) -> Callable[..., Any]:
        """The function of a name.

        Raises:
            RequestError: there is none; the message lists those that there are, nearest first.
        """
        fn = self._terms.get(name)
        if fn is None:
            raise RequestError(
                f'there is no term "{name}"{self._why_not(name)}; {nearest(name, [*self._terms])}'
            )
        return fn

    def describe(self) -> list[dict[str, Any]]:
        """The term descriptors of docs/protocol.md, built-in ones first."""
        return [_describe(name, fn) for name, fn in self._terms.items()]

    def _why_not(self, name: str) -> str:
        module_name, colon, function = name.partition(":")
        if not colon:
            return ""
        module = self._modules.get(module_name)
        if module is None:
            return f': "{module_name}" was not loaded at start-up'
        found = vars(module).get(function)
        if found is None:
            return f': "{module_name}" has no "{function}"'
        if inspect.isclass(found):
            return ": it is a class; a term is a function or a callable object"
        if callable(found) and not _takes_data_and_logprobs(found):
            signature = inspect.signature(found)
            return f": it cannot be called as fn(data, logprobs); its signature is {signature}"
        return f': "{module_name}" does not offer it: it is private, imported or not in __all__'


def load_module(target: str) -> ModuleType:
    """Import a module, or a ``.py`` file under the name of its stem.

    Raises:
        LoadError: it cannot be imported.
    """
    path = Path(target)
    search_path = [*sys.path]
    name = path.stem if path.suffix == ".py" else target
    if path.suffix == ".py":
        _make_importable(path, name)
    try:
        return importlib.import_module(name)
    except BaseException as error:  # a module that calls sys.exit is a module that fails
        sys.path[:] = search_path
        kind = type(error).__name__
        raise LoadError(
            f'"{target}" cannot be loaded: {kind}: {error}',
            error_type=kind,
            traceback=_traceback_of(error),
        ) from error


def _make_importable(path: Path, name: str) -> None:
    """Have ``import name`` mean this file: here, in its neighbours, in a process that runs terms.

    The file's directory goes to the end of the path, so that nothing else changes its meaning.
    """
    path = path.resolve()
    if not path.is_file():
        raise LoadError(f'"{path}" cannot be loaded: there is no such file')
    if not name.isidentifier():
        raise LoadError(f'"{path}" cannot be loaded: "{name}" cannot be the name of a module')
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        sys.path.append(str(path.parent))
        importlib.invalidate_caches()
    spec = sys.modules[name].__spec__ if name in sys.modules else importlib.util.find_spec(name)
    origin = spec and spec.origin
    if not origin or Path(origin).resolve() != path:
        raise LoadError(
            f'"{path}" cannot be loaded: the name "{name}" belongs to another module '
            f"({origin or 'a built-in one'}); rename the file"
        )


def _traceback_of(error: BaseException) -> str:
    """The traceback from the user's first frame on, without those of the import system."""
    frames = error.__traceback__
    while frames and (
        frames.tb_frame.f_code.co_filename in (__file__, importlib.__file__)
        or frames.tb_frame.f_code.co_filename.startswith("<frozen importlib")
    ):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))


def _offered(module: ModuleType, target: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    listed = getattr(module, "__all__", None)
    for name in listed if listed is not None else vars(module):
        value = vars(module).get(name)
        if value is None and listed is not None:
            raise LoadError(f'"{target}" lists "{name}" in __all__, but does not define it')
        if inspect.isclass(value) or not callable(value) or name.startswith("_"):
            continue
        home = getattr(value, "__module__", None)
        if (listed is not None or home == module.__name__) and _takes_data_and_logprobs(value):
            yield name, value


def _takes_data_and_logprobs(fn: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return True  # a builtin without a signature: the call will tell
    room = 0
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            return True
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            room += 1
    return room >= 2


def _describe(name: str, fn: Callable[..., Any]) -> dict[str, Any]:
    return {
        "name": name,
        "kind": "loaded" if ":" in name else "builtin",
        "async": is_coroutine_function(fn),
        "doc": inspect.getdoc(fn) or "",
        "scope": fn.scope if isinstance(fn, Term) else "batch",
        "inputs": [*fn.inputs.values()] if isinstance(fn, Term) else [],
        "params": list(_params(fn)),
    }


def _params(fn: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """The keyword arguments that a request may give."""
    try:
        parameters = [*inspect.signature(fn).parameters.values()]
    except (TypeError, ValueError):
        return
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    given = [p for p in parameters if p.kind in positional][:2]  # data and logprobs
    for parameter in parameters:
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if not named or parameter in given:
            continue
        required = parameter.default is parameter.empty
        annotated = parameter.annotation is not parameter.empty
        yield {
            "name": parameter.name,
            "required": required,
            "default": None if required else _plain(parameter.default),
            "type": inspect.formatannotation(parameter.annotation).strip("'") if annotated else "",
            "choices": [*fn.choices.get(parameter.name, ())] if isinstance(fn, Term) else [],
        }


def _plain(value: object) -> Any:
    """A default as a value that MessagePack has, else its repr."""
    if value is None or type(value) in (bool, float, str):
        return value
    if type(value) is int and -(2**63) <= value < 2**64:
        return value
    if type(value) in (list, tuple):
        return [_plain(inner) for inner in value]  # type: ignore[attr-defined]
    if type(value) is dict and all(type(key) is str for key in value):
        return {key: _plain(inner) for key, inner in value.items()}
    return repr(value)
