"""What a term is: an equation over tensors of one shape. The library does the rest.

A term says how far one of its summands looks (its *scope*) and which arrays of the datums it
reads. From that follow the reading, the mask, the reduction, the metrics, and, where the
derivative is known, a gradient in one pass, without an autograd graph.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

import torch
from torch import Tensor

from ..fast_paths import fast
from ..tensors.batch import TensorBatch
from .columns import read_groups
from .given import OF_IMPORTANCE, Given, check_params
from .importance import ImportanceKind
from .in_blocks import TermInBlocks
from .lazy import lazy
from .on_batch import Evaluated, TermOnBatch
from .ranges import Positive, Range, Ranged, range_of
from .reduction import ReductionName

__all__ = ["Evaluated", "Scope", "Term", "ValueFn", "term"]

Scope = Literal["token", "sequence", "group"]
ValueFn = Callable[..., Tensor | tuple[Tensor, Mapping[str, Tensor]]]
"""``fn(logprob, *inputs, **params) -> values``, or ``-> (values, metrics)``."""

_SEEN_BY = {"token": (), "sequence": ("sequences",), "group": ("groups",)}
_OF_ALL = ("data", "logprobs", "weights", "reduction", "normalizer")
_SAMPLER = "logprobs"  # Tinker's key of them
_PLAIN = {type(None), bool, int, float, str}
_MOST_GIVEN = 64


class Term:
    """A loss function made by :func:`term`: ``(data, logprobs, **params) -> (loss, metrics)``.

    Its parameters are those of its function, the keys of its inputs under the names of the
    function's arguments, and, alike for all terms:

    - ``weights``: key of ``loss_fn_inputs`` with the weight of every token ([T] or [T,K]).
      ``"auto"``: the datum's ``weights``, else its ``mask``, else the tokens that were sampled
      according to its ``logprobs`` and ``advantages``, else 1. None: 1. A token of weight 0 adds
      exactly 0 to value and gradient, whatever it holds, nan and infinity included.
    - ``reduction`` and ``normalizer``: see :class:`~.reduction.Reduction`.
    - ``importance``, ``importance_cap``, ``importance_floor`` and ``old``, of the policy terms: see
      :class:`~.importance.Importance`.

    The metrics are ``tokens``, the number of tokens with a weight, and the function's own.
    """

    __name__: str
    __qualname__: str
    __wrapped__: ValueFn

    def __init__(
        self,
        fn: ValueFn,
        scope: Scope,
        inputs: Sequence[str],
        optional: Sequence[str],
        alternatives: bool,
        importance: bool,
    ) -> None:
        functools.update_wrapper(self, fn)
        self.scope: Scope = scope
        self.alternatives = alternatives
        self._derivative: Callable[..., Tensor] | None = None
        self._given: dict[tuple[Any, ...], Given] = {}
        parameters = [*inspect.signature(fn).parameters.values()]
        _check_names(fn.__name__, scope, parameters, importance)
        positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        if len(positional) != 1 + len(inputs) + len(optional):
            raise TypeError(
                f"the term {fn.__name__} takes {len(positional)} positional arguments "
                f"({', '.join(positional)}); expected the logprobs, then one for each of its "
                f"inputs ({', '.join([*inputs, *optional]) or 'it has none'})"
            )
        self.inputs: dict[str, str] = dict(zip(positional[1:], inputs, strict=False))
        self.optional: dict[str, str] = dict(
            zip(positional[1 + len(inputs) :], optional, strict=True)
        )
        names = [*self.inputs]
        self.has_importance = importance
        self.ratio = next((i for i, key in enumerate(inputs) if key == _SAMPLER), None)
        self.sampler = "sampler" if self.ratio is None else names[self.ratio]
        hints = _hints(fn) | {"reduction": ReductionName}
        if importance:
            hints |= {
                "importance": ImportanceKind,
                "importance_cap": Positive,
                "importance_floor": Annotated[float, Range(at_least=0, below="importance_cap")],
            }
        self.choices: dict[str, tuple[Any, ...]] = {
            name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal
        }
        self.ranges: dict[str, Ranged] = {
            name: ranged for name, hint in hints.items() if (ranged := range_of(hint)) is not None
        }
        own = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _SEEN_BY[scope]]
        self.own = tuple(p.name for p in own)
        self.__signature__ = inspect.Signature(_public_parameters(self, own))

    def derivative(self, fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Give the closed form of ``∂value/∂logprob``, of the logprobs' shape. A decorator.

        ``fn`` takes what the term's function takes. In scope ``token`` it differentiates the
        value of that token (of a position, where alternatives have one value); in the other
        scopes the values' sum, and there the tokens' weights are part of it, since they are part
        of ``sequences.sum`` and ``mean``. It must agree with what autograd makes of the function.
        """
        value, closed = inspect.signature(self.__wrapped__), inspect.signature(fn)
        if [*value.parameters] != [*closed.parameters]:
            raise TypeError(
                f"the derivative of the term {self.__name__} takes {closed}, but its function "
                f"takes {value}"
            )
        self._derivative = fn
        return fn

    def called_through(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Term:
        """The same term, whose function, and derivative, are called as ``wrap`` has it."""
        same = object.__new__(Term)
        same.__dict__.update(self.__dict__, _given={}, __wrapped__=wrap(self.__wrapped__))
        if self._derivative is not None:
            same._derivative = wrap(self._derivative)
        return same

    @property
    def has_derivative(self) -> bool:
        """Whether the gradient is known in closed form, so that no autograd graph is needed."""
        return self._derivative is not None

    def __call__(
        self, data: Sequence[Any], logprobs: Sequence[Tensor], **params: Any
    ) -> tuple[Tensor, dict[str, float]]:
        """Differentiated by autograd: as often as you like, and under ``torch.func``."""
        return self.evaluate_flat(data, TensorBatch.from_tensors(logprobs), **params)

    def evaluate_flat(
        self,
        data: Sequence[Any],
        logprobs: TensorBatch,
        totals: Mapping[str, float] | None = None,
        /,
        **params: Any,
    ) -> tuple[Tensor, dict[str, float]]:
        """The same over the batch as one buffer, with the ``totals`` of a step that is split."""
        loss, metrics, _ = TermOnBatch(self.given(params), data, logprobs, totals).reduced()
        return loss, metrics

    def value_and_gradient(
        self,
        data: Sequence[Any],
        logprobs: TensorBatch,
        *,
        totals: Mapping[str, float] | None = None,
        gradient: bool = True,
        **params: Any,
    ) -> Evaluated:
        """Loss, metrics and ``∂loss/∂logprobs`` [N], without a graph where the derivative is known.

        ``totals`` has the denominators of a whole step, of which ``data`` is a part. The gradient
        is None if the loss does not depend on the logprobs, or if it is not wanted. It may be the
        memory of an input: it is only to be read.
        """
        given = self.given(params)
        if self._derivative is not None and fast():
            with torch.no_grad():
                batch = logprobs.detached()
                term = TermOnBatch(given, data, batch, totals, graph=False)
                return term.reduced(gradient=gradient)
        with torch.enable_grad():
            leaf = logprobs.with_flat(logprobs.flat.detach().requires_grad_())
            loss, metrics, _ = TermOnBatch(given, data, leaf, totals).reduced()
            taken = None
            if gradient and loss.requires_grad:
                (taken,) = torch.autograd.grad(loss, leaf.flat, allow_unused=True)
        return Evaluated(loss.detach(), metrics, taken)

    def in_blocks(
        self,
        data: Sequence[Any],
        logprobs: TensorBatch,
        totals: Mapping[str, float] | None = None,
        /,
        **params: Any,
    ) -> TermInBlocks | None:
        """The same for a caller who asks for one block of the batch after another; None where it
        is known for a whole batch only."""
        return TermInBlocks.of(self.given(params), data, logprobs.detached(), totals)

    def contributions(
        self, data: Sequence[Any], logprobs: Sequence[Tensor] | TensorBatch, **params: Any
    ) -> list[Tensor]:
        """What every token added to the loss: a tensor a datum, whose sum over all is the loss.

        [T] or [T,K], or [T] where the alternatives of a position have one value. Of scope
        ``sequence`` it is a scalar a datum, and of scope ``group`` one for each value.
        """
        if not isinstance(logprobs, TensorBatch):
            logprobs = TensorBatch.from_tensors(logprobs)
        with torch.no_grad():
            return TermOnBatch(self.given(params), data, logprobs).contributions()

    def totals(
        self, data: Sequence[Any], logprobs: Sequence[Tensor] | TensorBatch, **params: Any
    ) -> dict[str, float]:
        """The denominators of these datums: ``tokens``, ``sequences``, and ``values`` of groups.

        They add up over the parts of a step. Of ``logprobs`` only the shapes matter.
        """
        if not isinstance(logprobs, TensorBatch):
            logprobs = TensorBatch.from_tensors(logprobs)
        with torch.no_grad():
            return dict(TermOnBatch(self.given(params), data, logprobs).totals)

    def group_sizes(self, data: Sequence[Any], **params: Any) -> dict[str, int]:
        """The number of datums in each group, by its index as text; {} unless the scope is
        ``group``."""
        if self.scope != "group":
            return {}
        ids = read_groups(params.get("group", "group"), data)
        indices, counts = torch.unique(ids, return_counts=True)
        return dict(zip(map(str, indices.tolist()), counts.tolist(), strict=True))

    def check_params(self, **params: Any) -> None:
        """Check what can be checked of parameters before there is a batch.

        Raises:
            ValueError: one has a value that it cannot have.
            TypeError: there is no such parameter.
        """
        check_params(self, params)

    def given(self, params: Mapping[str, Any]) -> Given:
        """The term with these parameters. What was given last is found again: steps repeat it."""
        key = tuple((name, type(value), value) for name, value in params.items())
        if not all(kind in _PLAIN for _, kind, _ in key):
            return Given(self, params)
        found = self._given.get(key)
        if found is None:
            if len(self._given) >= _MOST_GIVEN:
                self._given.clear()
            found = self._given[key] = Given(self, params)
        return found

    @lazy
    def defaults(self) -> dict[str, Any]:
        """The parameters' values where none are given; ``Parameter.empty`` where one must be."""
        parameters = [*self.__signature__.parameters.values()][2:]  # data and logprobs
        return {parameter.name: parameter.default for parameter in parameters}

    def __reduce__(self) -> str:
        return self.__qualname__  # pickled by name, like a function

    def __repr__(self) -> str:
        return f"<term {self.__name__}>"


def term(
    *,
    scope: Scope,
    inputs: Sequence[str] = (),
    optional: Sequence[str] = (),
    alternatives: bool = False,
    importance: bool = False,
) -> Callable[[ValueFn], Term]:
    """Make a term of a pure function of tensors of one common shape. A decorator.

        @term(scope="token", inputs=("reference_logprobs",))
        def drift(logprob, reference, *, power: float = 2.0):
            \"""How far the model is from its reference: ``|logprob - reference|^power``.\"""
            return (logprob - reference).abs() ** power

    and then ``drift(data, logprobs, power=1.0)``, or ``Regularizer(drift, 0.1)``.

    Args:
        scope: the smallest piece of a batch that one summand looks at.
            ``"token"``: ``fn(logprob, *inputs, **params)`` gives one value a token.
            ``"sequence"``: it also gets ``sequences`` (:class:`~.reduction.Sequences`) and gives
            one value a datum, taken for a sum over its tokens.
            ``"group"``: it also gets ``groups`` (:class:`~.groups.Groups`), read from the keys
            ``group`` and ``chosen``, and gives one value for each comparison.
        inputs: keys of ``loss_fn_inputs``, one for each argument after the first; another key is
            named by the parameter of that argument's name.
        optional: keys of further arguments, which are None unless every datum has them.
        alternatives: False: [T,K] logprobs are so many tokens, and the function sees tensors
            [N]. True (scope ``token`` only): it is called once with [N] for the datums of shape
            [T], and once with [N,K] for those of [T,K], and gives one value a position, [N].
        importance: True: it takes importance weights (see :class:`~.importance.Importance`). Where
            they are asked for, the input ``"logprobs"``, the sampler's, is what the key ``old``
            has; a term without that input compares the logprobs of now with the sampler's.

    A parameter's ``Literal`` is all that it may be, and a :class:`~.ranges.Range` in its
    annotation which numbers; both are checked when it is given.
    """
    if scope not in get_args(Scope):
        raise TypeError(f"unknown scope {scope!r}; expected one of {', '.join(get_args(Scope))}")
    if alternatives and scope != "token":
        raise TypeError(f'alternatives=True is for terms of scope "token", not "{scope}"')

    if importance and (alternatives or scope == "group"):
        raise TypeError(
            "importance=True is for terms of sampled tokens, or of sequences of them: of scope "
            '"token" without alternatives, or "sequence"'
        )
    for option, keys in (("inputs", inputs), ("optional", optional)):
        if isinstance(keys, str):
            raise TypeError(
                f"{option} is the string {keys!r}; expected a tuple of keys: ({keys!r},)"
            )

    def decorate(fn: ValueFn) -> Term:
        return Term(fn, scope, inputs, optional, alternatives, importance)

    return decorate


def _check_names(
    name: str, scope: Scope, parameters: Sequence[inspect.Parameter], importance: bool
) -> None:
    """Whether a function has the arguments that its scope gives it, and none that mean another."""
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"the term {name} takes {parameter}; name its arguments one by one")
    taken = (*_OF_ALL, "group", "chosen") if scope == "group" else _OF_ALL
    if importance:
        taken = (*taken, *OF_IMPORTANCE, "old")
    for parameter in parameters[1:]:
        if parameter.name in taken:
            raise TypeError(
                f'the argument "{parameter.name}" of the term {name} must have another name: as a '
                "parameter, it has a meaning for all terms"
            )
    keywords = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    for other, given in _SEEN_BY.items():
        for argument in given:
            if other == scope and argument not in keywords:
                raise TypeError(
                    f'the term {name} of scope "{scope}" takes no keyword argument {argument}; '
                    f"write it (…, *, {argument}, …)"
                )
            if other != scope and argument in keywords:
                raise TypeError(
                    f"the term {name} takes {argument}, which only a term of scope "
                    f'"{other}" is given; it is of scope "{scope}"'
                )


