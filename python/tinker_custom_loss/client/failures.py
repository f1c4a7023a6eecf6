"""What a step that failed means for the calls behind it."""

from __future__ import annotations

import logging
import threading
from typing import Literal, get_args

from ..errors import CancelledError, RequestError, StoppedError
from ..regularizer import show

__all__ = ["Failures", "OnFailure"]

logger = logging.getLogger(__name__)

OnFailure = Literal["continue", "stop"]
"""``"continue"``: the client goes on with a step that contributes nothing. ``"stop"``: until the
failure is acknowledged, it refuses all calls that have a place in the order of training."""


class Failures:
    """The failed steps of one client.

    A call belongs to the era in which it was made; an acknowledgement begins a new one. So what
    was pipelined behind a failed step stays refused, although the failure was acknowledged before
    its turn came.
    """

    def __init__(self, on_failure: OnFailure) -> None:
        if on_failure not in get_args(OnFailure):
            raise RequestError(
                f'invalid value for "on_failure": expected "continue" or "stop", '
                f"got {show(on_failure)}",
                path="on_failure",
            )
        self._stops = on_failure == "stop"
        self._lock = threading.Lock()
        self._era = 0
        self._failed: dict[int, tuple[str, BaseException]] = {}  # the first failure of each era

    @property
    def era(self) -> int:
        """That of a call which is made now."""
        return self._era

    def report(
        self, what: str, error: BaseException, era: int, how: str = "contributes nothing"
    ) -> None:
        """Log that a step failed, and stop the client if that is asked for."""
        logger.error("%s %s: %s", what, how, error or type(error).__name__)
        if self._stops and not isinstance(error, CancelledError):  # its caller withdrew that one
            with self._lock:
                self._failed.setdefault(era, (what, error))

    def refuse(self, era: int) -> None:
        """Refuse a call of an era in which a step failed.

        Raises:
            StoppedError: it was made before anyone knew, or acknowledged.
        """
        failed = self._failed.get(era)
        if failed is not None:
            what, error = failed
            raise StoppedError(
                f"this call was refused, because {what} failed before it, and the client was made "
                f'with on_failure="stop": {error or type(error).__name__}; call '
                "acknowledge_failure() to go on"
            ) from error

    def acknowledge(self) -> BaseException | None:
        """Let the calls that are made from now on through; what they were refused for, or None."""
        with self._lock:
            failed = self._failed.get(self._era)
            if failed is None:
                return None
            self._era += 1
            return failed[1]
