"""What a run did: recorded in files, and shown while it goes on.

Everything here takes the flat form of a step's record (:func:`tinker_custom_loss.flatten`) through
one method, ``log(metrics, step)``.
"""

from .diagnosis import Finding, diagnose
from .flight import kept_steps
from .kept import KeptStep, Outcome, read_step
from .live import Live, live, watch
from .recorder import Recorder, Run, Sink, read_run
from .replay import Replay, replay

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
