"""Saved states of models: safetensors with JSON in their header, in memory or in a directory."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from safetensors import safe_open
from safetensors.torch import load, save

from ..errors import RequestError
from .errors import UnknownError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Checkpoint", "Checkpoints", "expiry"]

_NAME = re.compile("[A-Za-z0-9._-]{1,100}")
_KINDS = {"weights": "training", "sampler_weights": "sampler"}
_SHORTEST_TTL, _LONGEST_TTL = 3600, 10 * 366 * 86400


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a checkpoint without its tensors; times are seconds since the epoch."""

    model_id: str
    kind: str
    name: str
    base_model: str
    lora_rank: int | None
    created: float
    expires: float | None = None
    user_metadata: dict[str, str] | None = None
    size: int = 0

    @property
    def path(self) -> str:
        return f"tinker://{self.model_id}/{self.kind}/{self.name}"

    @property
    def checkpoint_id(self) -> str:
        return f"{self.kind}/{self.name}"

    @property
    def checkpoint_type(self) -> str:
        return _KINDS[self.kind]


class Checkpoints:
    """All checkpoints of a server, by path; with a ``directory``, also those of servers before it.

    :raises RequestError: the directory cannot be made, or has a file that is no checkpoint.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._known: dict[str, Checkpoint] = {}
        self._memory: dict[str, bytes] = {}
        self._lock = threading.RLock()
        if directory is not None:
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RequestError(f"cannot make the directory: {error}", path="state") from error
            for file in sorted(directory.glob("*.safetensors"), key=os.path.getmtime):
                checkpoint = _read_header(file)
                self._known[checkpoint.path] = checkpoint

    def save(
        self, checkpoint: Checkpoint, tensors: dict[str, Tensor], *, overwrite: bool = False
    ) -> Checkpoint:
        """Write a checkpoint whole or not at all.

        :raises RequestError: its name does not do, or is taken and ``overwrite`` is off.
        """
        name = checkpoint.name
        if not _NAME.fullmatch(name):
            raise RequestError(
                f"a checkpoint's name has 1 to 100 letters, digits, '.', '_' or '-', got {name!r}",
                path="path",
            )
        with self._lock:
            self._forget_expired()
            if checkpoint.path in self._known and not overwrite:
                raise RequestError(
                    f"there is a checkpoint {checkpoint.path} already; save with overwrite=True, "
                    "or under another name",
                    path="path",
                )
            return self._write(checkpoint, tensors)

    def get(self, path: str) -> Checkpoint:
        """:raises UnknownError: there is no such checkpoint, or no more."""
        with self._lock:
            self._forget_expired()
            if path not in self._known:
                raise UnknownError(f"there is no checkpoint {path!r} here", path="path")
            return self._known[path]

    def tensors(self, path: str) -> dict[str, Tensor]:
        """:raises UnknownError: there is no such checkpoint, or no more."""
        with self._lock:
            checkpoint = self.get(path)
            if self._directory is None:
                return load(self._memory[path])
            return load(self._file(checkpoint).read_bytes())

    def delete(self, path: str) -> None:
        """:raises UnknownError: there is no such checkpoint, or no more."""
        with self._lock:
            self._remove(self.get(path))

    def set_ttl(self, path: str, ttl_seconds: object) -> None:
        """:raises RequestError: there is no such checkpoint, or the time is out of its range."""
        with self._lock:
            checkpoint, tensors = self.get(path), self.tensors(path)
            self._write(replace(checkpoint, expires=expiry(ttl_seconds)), tensors)

    def list(self, model_id: str | None = None) -> list[Checkpoint]:
        """Newest first; of one model, or all."""
        with self._lock:
            self._forget_expired()
            found = [c for c in self._known.values() if model_id in (None, c.model_id)]
        return sorted(found, key=lambda c: c.created, reverse=True)

    def _write(self, checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> Checkpoint:
        checkpoint = replace(checkpoint, size=sum(tensor.nbytes for tensor in tensors.values()))
        body = save(tensors, {"checkpoint": json.dumps(asdict(checkpoint))})
        if self._directory is None:
            self._memory[checkpoint.path] = body
        else:
            file = self._file(checkpoint)
            partial = file.with_suffix(".partial")
            with partial.open("wb") as stream:
                stream.write(body)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(file)
        self._known[checkpoint.path] = checkpoint
        return checkpoint

    def _file(self, checkpoint: Checkpoint) -> Path:
        assert self._directory is not None
        return self._directory / (quote(checkpoint.path, safe="") + ".safetensors")

    def _remove(self, checkpoint: Checkpoint) -> None:
        del self._known[checkpoint.path]
        self._memory.pop(checkpoint.path, None)
        if self._directory is not None:
            self._file(checkpoint).unlink(missing_ok=True)

    def _forget_expired(self) -> None:
        now = time.time()
        for checkpoint in list(self._known.values()):
            if checkpoint.expires is not None and checkpoint.expires <= now:
                self._remove(checkpoint)


def expiry(ttl_seconds: object) -> float | None:
    """When something ends that is to live for ``ttl_seconds``; None never ends.

    :raises RequestError: not 1 hour to 10 years.
    """
    if ttl_seconds is None:
        return None
    if not isinstance(ttl_seconds, int) or not _SHORTEST_TTL <= ttl_seconds <= _LONGEST_TTL:
        raise RequestError(
            f"expected 1 hour (3600) to 10 years, got {ttl_seconds!r}", path="ttl_seconds"
        )
    return time.time() + ttl_seconds


def _read_header(file: Path) -> Checkpoint:
    try:
        with safe_open(file, framework="pt") as opened:
            fields: dict[str, Any] = json.loads(opened.metadata()["checkpoint"])
        return Checkpoint(**fields)
    except Exception as error:
        raise RequestError(
            f"{file} is no checkpoint of a sandbox: {type(error).__name__}: {error}", path="state"
        ) from error
