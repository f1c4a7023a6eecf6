"""A language model small enough to train on one CPU core while one watches.

The neural probabilistic language model of Bengio et al. (2003): the embeddings of the last eight
tokens, one hidden layer, a distribution over the next token. It has no recurrence, so a batch of
ragged texts is one matrix product without padding, and a step of a few hundred tokens takes
milliseconds.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..errors import RequestError
from ..tensors.batch import TensorBatch
from .examples import VOCABULARY
from .losses import CROSS_ENTROPY

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from .examples import Examples
    from .losses import Loss

__all__ = ["AdamParams", "ForwardBackwardResult", "LanguageModel"]

_CONTEXT = 8
_EMBEDDING = 24
_HIDDEN = 64
_BEGINNING = 256
_NAMES = ("embedding", "hidden_weight", "hidden_bias", "output_weight", "output_bias")
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_POSITIONS_AT_ONCE = 8192  # bounds the logits held at a time to 16 MiB


@dataclass(frozen=True)
class AdamParams:
    """One AdamW step, with the names and defaults of ``tinker.AdamParams``.

    ``grad_clip_norm`` bounds the norm of the whole parameter gradient; 0 does not clip.

    :raises RequestError: a number that is not finite or out of its range.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            limit = 1.0 if name in ("beta1", "beta2") else math.inf
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not 0 <= value < limit
            ):
                below = "" if limit == math.inf else " and below 1"
                raise RequestError(
                    f"invalid {name}: expected a finite number, at least 0{below}, got {value!r}",
                    path=f"adam_params.{name}",
                )

    @classmethod
    def from_mapping(cls, params: Mapping[str, Any]) -> AdamParams:
        """From the keys of a request; a key that AdamW does not have is an error."""
        known = [field.name for field in fields(cls)]
        for name in params:
            if name not in known:
                raise RequestError(
                    f"unknown parameter {name!r} of AdamW: expected some of {', '.join(known)}",
                    path=f"adam_params.{name}",
                )
        return cls(**params)


@dataclass(frozen=True)
class ForwardBackwardResult:
    """``logprobs`` in the shapes of the target tokens, and the loss summed over the batch."""

    logprobs: TensorBatch
    loss_sum: float

    @property
    def metrics(self) -> dict[str, float]:
        return {"loss:sum": self.loss_sum}

    @property
    def nbytes(self) -> int:
        return self.logprobs.flat.nbytes


