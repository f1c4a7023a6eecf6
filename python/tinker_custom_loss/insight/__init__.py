"""What a run did: recorded in files, and shown while it goes on.

Everything here takes the flat form of a step's record (:func:`tinker_custom_loss.flatten`) through
one method, ``log(metrics, step)``.
"""

from .diagnosis import Finding, diagnose
from .live import Live, live, watch
from .recorder import Recorder, Run, Sink, read_run

__all__ = ["Finding", "Live", "Recorder", "Run", "Sink", "diagnose", "live", "read_run", "watch"]
