"""``python -m tinker_custom_loss doctor``: what works here, what does not, and what to do."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

__all__ = ["REQUIRED", "Finding", "examine"]

REQUIRED = {
    "cloudpickle": "3.0",
    "msgspec": "0.19",
    "numpy": "1.26",
    "rich": "13",
    "safetensors": "0.4.3",
    "tinker": "0.30",
    "torch": "2.4",
}
"""Packages and the lowest versions of them, as in pyproject.toml."""

_PYTHON = (3, 11)
_REPORT = "this installation is broken: install the package again"


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``remedy`` is what to do, None if all is well."""

    what: str
    remedy: str | None = None

    def __str__(self) -> str:
        return f"ok    {self.what}" if self.remedy is None else f"FAIL  {self.what}; {self.remedy}"


def examine(load: Sequence[str] = ()) -> Iterator[Finding]:
    """Check Python, the packages, the terms of ``load`` and a gradient, one after another.

    What builds on a package that is missing is not tried.
    """
    yield _check("Python", _python)
    sound = True
    for name, lowest in REQUIRED.items():
        finding = _check(name, partial(_package, name, lowest))
        sound = sound and finding.remedy is None
        yield finding
    if sound:
        yield _check("terms", partial(_terms, load))
        yield _check("gradient", _gradient)


def _check(what: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:
        return Finding(f"{what}: {type(error).__name__}: {error}", _REPORT)


def _python() -> Finding:
    what = f"Python {platform.python_version()} at {sys.executable}"
    if sys.version_info < _PYTHON:
        return Finding(what, "3.11 or newer is needed: choose another, or make an environment")
    return Finding(what)


def _package(name: str, lowest: str) -> Finding:
    install = f"run: {shlex.quote(sys.executable)} -m pip install '{name}>={lowest}'"
    try:
        importlib.import_module(name)
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(f"{name} is importable, but not installed", install)
    except ModuleNotFoundError as error:
        return Finding(f"{name} cannot be imported ({error})", install)
    if _comparable(version) < _comparable(lowest):
        return Finding(f"{name} {version} is older than {lowest}", install)
    return Finding(f"{name} {version}{_devices() if name == 'torch' else ''}")


def _comparable(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _devices() -> str:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f", {count} CUDA devices" if count else ", on the CPU"


def _terms(load: Sequence[str]) -> Finding:
    from ..terms.registry import LoadError, Registry

    try:
        terms = Registry(load).describe()
    except LoadError as error:
        return Finding(str(error), "correct it, or what names it; Python looks in PYTHONPATH")
    loaded = [term["name"] for term in terms if term["kind"] == "loaded"]
    return Finding(f"{len(terms)} terms" + (f", loaded: {', '.join(loaded)}" if loaded else ""))


def _gradient() -> Finding:
    """One request in MessagePack, through everything that a worker would do with it."""
    import torch

    from .. import TensorBatch
    from ..port import erlport
    from ..port.messagepack import pack, unpack
    from ..port.messages import Batch, decode_batch
    from ..port.typed import read

    logprobs = torch.tensor([-0.5, -1.5, -2.5])
    batch = TensorBatch.from_tensors([logprobs])
    request = {"op": "compute", "id": 1, "logprobs": batch, "data": None, "regularizers": []}
    base_loss = {"fn": "l2", "params": {"weights": None}}
    reply = unpack(erlport.compute(pack(request | {"base_loss": base_loss})))
    if reply.op != "result":
        return Finding(f"a request was answered with {reply.fields}", _REPORT)
    gradients = read(pack(reply.fields["gradients"]), Batch, "gradients")
    gradient, _shapes = decode_batch(gradients, reply.payload, "gradients")
    if not torch.allclose(gradient, 2 * logprobs):
        return Finding(f"the gradient of l2 is not 2 · logprobs, but {gradient}", _REPORT)
    return Finding("a round trip: the gradient of l2 is 2 · logprobs")
