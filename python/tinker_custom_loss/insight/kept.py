"""One step in one file: what it was computed from, and what came of it.

A ``.safetensors`` file. Its tensors are the logprobs, the arrays of the datums, the gradient and
the states of the random generators; all else is JSON in its metadata, under ``step``. Nothing in it
is code, and reading it imports nothing that it names.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..description import describe_terms
from ..errors import CustomLossError, RequestError, TermError
from ..observer import ObservedStep
from ..regularizer import Regularizer, show
from ..tensors.batch import TensorBatch
from ..wording import counted
from .seeds import Seeds

__all__ = ["CannotKeepError", "KeptStep", "Outcome", "outcome_of", "pack_step", "read_step"]

FORMAT = 1


class CannotKeepError(CustomLossError):
    """A step is made of something that no file of this kind can hold."""


@dataclass(frozen=True)
class Outcome:
    """What came of a step: a loss, a record and a gradient a datum, or an error.

    ``error`` has ``type``, ``message``, ``term``, ``datum`` and ``token``; see
    :class:`~tinker_custom_loss.NonFiniteError` for the last two.
    """

    loss_total: float | None = None
    record: Mapping[str, Any] | None = None
    gradients: Sequence[Tensor] | None = None
    error: Mapping[str, Any] | None = None
    term_gradients: Mapping[str, TensorBatch] | None = None


@dataclass(frozen=True, repr=False)
class KeptStep:
    """A step as it was kept. ``description`` is that of :meth:`Composer.describe`; ``base_loss``
    and ``regularizers`` are its terms, with their exact params and their weights at this step."""

    path: Path
    step: int | None
    data: Sequence[Any]
    logprobs: list[Tensor]
    totals: Mapping[str, Any] | None
    description: Mapping[str, Any]
    base_loss: Mapping[str, Any] | None
    regularizers: Sequence[Mapping[str, Any]]
    outcome: Outcome
    seeds: Seeds
    threads: int
    device: str

    def __repr__(self) -> str:
        datums = counted(len(self.logprobs), "datum")
        return f"KeptStep({str(self.path)!r}, step {self.step}, {datums})"


def outcome_of(observed: ObservedStep, error: BaseException | None) -> Outcome:
    """What came of a step that was observed."""
    composition = observed.composition
    if composition is not None:
        return Outcome(
            composition.loss_total,
            composition.record,
            composition.gradients,
            term_gradients=composition.term_gradients,
        )
    token = getattr(error, "token", None)
    return Outcome(
        error={
            "type": type(error).__name__,
            "message": str(error),
            "term": getattr(error, "term", None),
            "datum": getattr(error, "datum", None),
            "token": None if token is None else list(token),
        }
    )


def pack_step(observed: ObservedStep, outcome: Outcome, seeds: Seeds) -> bytes:
    """The bytes of the file.

    Raises:
        CannotKeepError: a datum is of a kind that cannot be stored.
    """
    tensors: dict[str, Tensor] = {}
    composer, given = observed.composer, observed.logprobs
    logprobs = given.tensors() if isinstance(given, TensorBatch) else list(given)
    base = composer.base_loss
    regularizers = composer.regularizers
    told = {
        "format": FORMAT,
        "step": observed.step,
        "totals": observed.totals,
        "threads": torch.get_num_threads(),
        "device": str(logprobs[0].device),
        "description": describe_terms(base, regularizers),
        "base_loss": None if base is None else _packed_term(base, observed.step, tensors),
        "regularizers": [_packed_term(term, observed.step, tensors) for term in regularizers],
        "logprobs": _pack_column("logprobs", logprobs, tensors),
        "data": _packed_data(observed.data, tensors),
        "seeds": seeds.pack(tensors),
        "outcome": {
            "loss_total": outcome.loss_total,
            "record": outcome.record,
            "gradients": None
            if outcome.gradients is None
            else _pack_column("gradients", outcome.gradients, tensors),
            "error": outcome.error,
        },
    }
    try:
        text = json.dumps(told)
    except (TypeError, ValueError) as error:
        raise CannotKeepError(f"its totals or its record are no JSON: {error}") from None
    return safetensors.torch.save(tensors, metadata={"step": text})


def read_step(path: str | os.PathLike[str]) -> KeptStep:
    """Read a file that a :class:`~tinker_custom_loss.Recorder` kept.

    Raises:
        RequestError: there is none, or it holds something else.
    """
    file = Path(path)
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            told = json.loads((opened.metadata() or {}).get("step", "null"))
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise RequestError(f"there is no file {file}") from None
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise RequestError(f"{file} holds no step that was kept: {error}") from None
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        made = told.get("format") if isinstance(told, dict) else None
        raise RequestError(
            f"{file} holds no step that this version can read: its format is {made}, expected "
            f"{FORMAT}"
        )
    try:
        return _read(file, told, tensors)
    except (KeyError, TypeError, IndexError, ValueError, RuntimeError) as error:
        raise RequestError(
            f"{file} holds no whole step: {type(error).__name__} at {error}"
        ) from error


def _read(file: Path, told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> KeptStep:
    outcome = told["outcome"]
    gradients = outcome["gradients"]
    if gradients is not None:
        gradients = _column("gradients", gradients, tensors)
    return KeptStep(
        path=file,
        step=told["step"],
        data=_data(told["data"], tensors),
        logprobs=_column("logprobs", told["logprobs"], tensors),
        totals=told["totals"],
        description=told["description"],
        base_loss=told["base_loss"] and _term(told["base_loss"], tensors),
        regularizers=[_term(term, tensors) for term in told["regularizers"]],
        outcome=Outcome(outcome["loss_total"], outcome["record"], gradients, outcome["error"]),
        seeds=Seeds.unpack(told["seeds"], tensors),
        threads=told["threads"],
        device=told["device"],
    )


def _packed_term(term: Regularizer, step: int | None, tensors: dict[str, Tensor]) -> dict[str, Any]:
    try:
        weight: Any = term.weight_at(step)
    except (TermError, RequestError) as error:
        weight = {"unknown": str(error)}
    params = {
        key: _pack_value(f"params/{term.name}/{key}", value, tensors)
        for key, value in term.params.items()
    }
    return {"weight": weight, "params": params}


def _term(packed: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    params = {key: _value(value, tensors) for key, value in packed["params"].items()}
    return {"weight": packed["weight"], "params": params}


@dataclass(frozen=True)
class Unknown:
    """A param that could not be stored; ``what`` it was."""

    what: str


def _pack_value(where: str, value: object, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_pack_value(f"{where}/{i}", inner, tensors) for i, inner in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": _pack_value(where, list(value), tensors)}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        packed = {key: _pack_value(f"{where}/{key}", v, tensors) for key, v in value.items()}
        return {"dict": packed}
    if isinstance(value, (Tensor, np.ndarray)):
        kind = "tensor" if isinstance(value, Tensor) else "array"
        try:
            tensors[where] = torch.as_tensor(value).detach().cpu().contiguous().clone()
        except TypeError:  # an array of objects
            return {"unknown": show(value)}
        return {kind: where}
    return {"unknown": show(value)}


def _value(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(packed, list):
        return [_value(inner, tensors) for inner in packed]
    if not isinstance(packed, dict):
        return packed
    ((kind, inner),) = packed.items()
    if kind == "tuple":
        return tuple(_value(inner, tensors))
    if kind == "dict":
        return {key: _value(value, tensors) for key, value in inner.items()}
    if kind == "tensor":
        return tensors[inner]
    if kind == "array":
        return tensors[inner].numpy()
    return Unknown(inner)


def _pack_column(
    name: str, column: Sequence[Tensor | None], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """Tensors of any shapes, None where a datum has none; in one piece if their dtypes are one."""
    there = [tensor.detach().cpu() for tensor in column if tensor is not None]
    shapes = [None if tensor is None else list(tensor.shape) for tensor in column]
    dtypes = {tensor.dtype for tensor in there}
    if len(dtypes) > 1:
        for index, tensor in enumerate(there):
            tensors[f"{name}/{index}"] = tensor.contiguous().clone()
        return {"shapes": shapes, "apart": True}
    flat = torch.cat([tensor.reshape(-1) for tensor in there]) if there else torch.empty(0)
    packed: dict[str, Any] = {"shapes": shapes}
    if flat.dtype == torch.int64 and bool((flat == flat.int()).all()):
        packed["wide"] = True  # tokens fit into half of it
        flat = flat.int()
    tensors[name] = flat
    return packed


def _column(name: str, packed: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Any]:
    shapes = packed["shapes"]
    if packed.get("apart"):
        apart = iter(tensors[f"{name}/{i}"] for i in range(len(shapes) - shapes.count(None)))
        return [None if shape is None else next(apart) for shape in shapes]
    flat = tensors[name]
    if packed.get("wide"):
        flat = flat.long()
    there = [tuple(shape) for shape in shapes if shape is not None]
    parts = iter(TensorBatch(flat, tuple(there)).tensors())
    return [None if shape is None else next(parts).reshape(shape) for shape in shapes]


def _packed_data(data: Sequence[Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    datums = list(data)
    if all(datum is None for datum in datums):
        return {"kind": "none", "count": len(datums)}
    tinker = sys.modules.get("tinker")
    kind = "datums" if tinker and all(isinstance(d, tinker.Datum) for d in datums) else "inputs"
    for index, datum in enumerate(datums):
        if not isinstance(getattr(datum, "loss_fn_inputs", None), Mapping):
            raise CannotKeepError(
                f"datum {index} is {show(datum)}; only a tinker.Datum, None or an object with "
                "loss_fn_inputs can be stored"
            )
    keys = list(dict.fromkeys(key for datum in datums for key in datum.loss_fn_inputs))
    inputs = {
        key: _pack_column(
            f"inputs/{key}",
            [
                _tensor(key, d.loss_fn_inputs[key]) if key in d.loss_fn_inputs else None
                for d in datums
            ],
            tensors,
        )
        for key in keys
    }
    packed: dict[str, Any] = {"kind": kind, "count": len(datums), "inputs": inputs}
    if kind == "datums":
        chunks = [datum.model_input.chunks for datum in datums]
        plain = [len(own) == 1 and own[0].type == "encoded_text" for own in chunks]
        tokens = [
            torch.tensor(own[0].tokens, dtype=torch.int64) if is_plain else None
            for own, is_plain in zip(chunks, plain, strict=True)
        ]
        packed["tokens"] = _pack_column("tokens", tokens, tensors)
        packed["chunks"] = {
            str(index): [chunk.model_dump(mode="json") for chunk in own]
            for index, (own, is_plain) in enumerate(zip(chunks, plain, strict=True))
            if not is_plain
        }
    return packed


def _tensor(key: str, value: Any) -> Tensor:
    try:
        if hasattr(value, "to_numpy"):  # a tinker.TensorData
            value = value.to_numpy()
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CannotKeepError(f'"{key}" of a datum is no array: {error}') from None


def _data(packed: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Any]:
    count, kind = packed["count"], packed["kind"]
    if kind == "none":
        return [None] * count
    inputs: list[dict[str, Any]] = [{} for _ in range(count)]
    for key, column in packed["inputs"].items():
        for own, tensor in zip(inputs, _column(f"inputs/{key}", column, tensors), strict=True):
            if tensor is not None:
                own[key] = tensor
    if kind == "inputs":
        return [SimpleNamespace(loss_fn_inputs=own) for own in inputs]
    import tinker  # half a second

    tokens = _column("tokens", packed["tokens"], tensors)
    return [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints(ids.tolist())
            if ids is not None
            else tinker.ModelInput.model_validate({"chunks": packed["chunks"][str(index)]}),
            loss_fn_inputs={key: tinker.TensorData.from_torch(value) for key, value in own.items()},
        )
        for index, (own, ids) in enumerate(zip(inputs, tokens, strict=True))
    ]
