"""What a run's numbers say is wrong with it, in sentences.

A finding is about the last steps that were recorded, and says which, how often and how much. A run
in which nothing is odd has none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..record import flatten
from .series import BASE, History, TermSeries

__all__ = ["Finding", "diagnose", "findings"]

_ENOUGH = 5
"""Steps below which nothing is said of a trend."""
_GROWTH = 20
_DOMINANT = 0.9
_CONFLICT = -0.2
_PERSISTENT = 0.8


@dataclass(frozen=True)
class Finding:
    """One oddity.

    Attributes:
        kind: a word for programs, such as ``"zero_gradient"``.
        term: the term that it is about; None if it is about the run.
        message: a sentence with the numbers.
        advice: what to try.
    """

    kind: str
    term: str | None
    message: str
    advice: str

    def __str__(self) -> str:
        return f"{self.message}; {self.advice}"


def diagnose(
    records: Iterable[Mapping[str, Any]],
    *,
    prefix: str = "",
    composition: Mapping[str, Any] | None = None,
) -> list[Finding]:
    """Find what is odd in the records of consecutive steps.

    Args:
        records: the nested records, or their flat forms, as :func:`read_run` gives them; the last
            512 are judged.
        prefix: the ``prefix`` that :func:`~tinker_custom_loss.flatten` was given.
        composition: what :meth:`Composer.describe` gives, and ``config.json`` has of a run, from
            which it is known which weights are schedules.
    """
    history = History(prefix, composition)
    for step, record in enumerate(records):
        history.add(flatten(record), step)
    return findings(history)


def findings(history: History) -> list[Finding]:
    """What is odd in a history, term by term."""
    return [finding for rule in _RULES for finding in rule(history)]


def _zero_gradient(history: History) -> Iterator[Finding]:
    for name, term in history.terms.items():
        if not term.last:
            continue  # it has no part in the step any more
        zeros = _trailing(
            term, lambda row: row.get("grad_norm") == 0.0 and row.get("weight", 1.0) != 0.0
        )
        if zeros >= _ENOUGH:
            yield Finding(
                "zero_gradient",
                name,
                f'the gradient of "{name}" was exactly 0 in the last {zeros} steps, so it trains '
                "nothing",
                "see whether it computes its loss from the logprobs, without .detach() or .item(), "
                "and whether its mask leaves any token",
            )


def _skipped(history: History) -> Iterator[Finding]:
    for name, term in history.terms.items():
        skipped = sum(1 for row in term.rows if row.get("skipped"))
        if skipped:
            yield Finding(
                "skipped",
                name,
                f'"{name}" was skipped in {skipped} of {len(term.taken)} steps',
                'see its "error" in the record of such a step',
            )


def _zeroed(history: History) -> Iterator[Finding]:
    for name, term in history.terms.items():
        counts = [int(row.get("non_finite_zeroed", 0)) for row in term.taken]
        steps = sum(1 for count in counts if count)
        if steps:
            yield Finding(
                "non_finite",
                name,
                f'"{name}" gave nan or infinity, {sum(counts)} values that were zeroed in {steps} '
                f"of {len(counts)} steps",
                'set its on_non_finite to "raise" to see at which datum and token',
            )


def _dominant(history: History) -> Iterator[Finding]:
    for name, term in history.terms.items():
        if name == BASE:
            continue  # it is what the others regularize
        shares = [
            share
            for index in range(len(term.rows))
            if (share := _gradient_share(history, name, index)) is not None
        ]
        above = sum(1 for share in shares if share > _DOMINANT)
        if len(shares) >= _ENOUGH and above >= _PERSISTENT * len(shares):
            mean = sum(shares) / len(shares)
            yield Finding(
                "dominant",
                name,
                f'"{name}" was {mean:.0%} of all weighted gradient norms, above {_DOMINANT:.0%} in '
                f"{above} of {len(shares)} steps: the other terms hardly move the model",
                "lower its weight, or raise theirs",
            )


def _conflict(history: History) -> Iterator[Finding]:
    for name, term in history.terms.items():
        cosines = [row["cosine_to_total"] for row in term.rows if "cosine_to_total" in row]
        against = sum(1 for cosine in cosines if cosine < _CONFLICT)
        if len(cosines) >= _ENOUGH and against >= _PERSISTENT * len(cosines):
            mean = sum(cosines) / len(cosines)
            yield Finding(
                "conflict",
                name,
                f'"{name}" pulled against the step as a whole in {against} of {len(cosines)} '
                f"steps (mean cosine {mean:+.2f}, of gradients with respect to the logprobs)",
                "see whether that is wanted, as of a constraint; else lower its weight",
            )


def _stuck_schedule(history: History) -> Iterator[Finding]:
    """The clock stands, or a schedule has not left its first value although the clock moves."""
    steps = list(history.schedule_steps)
    if len(steps) < _GROWTH:  # the minibatches of one step have one number
        return
    if len(set(steps)) == 1:
        named = [name for name in history.schedules if name in history.terms]
        of_what = " and ".join(f'"{name}"' for name in named)
        yield Finding(
            "stuck_schedule",
            named[0] if len(named) == 1 else None,
            f"{len(steps)} steps were all computed as step {steps[0]:g}, so "
            + (f"the weight of {of_what}" if named else "every schedule of a weight")
            + " stands still",
            "give step=, or use the wrapped training client, which counts those of optim_step",
        )
        return
    for name, at in history.schedules.items():
        rows = history.terms[name].rows if name in history.terms else []
        weights = [row["weight"] for row in rows if "weight" in row]
        if len(weights) >= _GROWTH and len(set(weights)) == 1 and weights[0] == at.get("0"):
            yield Finding(
                "stuck_schedule",
                name,
                f'the schedule of "{name}" is still at its start: it gave {weights[0]:.4g} in each '
                f"of the last {len(weights)} steps, {steps[-len(weights)]:g} to {steps[-1]:g}",
                "see whether it counts in training steps, from 0, as it is given them",
            )


def _prompt_counted(history: History) -> Iterator[Finding]:
    """Where one term left tokens out for their weights, and another counted every logprob."""
    for name, term in history.terms.items():
        counted = _tokens(term)
        for other, masked in history.terms.items():
            rows = list(zip(counted, _tokens(masked), history.logprob_counts, strict=False))
            known = [(c, m, n) for c, m, n in rows if c is not None and m is not None]
            apart = [(c, m, n) for c, m, n in known if m < c == n]
            # Terms of alternatives count positions, of which there is a whole number in a batch.
            if len(apart) < _ENOUGH or all(n % m == 0 for _, m, n in apart if m):
                continue
            yield Finding(
                "prompt_counted",
                name,
                f'"{name}" counted every logprob in {len(apart)} of {len(known)} steps, '
                f'{apart[-1][0]:g} in the last, of which "{other}" left out '
                f"{apart[-1][0] - apart[-1][1]:g} that the datums give a weight of 0, such as "
                "those of a prompt",
                'let it read the datums\' weights or mask (weights="auto"), unless it is meant to '
                "train on those tokens too",
            )
            break


def _tokens(term: TermSeries) -> list[float | None]:
    return [row.get("custom/tokens") for row in term.rows]


def _growing(history: History) -> Iterator[Finding]:
    for name, term in history.terms.items():
        values = list(term.values)[-_GROWTH:]
        finite = all(math.isfinite(value) for value in values)
        rises = sum(1 for a, b in itertools.pairwise(values) if b > a)
        weight = term.get("weight")
        if len(values) == _GROWTH and finite and rises == _GROWTH - 1 and (weight or 1.0) > 0:
            yield Finding(
                "growing",
                name,
                f'"{name}" rose in each of the last {_GROWTH} steps, from {values[0]:.4g} to '
                f"{values[-1]:.4g}",
                "raise its weight if it is to be held down",
            )


_RULES = (
    _zero_gradient,
    _skipped,
    _zeroed,
    _dominant,
    _conflict,
    _stuck_schedule,
    _prompt_counted,
    _growing,
)


def _trailing(term: TermSeries, holds: Any) -> int:
    """For how many of the last steps, without a break, a row satisfies ``holds``."""
    count = 0
    for row in reversed(term.taken):
        if not holds(row):
            break
        count += 1
    return count


def _gradient_share(history: History, name: str, index: int) -> float | None:
    """Of the norms of the weighted gradients at that step; None where there is nothing to share
    them with, or one is not known, as that of a loss which the server computes."""
    norms = {}
    for other, term in history.terms.items():
        row = term.rows[index]
        if not row or row.get("skipped"):
            continue
        norm = row.get("grad_norm" if other == BASE else "grad_norm_weighted")
        if norm is None or not math.isfinite(norm):
            return None
        norms[other] = norm
    whole = sum(norms.values())
    return norms[name] / whole if name in norms and len(norms) > 1 and whole else None
