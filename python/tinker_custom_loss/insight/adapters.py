"""Sinks over the loggers that people have. Each has the one method ``log(metrics, step)``, and
logs under the keys of ``flatten(record, prefix=…)`` as they are; give them to
``Recorder(…, sinks=[…])``, or call them.

The libraries are imported when an adapter is made, and are not among this package's dependencies.
What the caller passes in, such as a run, is the caller's to close.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["CookbookLogger", "TensorBoard", "Trackio", "WandB"]


class TensorBoard:
    """To a ``torch.utils.tensorboard.SummaryWriter``, or a new one that writes to a directory."""

    def __init__(self, writer_or_directory: Any) -> None:
        self.writer = writer_or_directory
        if not hasattr(self.writer, "add_scalar"):
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(writer_or_directory))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)


class WandB:
    """To a run of Weights & Biases, as ``wandb.init()`` returns it.

    W&B refuses a step that is smaller than one before; several calls of one step are one entry.
    """

    def __init__(self, run: Any) -> None:
        self.run = run

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log(dict(metrics), step=step)


class Trackio:
    """To a run of Trackio, as ``trackio.init()`` returns it."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log(dict(metrics), step=step)


class CookbookLogger:
    """To an ``ml_log.Logger`` of tinker-cookbook."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.logger.log_metrics(dict(metrics), step=step)
