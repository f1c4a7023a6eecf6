"""Tokens as text, where there is a tokenizer; else as their ids."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import RequestError

if TYPE_CHECKING:
    from .kept import KeptStep

__all__ = ["Decode", "decoder", "place_of", "text_around", "texts_of"]

Decode = Callable[[Sequence[int]], str]
BYTES = "bytes"
_BEFORE, _AFTER = 24, 8


def decoder(tokenizer: str | None) -> Decode | None:
    """A function from token ids to text.

    Args:
        tokenizer: ``"bytes"``, for the sandbox's and others whose tokens are bytes, or what
            ``transformers.AutoTokenizer.from_pretrained`` takes: a directory, or a model's name.

    Raises:
        RequestError: it cannot be had.
    """
    if tokenizer is None:
        return None
    if tokenizer == BYTES:
        return _bytes
    try:
        from transformers import AutoTokenizer

        loaded: Any = AutoTokenizer.from_pretrained(tokenizer)
    except Exception as error:
        raise RequestError(f'the tokenizer "{tokenizer}" cannot be had: {error}') from error
    return lambda ids: str(loaded.decode(list(ids)))


def _bytes(ids: Sequence[int]) -> str:
    """UTF-8; a byte that is no part of it as ``\\xff``, an id that is no byte as ``<256>``."""
    return "".join(
        bytes(run).decode("utf-8", "backslashreplace")
        if is_byte
        else "".join(f"<{i}>" for i in run)
        for is_byte, run in itertools.groupby(ids, lambda i: 0 <= i < 0x100)
    )


def texts_of(ids: Sequence[int], decode: Decode | None) -> list[str]:
    """Each token by itself."""
    return [str(i) if decode is None else decode([i]) for i in ids]


def place_of(error: Mapping[str, Any], step: KeptStep, decode: Decode | None = None) -> str:
    """Where an error was that has a ``datum`` and a ``token``, with the text around it."""
    datum, token = error["datum"], error["token"]
    text = text_around(step, datum, token, decode)
    place = f"datum {datum}, token {token[0] if len(token) == 1 else token}"
    return f"{place}: {text}" if text else place


def text_around(
    step: KeptStep, datum: int, token: Sequence[int], decode: Decode | None = None
) -> str | None:
    """The target token at ``token`` of a datum, between «», and the text that it stands in.

    Ids, with spaces between them, where there is no tokenizer; None where the datum has no tokens.
    """
    targets = _array(step.data[datum], "target_tokens")
    given = _model_input(step.data[datum])
    if targets is None or not token:
        return None
    at = token[0]
    row = targets[at]
    target = int(row[token[1]] if len(token) > 1 else row)
    before = given[: at + 1] if given else []
    behind = targets[at + 1 : at + 1 + _AFTER]
    after = [int(t) for t in (behind if targets.ndim == 1 else behind[:, 0])]
    start = max(0, len(before) - _BEFORE)
    space = " " if decode is None else ""
    spelled = decode or (lambda ids: " ".join(map(str, ids)))
    head, mark, tail = (spelled(ids) for ids in (before[start:], [target], after))
    text = f"{'…' if start else ''}{head}{space}«{mark}»{space}{tail}"
    text += "…" if at + 1 + _AFTER < len(targets) else ""
    return text.replace("\n", "\\n").strip()


def _model_input(datum: Any) -> list[int]:
    """The tokens of a datum's model input; none where it is not text alone."""
    try:
        return [int(token) for token in datum.model_input.to_ints()]
    except (AttributeError, ValueError, TypeError):
        return []


def _array(datum: Any, key: str) -> Any:
    value = getattr(datum, "loss_fn_inputs", {}).get(key)
    if value is None:
        return None
    return value.to_numpy() if hasattr(value, "to_numpy") else value
