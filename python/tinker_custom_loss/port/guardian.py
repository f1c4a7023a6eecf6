"""A process of 8 MB that ends a worker's group when its host goes away, or the worker itself does.

While a term holds the interpreter's lock in C, no thread of the worker can see that the host is
gone. And a worker can die without a chance to end what its terms started: by a signal, or by
``os._exit`` in a term. This process sees both, and takes along whoever is left, itself included.
It is run as a script, without the package and so without torch: ``guardian.py WORKER_PID``, with
the descriptor on which the host writes as its standard input.
"""

from __future__ import annotations

import os
import select
import signal
import sys


def main(worker: int) -> None:
    """Wait for the end of the host or of the worker, which leads this process's group."""
    ends = select.poll()
    # POLLHUP always counts; POLLRDHUP says the same of a socket. What may be read is the worker's.
    ends.register(0, getattr(select, "POLLRDHUP", 0))
    try:
        if hasattr(os, "pidfd_open"):  # Linux
            ends.register(os.pidfd_open(worker), select.POLLIN)
        ends.poll()
    except ProcessLookupError:
        pass  # it was gone before it could be watched
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
