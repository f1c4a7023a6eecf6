"""Steps that are sent in several calls: what each term divides by, known before any of them.

A mean divides by a count of the whole optimizer step, which no part of it knows. The totals hold
those counts, for each term, so that the gradients of the parts add up to that of the step.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch

from .errors import RequestError, TermError
from .regularizer import Regularizer, nearest, show
from .tensors.batch import Shape, TensorBatch
from .wording import counted

__all__ = ["add_totals", "denominators", "shapes_of_targets", "totals_of"]

_COUNTS = {
    "token": ("sequences", "tokens"),
    "sequence": ("sequences", "tokens"),
    "group": ("sequences", "tokens", "values"),
    "batch": ("sequences",),
}


def shapes_of_targets(data: Sequence[Any]) -> tuple[Shape, ...]:
    """The shapes that the logprobs of these datums will have: those of their ``target_tokens``."""
    shapes: list[Shape] = []
    for index, datum in enumerate(data):
        targets = getattr(datum, "loss_fn_inputs", {}).get("target_tokens")
        if targets is None:
            raise RequestError(
                f'datum {index} has no "target_tokens" in its loss_fn_inputs, so the shape of its '
                "logprobs is not known",
                path=f"data[{index}].loss_fn_inputs",
            )
        shape = getattr(targets, "shape", None)
        shapes.append(tuple(targets.to_numpy().shape if shape is None else shape))
    if not shapes:
        raise RequestError("the batch is empty: there are no datums", path="data")
    return tuple(shapes)


def totals_of(
    terms: Sequence[Regularizer], data: Sequence[Any], shapes: tuple[Shape, ...]
) -> dict[str, dict[str, Any]]:
    """The totals of each term over these datums, by its name."""
    size = sum(math.prod(shape) for shape in shapes)
    # Any numbers will do for logprobs: only how many values there are counts.
    batch = TensorBatch(torch.full((size,), -1.0, device="cpu"), shapes)
    return {term.name: _counted(term, data, batch) for term in terms}


def add_totals(first: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The totals of a step from those of its parts, made by one composer where each part is read.

    Groups are told apart by their index: the same index in two parts is one group.

    Raises:
        RequestError: they are of different terms.
    """
    _check_form(first)
    added = {name: dict(entry) for name, entry in first.items()}
    for other in others:
        _check_form(other)
        scopes = [{name: entry["scope"] for name, entry in x.items()} for x in (first, other)]
        if scopes[0] != scopes[1]:
            raise RequestError(
                f"these totals are of different terms, and cannot be added: {show(scopes[0])} and "
                f"{show(scopes[1])}",
                path="totals",
            )
        for name, entry in other.items():
            _add(added[name], entry)
    return added


def denominators(
    terms: Sequence[Regularizer],
    data: Sequence[Any],
    shapes: tuple[Shape, ...],
    totals: Mapping[str, Any],
) -> dict[str, Mapping[str, float]]:
    """What each term divides by where ``data`` are a part of the step with these totals; {} where
    they are the whole of it.

    Raises:
        RequestError: the totals are not of a step with these datums, or it cannot be split so.
    """
    _check_form(totals)
    names = [term.name for term in terms]
    for name in totals:
        if name not in names:
            _refuse(f'totals are given for a term "{name}"; {nearest(name, names)}')
    for term in terms:
        if term.name not in totals:
            _refuse(f"there are no totals for {term.title}; {nearest(term.name, [*totals])}")
        if totals[term.name]["scope"] != _scope(term):
            _refuse(
                f'the totals for {term.title} are of a term of scope "{totals[term.name]["scope"]}"'
                f', but its scope is "{_scope(term)}"'
            )
    counts = {name: int(totals[name]["sequences"]) for name in names}
    if len({*counts.values()}) > 1:
        _refuse(f"the terms have totals over different numbers of datums: {show(counts)}")
    of_step, here = counts[names[0]], len(data)
    if here > of_step:
        step = counted(of_step, "datum")
        _refuse(f"the totals are of a step with {step}, but this call alone has {here}")
    own: dict[str, dict[str, Any]] = {}
    for term in terms:
        if here < of_step:
            _check_part(term, data, totals[term.name], here, of_step)
        own |= totals_of([term], data, shapes)
        _check_counts(term, own[term.name], totals[term.name], whole=here == of_step)
    if here == of_step:
        return {}
    return {
        name: {count: float(totals[name][count]) for count in _COUNTS[totals[name]["scope"]]}
        for name in names
    }


