"""The token view: the text of some datums, each token marked by the term that pulls it hardest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import RequestError
from ...terms.registry import LoadError
from ..kept import KeptStep, read_step
from ..replaying import Replay, replay
from ..run import Run, kept_steps
from ..series import BASE
from ..tokenizing import Decode, place_of, texts_of
from .svg import COLORS

__all__ = ["Texts", "pulls", "tokens_section"]

_STEPS, _DATUMS, _TOKENS = 2, 3, 300
_LEVELS = 4


@dataclass(frozen=True)
class Texts:
    """The section of one run; ``pulls`` has what its script shows: of each of its blocks the terms,
    and a number of each at every token, one after another."""

    html: str = ""
    pulls: Sequence[Mapping[str, Any]] = ()


def tokens_section(
    run: Run,
    colors: Mapping[str, int],
    *,
    load: Sequence[str] = (),
    decode: Decode | None = None,
) -> Texts:
    """About the last steps that the run kept; empty if it kept none.

    Args:
        run: whose ``steps`` are replayed, for the gradient of each term at each token.
        colors: of the terms, as in the charts.
        load: modules with terms that are not of the catalogue; one that cannot be had is left out,
            and the section says so.
        decode: from token ids to text; without it the ids are shown.
    """
    files = kept_steps(run.directory)
    parts, pulled = [], []
    for file in files[-_STEPS:]:
        try:
            step = read_step(file)
            replayed = replay(step, load=load, term_gradients=True, drop_unknown=True)
        except (RequestError, LoadError) as error:
            parts.append(f'<p class="quiet">{escape(f"{file.name}: {error}")}</p>')
            continue
        block = _Block(replayed, colors, decode)
        parts.append(block.html())
        pulled += block.pulled()
    if not parts:
        return Texts()
    of = f"The last {len(parts)} of {len(files)} kept steps. " if len(files) > len(parts) else ""
    return Texts(
        f"<h3>Which term pulls at which token</h3>"
        f'<p class="quiet">{of}The ground of a token is of the term whose weighted gradient is the '
        "largest there, the line under it of the regularizer whose is: the stronger, the larger. "
        "↑ is a pull to a higher probability, ↓ to a lower.</p>" + "".join(parts),
        pulled,
    )


def pulls(replayed: Replay) -> dict[str, list[Tensor]]:
    """The weighted gradient of each term at each token of each datum: [T], alternatives added up
    by their size."""
    record = replayed.again.record or {"regularizers": {}}
    found = {}
    for name, batch in (replayed.again.term_gradients or {}).items():
        weight = 1.0 if name == BASE else record["regularizers"][name]["weight"]
        found[name] = [
            weight * (x if x.ndim == 1 else x.abs().sum(1)).double() for x in batch.tensors()
        ]
    return found


class _Block:
    """One step: the texts of its first datums."""

    def __init__(self, replayed: Replay, colors: Mapping[str, int], decode: Decode | None) -> None:
        self._replayed, self._decode = replayed, decode
        self._terms = pulls(replayed)
        self._colors = {n: colors.get(n, len(colors)) % len(COLORS) for n in self._terms}
        self._step = replayed.step
        self._datums = [
            (index, ids)
            for index in range(min(_DATUMS, len(self._step.data)))
            if (ids := _targets(self._step, index))
        ]

    def html(self) -> str:
        step, error = self._step, self._replayed.again.error
        number = "a step without a number" if step.step is None else f"step {step.step}"
        head = number + "".join(f"; {change}" for change in self._replayed.changes)
        if error is not None:
            where = "" if error["datum"] is None else f"; {place_of(error, step, self._decode)}"
            return f'<p class="quiet">{escape(head)}: {escape(error["message"] + where)}</p>'
        if not self._terms or not self._datums:
            why = "nothing in it can be computed again here" if self._datums else "it has no tokens"
            return f'<p class="quiet">{escape(head)}: {why}</p>'
        if len(step.data) > _DATUMS:
            head += f"; the first {_DATUMS} of {len(step.data)} datums"
        masked = [_masked(step, index, len(ids)) for index, ids in self._datums]
        legend = "".join(
            f'<li><span class="mark c{color} p3 u{color} q3">&nbsp;</span> {escape(name)}</li>'
            for name, color in self._colors.items()
        )
        if any(any(each[:_TOKENS]) for each in masked):
            legend += '<li><span class="mark prompt">&nbsp;</span> weight 0, as a prompt has</li>'
        texts = [
            f'<p class="tokens">{self._text(index, ids, masks)}</p>'
            for (index, ids), masks in zip(self._datums, masked, strict=True)
        ]
        return (
            f'<div class="text"><p>{escape(head)}</p><ul class="legend">{legend}</ul>'
            f'{"".join(texts)}<p class="readout" aria-live="polite"></p></div>'
        )

    def pulled(self) -> list[Mapping[str, Any]]:
        if self._replayed.again.error is not None or not self._terms or not self._datums:
            return []
        columns = [self._table(index, ids).T.tolist() for index, ids in self._datums]
        numbers = [float(f"{x:.2g}") for column in columns for token in column for x in token]
        # A sum of sizes over alternatives has no direction.
        directed = all(x.ndim == 1 for x in self._step.logprobs)
        return [{"terms": [*self._terms], "pulls": numbers, "directed": directed}]

    def _text(self, index: int, ids: Sequence[int], masked: Sequence[bool]) -> str:
        names = [*self._terms]
        table = self._table(index, ids).abs()
        beside = torch.tensor([name != BASE for name in names])
        spans = []
        for at, text in enumerate(texts_of(ids[:_TOKENS], self._decode)):
            column = table[:, at]
            kinds = [
                *self._kind(column, names, self._hardest(names), "c", "p"),
                *self._kind(
                    column * beside, names, self._hardest([n for n in names if n != BASE]), "u", "q"
                ),
                *["prompt"] * masked[at],
            ]
            spans.append(f'<span class="{" ".join(kinds)}">{_visible(text)}</span>')
        more = len(ids) - _TOKENS
        tail = f'<em class="quiet"> … {more} more</em>' if more > 0 else ""
        return ("" if self._decode else " ").join(spans) + tail

    def _kind(
        self, column: Tensor, names: Sequence[str], hardest: float, color: str, strength: str
    ) -> list[str]:
        """Whose colour, and how strong: 1 to 4, of the root of the hardest pull in the step."""
        first = int(column.argmax())
        size = float(column[first]) / hardest if hardest else 0.0
        if size == 0.0:
            return []
        level = 1 + min(_LEVELS - 1, int(_LEVELS * math.sqrt(size)))
        return [f"{color}{self._colors[names[first]]}", f"{strength}{level}"]

    def _hardest(self, names: Sequence[str]) -> float:
        sizes = [float(x.abs().max()) for name in names for x in self._terms[name] if x.numel()]
        return max(sizes, default=0.0)

    def _table(self, index: int, ids: Sequence[int]) -> Tensor:
        """A row a term, a column a token that is shown."""
        return torch.stack([each[index] for each in self._terms.values()])[:, : len(ids[:_TOKENS])]


def _targets(step: KeptStep, index: int) -> list[int] | None:
    """The token of each logprob; of several alternatives the first."""
    array = _array(step, index, "target_tokens")
    if array is None:
        return None
    return [int(i) for i in (array if array.ndim == 1 else array[:, 0])]


def _masked(step: KeptStep, index: int, count: int) -> list[bool]:
    """Of each token, whether the datum gives it a weight of 0."""
    for key in ("weights", "mask"):
        array = _array(step, index, key)
        if array is not None and len(array) == count:
            return [not np.any(row) for row in array]
    return [False] * count


def _array(step: KeptStep, index: int, key: str) -> Any:
    value: Any = getattr(step.data[index], "loss_fn_inputs", {}).get(key)
    return value.to_numpy() if hasattr(value, "to_numpy") else value


def _visible(text: str) -> str:
    return escape(text).replace("\n", "↵\n")
