"""Saving, loading and sampling: what clients ask of a model's state, not of its training."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from ..errors import RequestError
from .checkpoints import Checkpoint, Checkpoints, expiry
from .errors import UnknownError
from .model import LanguageModel
from .samplers import Samplers
from .sampling_wire import parse_sample

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .trainer import Operation, Trainer, TrainingRun

__all__ = ["TOKENIZER", "State"]

TOKENIZER = str(Path(__file__).parent / "tokenizer")
"""A directory with the byte tokenizer, which the SDK's ``get_tokenizer`` loads from its path."""


class State:
    """The checkpoints and samplers of a server, and the endpoints that speak of them."""

    def __init__(self, seed: int, trainer: Trainer, directory: Path | None) -> None:
        self._seed = seed
        self._trainer = trainer
        self._checkpoints = Checkpoints(directory)
        self._samplers = Samplers(seed, trainer.futures)

    def close(self) -> None:
        """Fail the samples that wait."""
        self._samplers.close()

    # Training calls, which have a place in the order of their model

    def save(self, request: Mapping[str, Any], run: TrainingRun) -> Operation:
        """``save_weights``: parameters and optimizer under a path."""

        def operation(model: LanguageModel) -> dict[str, Any]:
            saved = self._save(request, run, "weights", model)
            return {"type": "save_weights", "path": saved.path}

        return operation

    def save_for_sampler(self, request: Mapping[str, Any], run: TrainingRun) -> Operation:
        """``save_weights_for_sampler``: under a path or, without a name, as a sampler."""

        def operation(model: LanguageModel) -> dict[str, Any]:
            if request.get("path") is not None:
                saved = self._save(request, run, "sampler_weights", model)
                return {"type": "save_weights_for_sampler", "path": saved.path}
            number = request.get("sampling_session_seq_id")
            if number is None:
                raise RequestError("expected a path or a sampling_session_seq_id", path="path")
            session_id = run.model_id.partition(":")[0]
            sampler = self._samplers.create(session_id, number, model.frozen(), None)
            return {"type": "save_weights_for_sampler", "sampling_session_id": sampler}

        return operation

    def load(self, request: Mapping[str, Any], run: TrainingRun) -> Operation:
        """``load_weights`` into a model that exists."""

        def operation(model: LanguageModel) -> dict[str, Any]:
            checkpoint, with_optimizer = self._loadable(request)
            model.load(self._checkpoints.tensors(checkpoint.path), optimizer=with_optimizer)
            return {"type": "load_weights", "path": checkpoint.path, "model_id": run.model_id}

        return operation

    def _save(
        self, request: Mapping[str, Any], run: TrainingRun, kind: str, model: LanguageModel
    ) -> Checkpoint:
        name = request.get("path")
        checkpoint = Checkpoint(
            run.model_id,
            kind,
            name if isinstance(name, str) else "",
            run.base_model,
            run.lora_rank,
            time.time(),
            expiry(request.get("ttl_seconds")),
            request.get("user_metadata"),
        )
        # Sampler weights may be saved again, as the service has no overwrite for them.
        overwrite = kind == "sampler_weights" or bool(request.get("overwrite"))
        tensors = model.state(optimizer=kind == "weights")
        return self._checkpoints.save(checkpoint, tensors, overwrite=overwrite)

    def _loadable(self, request: Mapping[str, Any]) -> tuple[Checkpoint, bool]:
        if request.get("weights_access_token"):
            raise RequestError(
                "the sandbox has one account, and no access tokens", path="weights_access_token"
            )
        checkpoint = self._checkpoints.get(str(request.get("path")))
        with_optimizer = bool(request.get("optimizer"))
        if with_optimizer and checkpoint.kind != "weights":
            raise RequestError(
                f"{checkpoint.path} was saved for a sampler, without an optimizer: load what "
                "save_state saved, or without the optimizer",
                path="path",
            )
        return checkpoint, with_optimizer

    # Other calls

    def create_from(self, request: Mapping[str, Any]) -> str:
        """``load_weights`` into a new model; the id of its request."""
        checkpoint, with_optimizer = self._loadable(request)
        model_id = self._trainer.create_model(
            request.get("session_id"),
            request.get("model_seq_id"),
            base_model=request.get("base_model") or checkpoint.base_model,
            lora_rank=checkpoint.lora_rank,
            user_metadata=request.get("user_metadata"),
            state=self._checkpoints.tensors(checkpoint.path),
            optimizer=with_optimizer,
        )
        return f"{model_id}/load_weights"

    def create_sampling_session(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """A sampler of a checkpoint, or of the model before any training."""
        self._trainer.check_session(request.get("session_id"))
        path = request.get("model_path")
        model = LanguageModel(self._seed)
        if path is not None:
            model.load(self._checkpoints.tensors(str(path)), optimizer=False)
        elif not request.get("base_model"):
            raise RequestError("expected a model_path or a base_model", path="model_path")
        number = request.get("sampling_session_seq_id")
        sampler = self._samplers.create(request.get("session_id"), number, model, path)
        return {"type": "create_sampling_session", "sampling_session_id": sampler}

    def sample(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """``asample``: the id of the request, and of every sequence that it will give."""
        parsed = parse_sample(request)
        sampler_id = request.get("sampling_session_id")
        if sampler_id is None:
            raise RequestError(
                "expected a sampling session: create one for a model_path or a base_model",
                path="sampling_session_id",
            )
        request_id = self._samplers.submit(sampler_id, request.get("seq_id"), parsed)
        return {
            "request_id": request_id,
            "sample_sequence_ids": [f"{request_id}-{i}" for i in range(parsed.num_samples)],
        }

    def weights_info(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """What an SDK asks before it creates a model from a checkpoint."""
        checkpoint = self._checkpoints.get(str(request.get("tinker_path")))
        return {
            "base_model": checkpoint.base_model,
            "is_lora": checkpoint.lora_rank is not None,
            "lora_rank": checkpoint.lora_rank,
        }

    # REST

    def rest(
        self, method: str, parts: list[str], query: Mapping[str, str], body: Mapping[str, Any]
    ) -> Mapping[str, Any] | None:
        """The resources below ``/api/v1/``; None for those that there are not."""
        parts = [unquote(part) for part in parts]
        match method, parts:
            case "GET", ["checkpoints"]:
                return _page("checkpoints", [_json(c) for c in self._checkpoints.list()], query)
            case "GET", ["training_runs"]:
                runs = [] if "project_id" in query else self._training_runs()  # there is none
                return _page("training_runs", runs, query)
            case "GET", ["training_runs", run_id]:
                for run in self._training_runs():
                    if run["training_run_id"] == run_id:
                        return run
                raise UnknownError(f"there is no training run {run_id!r} here")
            case "GET", ["training_runs", run_id, "checkpoints"]:
                return {"checkpoints": [_json(c) for c in self._checkpoints.list(run_id)]}
            case "DELETE", ["training_runs", run_id, "checkpoints", kind, name]:
                self._checkpoints.delete(f"tinker://{run_id}/{kind}/{name}")
                return {}
            case "PUT", ["training_runs", run_id, "checkpoints", kind, name, "ttl"]:
                path = f"tinker://{run_id}/{kind}/{name}"
                self._checkpoints.set_ttl(path, body.get("ttl_seconds"))
                return {}
            case "GET", ["sessions"]:
                sessions = list(reversed(self._trainer.sessions))  # the newest first, as runs
                return {"sessions": _page("sessions", sessions, query)["sessions"]}
            case "GET", ["sessions", session_id]:
                self._trainer.check_session(session_id)
                models = self._trainer.model_ids
                return {
                    "training_run_ids": [i for i in models if i.startswith(f"{session_id}:")],
                    "sampler_ids": self._samplers.ids(session_id),
                    "user_metadata": self._trainer.sessions[session_id] or None,
                }
            case "POST", ["sessions", session_id, "finish"]:
                self._trainer.finish_session(session_id)
                return {}
            case "GET", ["samplers", sampler_id]:
                sampler = self._samplers.get(sampler_id)
                return {
                    "sampler_id": sampler.sampler_id,
                    "base_model": TOKENIZER,
                    "model_path": sampler.model_path,
                }
        return None

    def _training_runs(self) -> list[dict[str, Any]]:
        """Those that live and those of which there are checkpoints, newest first."""
        runs: dict[str, dict[str, Any]] = {}
        for model_id in reversed(self._trainer.model_ids):
            run = self._trainer.run(model_id)
            runs[model_id] = _run(run.model_id, run.base_model, run.lora_rank, run.last_request)
            runs[model_id]["user_metadata"] = run.user_metadata
        for checkpoint in self._checkpoints.list():
            run_json = runs.setdefault(
                checkpoint.model_id,
                _run(
                    checkpoint.model_id,
                    checkpoint.base_model,
                    checkpoint.lora_rank,
                    checkpoint.created,
                ),
            )
            key = "last_checkpoint" if checkpoint.kind == "weights" else "last_sampler_checkpoint"
            run_json.setdefault(key, _json(checkpoint))
        return list(runs.values())


def _run(model_id: str, base_model: str, lora_rank: int | None, at: float) -> dict[str, Any]:
    return {
        "training_run_id": model_id,
        "base_model": base_model,
        "model_owner": "sandbox",
        "is_lora": lora_rank is not None,
        "lora_rank": lora_rank,
        "last_request_time": _time(at),
    }


def _json(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "checkpoint_id": checkpoint.checkpoint_id,
        "checkpoint_type": checkpoint.checkpoint_type,
        "time": _time(checkpoint.created),
        "tinker_path": checkpoint.path,
        "size_bytes": checkpoint.size,
        "user_metadata": checkpoint.user_metadata,
        "expires_at": None if checkpoint.expires is None else _time(checkpoint.expires),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _page(key: str, items: list[Any], query: Mapping[str, str]) -> dict[str, Any]:
    try:
        offset, limit = int(query.get("offset", 0)), int(query.get("limit", 100))
    except ValueError as error:
        raise RequestError(f"offset and limit are integers: {error}", path="limit") from error
    return {
        key: items[offset : offset + limit],
        "cursor": {"offset": offset, "limit": limit, "total_count": len(items)},
    }
