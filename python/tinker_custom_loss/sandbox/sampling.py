"""Tokens drawn from the model, one after another, and what it thinks of a prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from ..errors import RequestError
from .examples import VOCABULARY

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from .model import LanguageModel

__all__ = [
    "CONTEXT_LENGTH",
    "END",
    "Sample",
    "SampleRequest",
    "SamplingParams",
    "Sequence",
    "sample",
]

END = 257
"""The token that ends a text, unless a request names other stops."""

CONTEXT_LENGTH = 32_768
"""Tokens of a prompt and what is drawn after it, together."""

_MOST_SAMPLES = 4096
_UNSCORED = -99999.0  # with token 0: an empty cell of a top-k matrix


@dataclass(frozen=True)
class SamplingParams:
    """The keys of ``tinker.SamplingParams``; ``max_tokens`` None goes on to the context's end.

    :raises RequestError: a value out of its range.
    """

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0

    def __post_init__(self) -> None:
        def check(name: str, valid: bool, expected: str) -> None:
            if not valid:
                raise RequestError(
                    f"invalid {name}: expected {expected}, got {getattr(self, name)!r}",
                    path=f"sampling_params.{name}",
                )

        check(
            "max_tokens",
            self.max_tokens is None or (_whole(self.max_tokens) and self.max_tokens >= 1),
            "an integer of at least 1",
        )
        check(
            "seed",
            self.seed is None or (_whole(self.seed) and -(2**63) <= self.seed < 2**63),
            "an integer of 64 bits",
        )
        check(
            "temperature", _number(self.temperature) and self.temperature >= 0, "a number from 0 on"
        )
        check(
            "top_k", _whole(self.top_k) and (self.top_k == -1 or self.top_k >= 1), "-1 or above 0"
        )
        check("top_p", _number(self.top_p) and 0 < self.top_p <= 1, "a number above 0, at most 1")
        stops = self.stop if isinstance(self.stop, list) else []
        check(
            "stop",
            (self.stop is None or isinstance(self.stop, str | list))
            and self.stop != ""
            and (all(_whole(s) for s in stops) or all(isinstance(s, str) and s for s in stops)),
            "a text, a list of texts or a list of tokens",
        )

    @classmethod
    def from_mapping(cls, params: Mapping[str, Any]) -> SamplingParams:
        """:raises RequestError: also for a key that it does not have."""
        known = [field.name for field in fields(cls)]
        for name in params:
            if name not in known:
                raise RequestError(
                    f"unknown sampling parameter {name!r}: expected some of {', '.join(known)}",
                    path=f"sampling_params.{name}",
                )
        return cls(**params)

    def stops(self, tokens: list[int]) -> bool:
        """Whether a text that has just got its last token ends with it."""
        if self.stop is None:
            return tokens[-1] == END
        for stop in [self.stop] if isinstance(self.stop, str) else self.stop:
            ending = list(stop.encode()) if isinstance(stop, str) else [stop]
            if tokens[-len(ending) :] == ending:
                return True
        return False


@dataclass(frozen=True)
class SampleRequest:
    """What one call of ``sample`` asks for; ``target_prompt_logprobs`` is [P-1,K], -1 where empty.

    :raises RequestError: numbers that do not fit the prompt.
    """

    prompt: Tensor
    params: SamplingParams
    num_samples: int = 1
    prompt_logprobs: bool = False
    prompt_logprobs_last_n: int | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: Tensor | None = None
    prompt_alt_tokens_k: int = 0

    def __post_init__(self) -> None:
        length = len(self.prompt)
        if length == 0:
            raise RequestError("the prompt has no token", path="prompt")
        if bool(((self.prompt < 0) | (self.prompt >= VOCABULARY)).any()):
            raise RequestError(
                f"a token of the prompt is outside the sandbox's vocabulary of {VOCABULARY}",
                path="prompt",
            )
        drawn = self.params.max_tokens or 1
        if length + drawn > CONTEXT_LENGTH:
            raise RequestError(
                f"the prompt's {length} tokens and max_tokens {drawn} exceed the context of "
                f"{CONTEXT_LENGTH}",
                path="prompt",
            )
        if not _whole(self.num_samples) or not 1 <= self.num_samples <= _MOST_SAMPLES:
            raise RequestError(
                f"expected 1 to {_MOST_SAMPLES}, got {self.num_samples!r}", path="num_samples"
            )
        for name in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k"):
            value = getattr(self, name)
            if not _whole(value) or not 0 <= value <= VOCABULARY:
                raise RequestError(f"expected 0 to {VOCABULARY}, got {value!r}", path=name)
        last = self.prompt_logprobs_last_n
        if last is not None and (not _whole(last) or not 1 <= last < length):
            raise RequestError(
                f"expected 1 to {length - 1}, got {last!r}", path="prompt_logprobs_last_n"
            )
        targets = self.target_prompt_logprobs
        if targets is not None and (targets.dim() != 2 or len(targets) != length - 1):
            raise RequestError(
                f"expected shape [{length - 1}, K], got {list(targets.shape)}",
                path="target_prompt_logprobs",
            )


@dataclass(frozen=True)
class Sequence:
    """``tokens`` [N] with the model's own ``logprobs`` [N], whatever the temperature was."""

    tokens: Tensor
    logprobs: Tensor
    stopped: bool
    topk: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Sample:
    """``prompt_logprobs`` is [P], nan where not asked for; top-k is (ids, logprobs)."""

    sequences: list[Sequence]
    prompt_logprobs: Tensor | None = None
    topk_prompt: tuple[Tensor, Tensor] | None = None
    target_prompt_logprobs: Tensor | None = None
    prompt_alt: tuple[Tensor, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        tensors = [self.prompt_logprobs, self.target_prompt_logprobs]
        for pair in (self.topk_prompt, self.prompt_alt, *(s.topk for s in self.sequences)):
            tensors.extend(pair or ())
        for each in self.sequences:
            tensors += [each.tokens, each.logprobs]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@torch.no_grad()
def sample(model: LanguageModel, request: SampleRequest, seed: int) -> Sample:
    """Draw from ``model``, which nobody trains meanwhile. ``seed`` is for requests without one."""
    params = request.params
    generator = torch.Generator().manual_seed(seed if params.seed is None else params.seed)
    contexts = model.contexts(request.prompt)
    sequences = _draw_sequences(model, contexts[-1], request, generator)
    scored = request.prompt_logprobs or request.topk_prompt_logprobs
    if not (scored or request.target_prompt_logprobs is not None or request.prompt_alt_tokens_k):
        return Sample(sequences)

    logprobs = model.logits(contexts[:-1]).log_softmax(1)  # row i is about position i + 1
    last = request.prompt_logprobs_last_n
    first = 0 if last is None else len(logprobs) - last
    prompt_logprobs = topk = targets = alternatives = None
    if request.prompt_logprobs:
        prompt_logprobs = torch.full((len(request.prompt),), math.nan)
        prompt_logprobs[1 + first :] = _of(logprobs, request.prompt[1:, None])[first:, 0]
    if k := request.topk_prompt_logprobs:
        values, ids = logprobs[first:].topk(k, dim=1)
        empty = len(request.prompt) - len(values)
        topk = (
            torch.cat([torch.zeros(empty, k, dtype=torch.int64), ids]),
            torch.cat([torch.full((empty, k), _UNSCORED), values]),
        )
    if request.target_prompt_logprobs is not None:
        asked = request.target_prompt_logprobs
        if bool((asked >= VOCABULARY).any()):
            raise RequestError("a token is outside the vocabulary", path="target_prompt_logprobs")
        targets = torch.where(asked < 0, 0.0, _of(logprobs, asked.clamp(min=0)))
    if k := request.prompt_alt_tokens_k:
        scaled = (logprobs / (params.temperature or 1e-6)).softmax(1)
        drawn = torch.multinomial(scaled, k, replacement=True, generator=generator)
        alternatives = (drawn, _of(logprobs, drawn))
    return Sample(sequences, prompt_logprobs, topk, targets, alternatives)


def _draw_sequences(
    model: LanguageModel, context: Tensor, request: SampleRequest, generator: torch.Generator
) -> list[Sequence]:
    params, count = request.params, request.num_samples
    contexts = context.repeat(count, 1)
    tokens: list[list[int]] = [[] for _ in range(count)]
    logprobs_of: list[list[float]] = [[] for _ in range(count)]
    tops: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(count)]
    open_rows = list(range(count))
    for _ in range(params.max_tokens or CONTEXT_LENGTH - len(request.prompt)):
        logprobs = model.logits(contexts).log_softmax(1)
        drawn = _draw(logprobs, params, generator)
        for row, token, logprob in zip(
            open_rows, drawn.tolist(), _of(logprobs, drawn[:, None])[:, 0].tolist(), strict=True
        ):
            tokens[row].append(token)
            logprobs_of[row].append(logprob)
        if k := request.topk_sample_logprobs:
            values, ids = logprobs.topk(k, dim=1)
            for i, row in enumerate(open_rows):
                tops[row].append((ids[i], values[i]))
        going = [i for i, row in enumerate(open_rows) if not params.stops(tokens[row])]
        contexts = torch.cat([contexts[:, 1:], drawn[:, None]], dim=1)[going]
        open_rows = [open_rows[i] for i in going]
        if not open_rows:
            break
    unfinished = set(open_rows)
    return [
        Sequence(
            torch.tensor(tokens[row], dtype=torch.int64),
            torch.tensor(logprobs_of[row], dtype=torch.float32),
            row not in unfinished,
            (torch.stack([t[0] for t in tops[row]]), torch.stack([t[1] for t in tops[row]]))
            if tops[row]
            else None,
        )
        for row in range(count)
    ]


def _draw(logprobs: Tensor, params: SamplingParams, generator: torch.Generator) -> Tensor:
    """One token a row of [S,V]."""
    if params.temperature == 0:
        return logprobs.argmax(1)
    scaled = logprobs / params.temperature
    if 0 < params.top_k < scaled.shape[1]:
        least = scaled.topk(params.top_k, dim=1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -math.inf)
    probabilities = scaled.softmax(1)
    if params.top_p < 1:
        ordered, order = probabilities.sort(dim=1, descending=True)
        beyond = ordered.cumsum(1) - ordered >= params.top_p  # the mass before a token suffices
        ordered = ordered.masked_fill(beyond, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _of(logprobs: Tensor, tokens: Tensor) -> Tensor:
    return logprobs.gather(1, tokens)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
