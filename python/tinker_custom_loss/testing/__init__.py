"""Checks for terms of your own, for your own test suite.

    from tinker_custom_loss.testing import check_term

    def test_smoothness():
        check_term(smoothness, params={"power": 2})

It runs the term as a training step does, on small batches of random log-probabilities, and asks of
it what this package asks of its own terms. See :func:`check_term`.

``with without_fast_paths():`` has every step in it take the general path alone: each gradient by
autograd, no arithmetic on bits. It must not change a result; where a step looks wrong, it says
whether a fast path is to blame. In the environment of a whole run it is
``TINKER_CUSTOM_LOSS_FAST=0``.
"""

from ..fast_paths import without_fast_paths
from .check import check_term
from .checked import CHECKS

__all__ = ["CHECKS", "check_term", "without_fast_paths"]
