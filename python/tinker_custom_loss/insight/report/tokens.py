"""The token view: the text of some datums, each token marked by the term that pulls it hardest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

import torch
from torch import Tensor

from ...errors import RequestError
from ...terms.registry import LoadError
from ..flight import kept_steps
from ..kept import read_step
from ..recorder import Run
from ..replay import Replay, replay
from ..series import BASE
from ..tokenizing import Decode, texts_of

__all__ = ["pulls", "tokens_section"]

_STEPS, _DATUMS, _TOKENS = 2, 3, 400
_COLORS = 6


def tokens_section(run: Run, *, load: Sequence[str] = (), decode: Decode | None = None) -> str:
    """HTML about the last steps that the run kept; "" if it kept none.

    Args:
        run: whose ``steps`` are replayed, for the gradient of each term at each token.
        load: modules with terms that are not of the catalogue; one that cannot be had is left out,
            and the section says so.
        decode: from token ids to text; without it the ids are shown.
    """
    parts = []
    for file in kept_steps(run.directory)[-_STEPS:]:
        try:
            step = read_step(file)
            replayed = replay(step, load=load, term_gradients=True, drop_unknown=True)
        except (RequestError, LoadError) as error:
            parts.append(f'<p class="quiet">{escape(f"{file.name}: {error}")}</p>')
            continue
        parts.append(_step(replayed, decode))
    return f"<h3>Tokens of kept steps</h3>{''.join(parts)}" if parts else ""


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


def _step(replayed: Replay, decode: Decode | None) -> str:
    step, error = replayed.step, replayed.again.error
    head = f"step {step.step}" + "".join(f"; {change}" for change in replayed.changes)
    if error is not None:
        return f'<p class="quiet">{escape(head)}: {escape(error["message"])}</p>'
    terms = pulls(replayed)
    if not terms:
        return f'<p class="quiet">{escape(head)}: nothing in it can be computed again here</p>'
    hardest = max(float(x.abs().max()) for each in terms.values() for x in each if x.numel())
    legend = ", ".join(
        f'<span class="t{i % _COLORS}">{escape(n)}</span>' for i, n in enumerate(terms)
    )
    texts = []
    for index, datum in enumerate(step.data[:_DATUMS]):
        targets = getattr(datum, "loss_fn_inputs", {}).get("target_tokens")
        if targets is None:
            continue
        array = targets.to_numpy() if hasattr(targets, "to_numpy") else targets
        ids = [int(i) for i in (array if array.ndim == 1 else array[:, 0])][:_TOKENS]
        more = f"… {len(array) - len(ids)} more" if len(array) > len(ids) else ""
        spans = _spans(texts_of(ids, decode), {n: x[index] for n, x in terms.items()}, hardest)
        texts.append(f'<p class="tokens">{("" if decode else " ").join(spans)}{more}</p>')
    return (
        f"<p>{escape(head)}: underlined by the term that pulls hardest, the thicker the harder"
        f'</p><p class="tokens">{legend}</p>{"".join(texts)}'
    )


def _spans(texts: Sequence[str], terms: dict[str, Tensor], hardest: float) -> Iterator[str]:
    names = list(terms)
    table = torch.stack([terms[name] for name in names])
    for at, text in enumerate(texts):
        column = table[:, at]
        first = int(column.abs().argmax())
        size = float(column[first].abs()) / hardest if hardest else 0.0
        level = 0 if size == 0.0 else 1 + min(3, int(4 * size))
        title = ", ".join(f"{n} {float(v):+.3g}" for n, v in zip(names, column, strict=True))
        yield (
            f'<span class="t{first % _COLORS} p{level}" title="{escape(title, quote=True)}">'
            f"{escape(text)}</span>"
        )
