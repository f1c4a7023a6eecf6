"""The end of the interpreter: terms that still run are ended, and nothing is waited for long.

Python ends while daemon threads run. One of them that comes back from torch then is unwound by
``pthread_exit`` through C++ frames, which aborts the process with status 134. So terms are
interrupted first; and a thread that stays in C, where nothing interrupts it, is made to stand still
when it comes back, as Python 3.14 does by itself.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import sys
import time

from . import processes
from .event_loop import OWN_LOOP
from .lifetimes import close_all
from .threads import interrupt_all, still_running

__all__: list[str] = []

_SECONDS = 1.0


@atexit.register
def _end() -> None:
    expires = time.monotonic() + _SECONDS
    interrupt_all()
    close_all(_SECONDS / 2)
    processes.end_all()
    OWN_LOOP.close(_SECONDS / 2)
    late = still_running(expires - time.monotonic())
    if (late or OWN_LOOP.stuck) and sys.version_info < (3, 14):
        _stand_still_instead_of_aborting()


def _stand_still_instead_of_aborting() -> None:
    for library in ("libstdc++.so.6", "libc++.1.dylib"):
        with contextlib.suppress(OSError, AttributeError):
            set_terminate = ctypes.CDLL(library)._ZSt13set_terminatePFvvE  # std::set_terminate
            set_terminate.argtypes = [ctypes.c_void_p]
            set_terminate.restype = ctypes.c_void_p
            set_terminate(ctypes.cast(ctypes.CDLL(None).pause, ctypes.c_void_p))
            return
