"""This package as functions from bytes to bytes, for hosts that already run ErlPort.

::

    {:ok, py} = :python.start(python: ~c"python3")
    _ready = :python.call(py, :"tinker_custom_loss.port.erlport", :load, [["my_losses"]])
    reply = :python.call(py, :"tinker_custom_loss.port.erlport", :compute, [request])

Requests and replies are frames of docs/protocol.md, without their length. Nothing here imports
ErlPort. Each function returns bytes whatever happens, since an exception of Python's reaches an
ErlPort host as an Erlang one and some values end its process: what is wrong comes as an ``error``
message.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import ProtocolError
from ..terms.registry import LoadError, Registry
from .messagepack import Message, pack, unpack
from .service import Service, error_message, id_of, op_of

__all__ = ["compute", "load"]

_loaded: list[str] = []
_service = Service(Registry())


def compute(request: bytes) -> bytes:
    """The ``result`` or ``error`` message that answers a ``compute`` or ``terms`` message.

    A request without an ``id`` is answered without one: a call needs none to find its reply.
    While it runs, standard output goes to standard error and standard input is empty, whoever asks
    for them: ErlPort speaks on these descriptors.
    """
    message: Message | None = None

    def answer() -> dict[str, Any]:
        nonlocal message
        message = unpack(request)
        op = op_of(message)
        if op == "compute":
            return _service.compute(message)
        if op == "terms":
            return _service.terms()
        raise ProtocolError(f'unknown op "{op}" at `op`; known are compute and terms', path="op")

    return _bytes(answer, lambda: id_of(message))


def load(targets: Sequence[bytes | str]) -> bytes:
    """Make terms nameable, beside those loaded before, as ``--load`` does for a worker.

    ``targets`` are names of modules, such as ``"my_losses"``, or paths of ``.py`` files. The answer
    is a ``result`` with ``terms``, or an ``error`` of kind ``startup``; then nothing has changed.
    """

    def answer() -> dict[str, Any]:
        global _loaded, _service
        names = [*_loaded, *_names(targets)]
        service = Service(Registry(names))
        _loaded, _service = names, service
        return service.terms()

    return _bytes(answer, lambda: None)


def _names(targets: object) -> list[str]:
    given: Sequence[object] = targets if isinstance(targets, (list, tuple)) else [targets]
    names = [name.decode() if isinstance(name, bytes) else name for name in given]
    if not all(isinstance(name, str) for name in names):
        raise LoadError(
            f"expected a list of names of modules or paths of .py files, as binaries, got {given!r}"
        )
    return list(map(str, names))


def _bytes(answer: Callable[[], dict[str, Any]], request_id: Callable[[], int | None]) -> bytes:
    try:
        with _descriptors_of_a_term():
            reply = answer()
        return pack({**reply, "id": request_id()})
    except BaseException as error:  # SystemExit too: a term may not end the host's process
        return pack(error_message(error, request_id()))


@contextlib.contextmanager
def _descriptors_of_a_term() -> Iterator[None]:
    """Descriptor 0 reads nothing and 1 writes where 2 does, until the end of the block."""
    kept = [os.dup(0), os.dup(1)]
    null = os.open(os.devnull, os.O_RDONLY)
    try:
        os.dup2(null, 0)
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.__stderr__):
            yield
        ctypes.CDLL(None).fflush(None)  # what C code has printed, and still holds back
    finally:
        for fd, original in enumerate(kept):
            os.dup2(original, fd)
            os.close(original)
        os.close(null)
