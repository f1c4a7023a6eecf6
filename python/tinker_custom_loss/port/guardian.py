"""A process of 8 MB that outlives its worker by a moment, and takes what the worker left along.

A worker can die without a chance to end the processes that its terms started: by a signal, by
``os._exit`` in a term, with its host. The kernel tells this process, which ends the whole group.
It is run as a script, without the package and so without torch: ``guardian.py WORKER_PID``.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(worker: int) -> None:
    """Wait until the worker, which is the parent and leads the group, is gone."""
    died = {signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, died)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)
    while os.getppid() == worker:
        signal.sigwait(died)
    if os.getpgrp() == worker:
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
