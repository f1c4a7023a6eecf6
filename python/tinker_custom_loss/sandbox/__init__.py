"""A Tinker server on this machine, for tests, examples and first steps.

It trains a tiny byte-level language model on the CPU: enough to run real training loops against,
with the official client or with Tinkex, without a key, a network or a GPU.
"""

from typing import TYPE_CHECKING, Any

from .examples import VOCABULARY, Examples
from .faults import Faults
from .gradient_check import GradientCheck, check_gradient
from .model import AdamParams, ForwardBackwardResult, LanguageModel

if TYPE_CHECKING:
    from .server import SandboxServer

__all__ = [
    "VOCABULARY",
    "AdamParams",
    "Examples",
    "Faults",
    "ForwardBackwardResult",
    "GradientCheck",
    "LanguageModel",
    "SandboxServer",
    "check_gradient",
]


def __getattr__(name: str) -> Any:
    # The server imports tinker, which takes a second that the Erlang port need not wait.
    if name == "SandboxServer":
        from .server import SandboxServer

        return SandboxServer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
