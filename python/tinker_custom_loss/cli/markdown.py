"""The terms as a page of Markdown: ``docs/terms.md``, or the same of terms of your own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["page"]

_INTRODUCTION = """\
# Terms

This page is written by `python -m tinker_custom_loss terms --markdown`. With `--load my_losses`
it has yours too.

In all of them ℓ is the logprob of a target token, μ the sampler's (key `logprobs`), r the
reference's (`reference_logprobs`), A the advantage (`advantages`), `Δ = ℓ-r` and `ρ = exp(ℓ-μ)`.
A parameter that is named as an input names the key it is read from. An array may be a TensorData,
a numpy array or a tensor, of the shape of the datum's logprobs; a `[T]` array serves `[T,K]`
logprobs, and one number the whole datum.

The **scope** is how far a summand looks: `token`, `sequence` (a datum), `group` (datums with the
same integer under `group`, each `chosen` or not), or `batch` (anything: a function of `(data,
logprobs)`).

All but those of scope `batch` take:

- `weights`: the key of the tokens' weights. `"auto"` (default): the datum's `weights`, else its
  `mask`, else the tokens where its `logprobs` or `advantages` are not 0, if it has both: those that
  were sampled. Of a sampled token where both are 0 this cannot know, which the log says once where
  it may have met one; a `mask` leaves no doubt. Else 1, which is said once in the log; None: 1. A
  token of weight 0 adds exactly 0 to value and gradient, whatever it holds.
- `reduction`: `"token_sum"` (default, as in Tinker's own losses) is `Σ w·v`; `"token_mean"` is `Σ
  w·v / Σ w`; `"sequence_mean_token_mean"` is the mean over datums of each one's mean;
  `"sequence_mean_token_sum"` the mean over datums of each one's sum. For scope `group` the first
  is the sum over comparisons, and the last two are the mean.
- `normalizer`: a positive constant that the result is divided by.

The policy terms also take importance weights, for samplers whose logprobs are not quite the
trainer's. Each summand is multiplied by a weight, through which nothing is differentiated:

- `importance`: `"none"` (default); `"token_truncated"` (TIS) or `"token_masked"` (MIS), by the
  token's `exp(old-μ)`; `"sequence_truncated"` or `"sequence_masked"`, by `exp(Σ_t(old-μ))` over a
  datum's tokens with a weight. Terms of scope `sequence` take the last two.
- `old`: the key of the trainer's own logprobs at the time of sampling (`"old_logprobs"`), which
  then stand in the place of μ in ρ. A term without ρ has no `old`: its weight compares the logprobs
  of now with those under the key `sampler`.
- `importance_cap` (2): a truncated weight is at most this; a masked one is 0 above it.
- `importance_floor` (0): a masked weight is 0 below it. What is masked adds exactly 0; the
  denominators of a reduction stay what they are.

The metrics `importance_weight` and `importance_truncated` or `importance_masked` are reduced like
the values: by `token_mean` they are the mean weight, and the fraction of tokens. (Yao et al., "Your
Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025.)

All of them report `tokens`, the number of tokens with a weight. Where a gradient is said to be
that of a surrogate, it is not that of the reported value: the value is an estimate to look at, the
gradient one to train with. A term with one value a position (`kl`, `entropy`, `distill`,
`label_smoothing`, `margin`) does not repeat a `[T]` array for the K alternatives, each of which has
a number of its own.

What logprobs of target tokens cannot express is not here: a z-loss needs the logits' normalizer,
an exact entropy or KL over the vocabulary needs all of it (`[T,K]` gives that over K
alternatives), and a penalty on length has no gradient with respect to logprobs unless it is an
advantage.
"""
_COMMON = (
    "weights", "reduction", "normalizer", "importance_cap", "importance_floor", "old"
)  # fmt: skip


def page(terms: Sequence[Mapping[str, Any]]) -> str:
    """Markdown for term descriptors."""
    return "\n".join([_INTRODUCTION, *_table(terms), *(_section(term) for term in terms)])


def _table(terms: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "| term | scope | reads | in one line |"
    yield "|---|---|---|---|"
    for term in terms:
        name, inputs = term["name"], ", ".join(f"`{key}`" for key in term["inputs"])
        anchor = re.sub(r"[^\w-]", "", name.lower())
        line = " ".join(_markup(term["doc"]).partition("\n\n")[0].split()).replace("|", "\\|")
        yield f"| [`{name}`](#{anchor}) | {term['scope']} | {inputs} | {line} |"


def _section(term: Mapping[str, Any]) -> str:
    body, _, rest = _markup(term["doc"]).partition("\n\nArgs:\n")
    arguments, _, notes = rest.partition("\n\n")
    about = dict(_arguments(arguments))
    listed = [
        _parameter(param, about.get(param["name"], ""))
        for param in term["params"]
        if term["scope"] == "batch" or param["name"] not in _COMMON
    ]
    parts = [f"\n## {term['name']}", body, "\n".join(listed), notes]
    return "\n\n".join(part for part in parts if part)


def _arguments(block: str) -> Iterator[tuple[str, str]]:
    """Names and texts of a docstring's section ``Args:``."""
    for entry in re.split(r"\n(?=    \w)", block):
        name, _, text = entry.strip().partition(": ")
        yield name, " ".join(text.split())


def _parameter(param: Mapping[str, Any], about: str) -> str:
    default = "required" if param["required"] else f"default `{param['default']!r}`"
    if re.match("(float|int) ", param["type"]):  # it says which
        default = f"`{param['type']}`, {default}"
    choices = ", ".join(f"`{choice!r}`" for choice in param["choices"])
    text = f"- `{param['name']}` ({default}{f'; one of {choices}' if choices else ''})"
    return f"{text}: {about}" if about else text


def _markup(doc: str) -> str:
    return doc.replace("``", "`")
