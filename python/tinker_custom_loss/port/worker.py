"""A worker's start, for a host that speaks docs/protocol.md."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib.metadata
import logging
import os
import platform
import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from .. import __version__
from ..errors import said
from ..terms.registry import LoadError, Registry
from .cancellation import InlineTurn
from .frames import MAX_FRAME, FrameReader, FrameWriter
from .logs import LEVELS, LogStream
from .memory import SharedMemory
from .messagepack import pack
from .process import attached, end, resident_bytes, settle
from .server import Server
from .service import Service, error_message

if TYPE_CHECKING:
    from ..insight import Recorder

__all__ = ["PROTOCOL", "main"]

PROTOCOL = 3


class _Arguments(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise LoadError(f"the worker's options are not valid: {message}")


def _at_least(least: int) -> Any:
    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {text}")
        return value

    return integer


def _parser() -> argparse.ArgumentParser:
    parser = _Arguments(
        prog="python -m tinker_custom_loss.port",
        description="Computes custom losses for a host, such as Tinkex.CustomLoss, over an Erlang "
        "port: frames of MessagePack on file descriptors 3 and 4.",
    )
    parser.add_argument(
        "--load",
        action="append",
        default=[],
        metavar="MODULE_OR_FILE",
        help="a module, or a .py file, whose functions may be named as terms (repeatable)",
    )
    parser.add_argument("--max-frame", type=_at_least(1 << 20), default=MAX_FRAME, metavar="BYTES")
    parser.add_argument("--max-in-flight", type=_at_least(1), default=4, metavar="N")
    parser.add_argument(
        "--shared-memory",
        type=_at_least(0),
        default=0,
        metavar="FILES",
        help="files of shared memory for large requests, one request each; 0: all take the pipe",
    )
    parser.add_argument(
        "--threads", type=_at_least(1), default=1, metavar="N", help="threads of torch"
    )
    parser.add_argument("--record", metavar="DIR", help="write the records of all steps there")
    parser.add_argument(
        "--keep",
        default="failures",
        metavar="WHICH",
        help="which steps to keep there for a replay: failures, every:N or all",
    )
    parser.add_argument("--keep-bytes", type=_at_least(1), default=256_000_000, metavar="BYTES")
    parser.add_argument("--log-level", choices=LEVELS, default="info")
    return parser


def main(arguments: list[str]) -> NoReturn:
    """Serve until the host goes away."""
    parser = _parser()
    if not attached():
        with contextlib.suppress(LoadError):
            parser.parse_args(arguments)  # answers --help
        print(
            "python -m tinker_custom_loss.port is started by Tinkex.CustomLoss, or another host "
            "that holds its file descriptors 3 and 4 (see docs/protocol.md); it does nothing by "
            "itself.",
            file=sys.stderr,
        )
        sys.exit(2)
    from_host, to_host = settle()
    faulthandler.enable()
    writer = FrameWriter(to_host)
    try:
        options = parser.parse_args(arguments)
        logs = LogStream(writer)
        logs.install(options.log_level)
        torch.set_num_threads(options.threads)
        torch.set_num_interop_threads(1)
        registry = Registry(options.load)
        recorder = _recorder(options)
        writer.max_frame = options.max_frame
        logs.drain()
        memory = SharedMemory(options.shared_memory)
        writer.write([pack(_ready(registry, options, memory))])
    except BaseException as error:
        if not isinstance(error, LoadError):
            error = LoadError(f"the worker cannot start: {type(error).__name__}: {said(error)}")
        writer.write([pack(error_message(error))])
        end(1)
    server = Server(
        FrameReader(from_host, options.max_frame),
        writer,
        logs,
        Service(registry, InlineTurn(), recorder),
        options.max_in_flight,
        memory,
    )
    server.start()
    _import_tinker()
    while True:  # this thread is for signals
        signal.pause()


def _recorder(options: argparse.Namespace) -> Recorder | None:
    if options.record is None:
        return None
    from ..insight.recorder import Recorder

    return Recorder(options.record, shared=True, keep=options.keep, keep_bytes=options.keep_bytes)


def _ready(registry: Registry, options: argparse.Namespace, memory: SharedMemory) -> dict[str, Any]:
    return {
        "op": "ready",
        "protocol": PROTOCOL,
        "package": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tinker": importlib.metadata.version("tinker"),
        "pid": os.getpid(),
        "rss": resident_bytes(),
        "max_frame": options.max_frame,
        "max_in_flight": options.max_in_flight,
        "shared_memory": memory.describe(),
        "terms": registry.describe(),
    }


def _import_tinker() -> None:
    """Now, beside the first requests, rather than when a term first looks at a datum."""
    try:
        import tinker  # noqa: F401
    except Exception:
        logging.getLogger(__name__).exception("tinker cannot be imported, so no term sees a datum")
