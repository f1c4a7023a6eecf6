"""Checks for terms of your own, for your own test suite.

    from tinker_custom_loss.testing import check_term

    def test_smoothness():
        check_term(smoothness, params={"power": 2})

It runs the term as a training step does, on small batches of random log-probabilities, and asks of
it what this package asks of its own terms. See :func:`check_term`.
"""

from .check import check_term
from .checked import CHECKS

__all__ = ["CHECKS", "check_term"]