class LanguageModel:
    """Parameters, their accumulated gradient and AdamW's state; the same ``seed``, the same model.

    All arithmetic is float32. Not thread-safe: one caller at a time.

    :raises RequestError: a seed that is no integer of 64 bits.
    """

    def __init__(self, seed: int = 0) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
            raise RequestError(f"expected an integer of 64 bits, got {seed!r}", path="seed")
        generator = torch.Generator().manual_seed(seed)

        def parameter(*shape: int, fan_in: int) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float32)
            return (values / math.sqrt(fan_in)).requires_grad_()

        inputs = _CONTEXT * _EMBEDDING
        self._embedding = parameter(VOCABULARY, _EMBEDDING, fan_in=1)
        self._hidden_weight = parameter(inputs, _HIDDEN, fan_in=inputs)
        self._hidden_bias = parameter(_HIDDEN, fan_in=inputs)
        self._output_weight = parameter(_HIDDEN, VOCABULARY, fan_in=_HIDDEN)
        self._output_bias = parameter(VOCABULARY, fan_in=_HIDDEN)
        self.parameters = (
            self._embedding,
            self._hidden_weight,
            self._hidden_bias,
            self._output_weight,
            self._output_bias,
        )
        # The rates are those of each step; what is kept here are the moments.
        self._optimizer = torch.optim.AdamW(self.parameters)
        self.zero_gradients()

    def logprobs(self, examples: Examples) -> TensorBatch:
        """log p(target | the tokens up to it), attached to the graph of the parameters."""
        return _joined([logprobs for _, logprobs in self._logprob_parts(examples)], examples)

    def contexts(self, tokens: Tensor) -> Tensor:
        """What the model sees at each position of a text [T], as :meth:`logits` takes it: [T,8]."""
        return _contexts(TensorBatch(tokens, (tuple(tokens.shape),)))

    def logits(self, contexts: Tensor) -> Tensor:
        """Scores of every token as the next one, [N,512]; ``contexts`` is [N,8]."""
        hidden = torch.tanh(
            self._embedding[contexts].flatten(1) @ self._hidden_weight + self._hidden_bias
        )
        return hidden @ self._output_weight + self._output_bias

    def state(self, *, optimizer: bool) -> dict[str, Tensor]:
        """Copies of the parameters by name and, with ``optimizer``, of AdamW's moments."""
        tensors = {}
        for name, parameter in zip(_NAMES, self.parameters, strict=True):
            tensors[name] = parameter.detach().clone()
            if optimizer:
                for key, value in self._optimizer.state[parameter].items():
                    tensors[f"{name}.{key}"] = value.clone()
        return tensors

    def load(self, tensors: Mapping[str, Tensor], *, optimizer: bool) -> None:
        """Become what :meth:`state` was taken of; without ``optimizer``, AdamW starts anew.

        What has been accumulated is forgotten.
        """
        self._optimizer = torch.optim.AdamW(self.parameters)
        with torch.no_grad():
            for name, parameter in zip(_NAMES, self.parameters, strict=True):
                parameter.copy_(tensors[name])
                moments = {
                    key: tensors[f"{name}.{key}"].clone()
                    for key in _MOMENTS
                    if f"{name}.{key}" in tensors
                }
                if optimizer and moments:
                    self._optimizer.state[parameter] = moments
        self.zero_gradients()

    def frozen(self) -> LanguageModel:
        """A model of these parameters, which nobody trains."""
        copy = LanguageModel()
        copy.load(self.state(optimizer=False), optimizer=False)
        return copy

    def forward(self, examples: Examples, loss: Loss = CROSS_ENTROPY) -> ForwardBackwardResult:
        """Logprobs and loss alone; without weights the cross entropy is 0.

        :raises RequestError: the loss reads what the examples lack.
        """
        with torch.no_grad():
            logprobs = self.logprobs(examples)
        if loss.name == CROSS_ENTROPY.name and examples.weights is None:
            return _checked(ForwardBackwardResult(logprobs, 0.0))
        return _result(logprobs, examples, loss)

    def forward_backward(
        self, examples: Examples, loss: Loss = CROSS_ENTROPY
    ) -> ForwardBackwardResult:
        """Add the parameter gradient of the loss, summed over targets, to what is accumulated.

        :raises RequestError: the loss reads what the examples lack, or the model has diverged;
            nothing is accumulated then.
        """
        result, gradients = self.differentiate(examples, loss)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            cast("Tensor", parameter.grad).add_(gradient)
        return result

    def differentiate(
        self, examples: Examples, loss: Loss = CROSS_ENTROPY
    ) -> tuple[ForwardBackwardResult, list[Tensor]]:
        """What :meth:`forward_backward` would accumulate, one tensor a parameter."""
        parts, sums = [], [torch.zeros_like(parameter) for parameter in self.parameters]
        for part, logprobs in self._logprob_parts(examples):
            value = loss(logprobs, examples, part).sum()
            for total, gradient in zip(
                sums, torch.autograd.grad(value, self.parameters), strict=True
            ):
                total += gradient
            parts.append(logprobs.detach())
        return _result(_joined(parts, examples), examples, loss), sums

    def optim_step(self, params: AdamParams) -> dict[str, float]:
        """One step of AdamW on the accumulated gradient, which is zero afterwards.

        Returns the norm that the gradient had before clipping, as the service does: where clipping
        is on.
        """
        metrics = {}
        if params.grad_clip_norm > 0:
            norm = self.gradient_flat().norm()
            metrics["parameter_grad_norm"] = float(norm)
            if norm > params.grad_clip_norm:
                for parameter in self.parameters:
                    cast("Tensor", parameter.grad).mul_(params.grad_clip_norm / norm)
        (group,) = self._optimizer.param_groups
        group.update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        self._optimizer.step()
        self.zero_gradients()
        return metrics

    def zero_gradients(self) -> None:
        """Forget what has been accumulated."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)

    def parameters_flat(self) -> Tensor:
        """A copy of all parameters, [P] float32."""
        return torch.cat([p.detach().reshape(-1) for p in self.parameters])

    def gradient_flat(self) -> Tensor:
        """A copy of the accumulated gradient, [P] float32, in the order of the parameters."""
        return torch.cat([cast("Tensor", p.grad).reshape(-1) for p in self.parameters])

    def _logprob_parts(self, examples: Examples) -> Iterator[tuple[slice, Tensor]]:
        """Logprobs of the flat targets, a bounded number of positions at a time."""
        contexts = _contexts(examples.tokens)
        alternatives = _alternatives(examples.target_tokens)
        ends = alternatives.cumsum(0)
        for first in range(0, len(contexts), _POSITIONS_AT_ONCE):
            part = alternatives[first : first + _POSITIONS_AT_ONCE]
            last = first + len(part)
            targets = slice(int(ends[first] - part[0]), int(ends[last - 1]))
            logits = self.logits(contexts[first:last])
            rows = torch.arange(len(part)).repeat_interleave(part)
            chosen = logits[rows, examples.target_tokens.flat[targets]]
            yield targets, chosen - logits.logsumexp(1)[rows]


def _contexts(tokens: TensorBatch) -> Tensor:
    """[N, 8]: for each of the N positions of a batch, the tokens up to and with it."""
    sizes = torch.tensor(tokens.sizes, dtype=torch.int64)
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    positions = torch.arange(len(starts))
    window = positions[:, None] - torch.arange(_CONTEXT - 1, -1, -1)
    inside = window >= starts[:, None]
    return torch.where(inside, tokens.flat[window.clamp(min=0)], _BEGINNING)


def _alternatives(target_tokens: TensorBatch) -> Tensor:
    """[N]: how many targets each position has, 1 in a [T] and K in a [T,K]."""
    lengths = torch.tensor([shape[0] for shape in target_tokens.shapes], dtype=torch.int64)
    widths = [shape[1] if len(shape) == 2 else 1 for shape in target_tokens.shapes]
    return torch.tensor(widths, dtype=torch.int64).repeat_interleave(lengths)


def _joined(parts: list[Tensor], examples: Examples) -> TensorBatch:
    return examples.target_tokens.with_flat(torch.cat(parts) if parts else torch.empty(0))


def _result(logprobs: TensorBatch, examples: Examples, loss: Loss) -> ForwardBackwardResult:
    values = loss(logprobs.flat, examples)
    return _checked(ForwardBackwardResult(logprobs, float(values.sum())))


def _checked(result: ForwardBackwardResult) -> ForwardBackwardResult:
    if not result.logprobs.flat.isfinite().all():
        raise RequestError(
            "the model's logprobs are not finite: its training diverged; create the model anew "
            "and train with a lower learning rate"
        )
    if not math.isfinite(result.loss_sum):
        raise RequestError(
            "the loss is not finite: the model's logprobs are too far from the sampler's",
            path="data",
        )
    return result
