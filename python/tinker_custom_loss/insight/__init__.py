"""What a run did: recorded in files, and shown while it goes on.

Everything here takes the flat form of a step's record (:func:`tinker_custom_loss.flatten`) through
one method, ``log(metrics, step)``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .diagnosis import Finding, diagnose
    from .kept import KeptStep, Outcome, read_step
    from .recorder import Recorder, Sink
    from .replaying import Replay, replay
    from .run import Run, kept_steps, read_run
    from .table import Live, live, watch

__all__ = [
    "Finding",
    "KeptStep",
    "Live",
    "Outcome",
    "Recorder",
    "Replay",
    "Run",
    "Sink",
    "diagnose",
    "kept_steps",
    "live",
    "read_run",
    "read_step",
    "replay",
    "watch",
]

# A report needs no torch, and a worker of the port no table.
_ROOMS = {
    "diagnosis": ("Finding", "diagnose"),
    "kept": ("KeptStep", "Outcome", "read_step"),
    "table": ("Live", "live", "watch"),
    "recorder": ("Recorder", "Sink"),
    "replaying": ("Replay", "replay"),
    "run": ("Run", "kept_steps", "read_run"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_ROOM_OF[name]}", __name__), name)