def _check_part(
    term: Regularizer, data: Sequence[Any], totals: Mapping[str, Any], here: int, of_step: int
) -> None:
    scope = _scope(term)
    if scope == "batch":
        _refuse(
            f"{term.title} may look at the whole batch, so its step cannot be split: this call has "
            f"{here} of the step's {of_step} datums; send them in one call, or make the function a "
            "term of a smaller scope with @term"
        )
    if scope == "group":
        for group, size in _group_sizes(term, data).items():
            whole = totals["groups"].get(group, 0)
            if size != whole:
                _refuse(
                    f"{term.title} compares the datums of a group, but of group {group} this call "
                    f"has {size}, and the step, by its totals, {whole}; send all datums of a group "
                    "in one call, and give different groups different indices"
                )


def _check_counts(
    term: Regularizer, own: Mapping[str, Any], totals: Mapping[str, Any], *, whole: bool
) -> None:
    """Refuse totals that cannot be of these datums and others."""
    if whole:
        for count, value in own.items():
            same = value == totals[count]
            if count == "tokens":
                same = math.isclose(value, totals[count], rel_tol=1e-6, abs_tol=1e-6)
            if not same:
                _refuse(
                    f"the totals are of as many datums as there are, but of others: for "
                    f'{term.title}, "{count}" is {show(value)} here and {show(totals[count])} there'
                )
    # Elsewhere weights may have any sign.
    elif term.params.get("reduction") == "token_mean" and own["tokens"] > totals["tokens"] * (
        1 + 1e-6
    ):
        _refuse(
            f"the totals are not of a step with these datums: for {term.title} it has "
            f"{totals['tokens']:g} tokens, but there are {own['tokens']:g} in this call alone"
        )


def _counted(term: Regularizer, data: Sequence[Any], batch: TensorBatch) -> dict[str, Any]:
    fn: Any = term.fn
    scope = _scope(term)
    entry = {"scope": scope, "sequences": len(data)}
    if scope == "batch":
        return entry
    try:
        own = fn.totals(data, batch, **term.params)
    except Exception as error:
        raise TermError.from_exception(term.name, error) from error
    entry["tokens"] = own["tokens"]
    if scope == "group":
        entry |= {"values": int(own["values"]), "groups": _group_sizes(term, data)}
    return entry


def _group_sizes(term: Regularizer, data: Sequence[Any]) -> dict[str, int]:
    fn: Any = term.fn
    try:
        sizes: dict[str, int] = fn.group_sizes(data, **term.params)
    except Exception as error:
        raise TermError.from_exception(term.name, error) from error
    return sizes


def _scope(term: Regularizer) -> str:
    """How far a term looks; of what was not written with ``@term`` nothing is known."""
    fn: Any = term.fn
    return str(fn.scope) if hasattr(fn, "group_sizes") else "batch"


def _add(entry: dict[str, Any], other: Mapping[str, Any]) -> None:
    for count in _COUNTS[entry["scope"]]:
        entry[count] += other[count]
    if entry["scope"] == "group":
        groups = dict(entry["groups"])
        for group, size in other["groups"].items():
            groups[group] = groups.get(group, 0) + size
        entry["groups"] = groups


def _check_form(totals: object) -> None:
    """Whether these are totals at all: they may have come from anywhere."""
    if not isinstance(totals, Mapping) or not totals:
        _refuse(f"totals must be what Composer.totals(data) gives, got {show(totals)}")
    for name, entry in totals.items():
        scope = entry.get("scope") if isinstance(entry, Mapping) else None
        if scope not in _COUNTS:
            _refuse(f'the totals for "{name}" have no scope; they are {show(entry)}')
        for count in _COUNTS[scope]:
            value = entry.get(count)
            number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or (count != "tokens" and value < 0):
                _refuse(f'the totals for "{name}" have no number of {count}, but {show(value)}')
        if scope == "group" and not isinstance(entry.get("groups"), Mapping):
            _refuse(f'the totals for "{name}" do not say how many datums each group has')


def _refuse(what: str) -> NoReturn:
    raise RequestError(what, path="totals")