def _hints(fn: ValueFn) -> dict[str, Any]:
    """The types of a function's arguments, without those whose names mean nothing at run time."""
    hints: dict[str, Any] = {}
    for name, annotation in inspect.get_annotations(fn).items():
        one = types.SimpleNamespace(__annotations__={name: annotation})
        with contextlib.suppress(NameError):  # imported for a type checker only, say
            hints |= typing.get_type_hints(
                one, globalns=getattr(fn, "__globals__", {}), include_extras=True
            )
    return hints


def _public_parameters(made: Term, own: Sequence[inspect.Parameter]) -> list[inspect.Parameter]:
    def keyword(name: str, default: object, annotation: object) -> inspect.Parameter:
        if name in made.choices:
            allowed = ", ".join(repr(choice) for choice in made.choices[name])
            annotation = f"Literal[{allowed}]".replace("'", '"')
        elif name in made.ranges:
            annotation = str(made.ranges[name])
        kind = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(name, kind, default=default, annotation=annotation)

    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    importance = []
    if made.has_importance:
        key = "sampler" if made.ratio is None else "old"
        importance = [
            keyword("importance", "none", ""),
            keyword("importance_cap", 2.0, ""),
            keyword("importance_floor", 0.0, ""),
            keyword(key, _SAMPLER if made.ratio is None else "old_logprobs", "str"),
        ]
    return [
        inspect.Parameter("data", positional),
        inspect.Parameter("logprobs", positional),
        *(keyword(name, key, "str") for name, key in (made.inputs | made.optional).items()),
        *(keyword(p.name, p.default, p.annotation) for p in own),
        *(keyword(name, name, "str") for name in ("group", "chosen") if made.scope == "group"),
        *importance,
        keyword("weights", "auto", "str | None"),
        keyword("reduction", "token_sum", ""),
        keyword("normalizer", None, "float | None"),
    ]
