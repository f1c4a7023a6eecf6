"""A Tinker server on this machine, for tests, examples and first steps.

It trains a tiny byte-level language model on the CPU: enough to run real training loops against,
with the official client or with Tinkex, without a key, a network or a GPU.
"""

from .examples import VOCABULARY, Examples
from .model import AdamParams, ForwardBackwardResult, LanguageModel
from .server import SandboxServer

__all__ = [
    "VOCABULARY",
    "AdamParams",
    "Examples",
    "ForwardBackwardResult",
    "LanguageModel",
    "SandboxServer",
]
