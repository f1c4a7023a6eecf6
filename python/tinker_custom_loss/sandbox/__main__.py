"""``python -m tinker_custom_loss.sandbox``: a Tinker server on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
import signal
import sys
import threading
from collections.abc import Iterable
from typing import Any

import torch

from ..errors import RequestError
from ..regularizer import nearest
from .faults import Faults

_SNIPPET = """\
  service = tinker.ServiceClient(base_url="{url}", api_key="tml-sandbox")
  client = service.create_lora_training_client("sandbox").result()
  client.forward_backward_custom(data, loss_fn).result()   # tokens are bytes, 0 to 255\
"""

_SETTINGS = ("seed", "retry_after", "slow_seconds", "endpoints", "at_most")
"""What :class:`~.faults.Faults` takes beside the faults."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tinker_custom_loss.sandbox", description=__doc__
    )
    parser.add_argument("--host", default="127.0.0.1", help="a loopback address (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of models that name none (%(default)s)"
    )
    parser.add_argument(
        "--state", metavar="DIR", help="where checkpoints live across restarts (else in memory)"
    )
    parser.add_argument(
        "--session-seconds",
        type=float,
        metavar="N",
        help="forget a session of which nothing was heard for so long (else never)",
    )
    parser.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="what goes wrong, such as lost_answers=0.2, refused_losses=ppo, at_most=5 or seed=3: "
        "the options of Faults in docs/sandbox.md (repeatable)",
    )
    parser.add_argument(
        "--erlang-port",
        action="store_true",
        help="serve an Erlang port on file descriptors 3 and 4 instead (docs/sandbox.md)",
    )
    parser.add_argument(
        "--load",
        action="append",
        default=[],
        metavar="MODULE_OR_FILE",
        help="functions that the port's gradient check may name as terms (repeatable)",
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    options = parser.parse_args(arguments)
    if not 0 <= options.port < 65536:
        parser.error(f"--port: expected 0 to 65535, got {options.port}")
    if options.threads < 1:
        parser.error(f"--threads: expected at least 1, got {options.threads}")
    if options.erlang_port and (options.fault or options.session_seconds is not None):
        parser.error("--fault and --session-seconds: over HTTP only; an Erlang port has neither")
    if options.erlang_port:
        return _serve_port(options)
    if options.load:
        parser.error("--load: only an Erlang port names terms; over HTTP they stay in the client")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    torch.set_num_threads(options.threads)
    return _serve_http(options)


def _serve_port(options: argparse.Namespace) -> int:
    from . import erlang_port

    if not erlang_port.attached():
        print(
            "--erlang-port is for a host that holds file descriptors 3 and 4 of this process, such "
            "as Tinkex.CustomLoss.Sandbox",
            file=sys.stderr,
        )
        return 2
    torch.set_num_threads(options.threads)
    return erlang_port.serve(options.load, options.state)


def _faults(given: list[str]) -> Faults | None:
    """The faults of ``NAME=VALUE``; a name of which there may be several is given several times.

    :raises RequestError: there is no such name, or the value is none of its kind.
    """
    if not given:
        return None
    kinds: dict[str, Any] = {
        field.name: type(field.default) for field in dataclasses.fields(Faults)
    }
    kinds["at_most"] = int  # whose default is None
    options: dict[str, Any] = {}
    for each in given:
        name, _, text = each.partition("=")
        kind = kinds.get(name)
        if kind is None:
            raise RequestError(
                f"there is no such fault; {nearest(name, _meant(name, kinds))}",
                path=f"faults.{name}",
            )
        if kind is tuple:
            options[name] = (*options.get(name, ()), text)
            continue
        try:
            options[name] = kind(text)
        except ValueError:
            raise RequestError(
                f"expected {name}=NUMBER, got {each!r}", path=f"faults.{name}"
            ) from None
    return Faults(**options)


def _meant(name: str, kinds: Iterable[str]) -> list[str]:
    """The faults, and of their settings those that are nearly ``name``."""
    faults = [kind for kind in kinds if kind not in _SETTINGS]
    return faults + difflib.get_close_matches(name, _SETTINGS)


def _serve_http(options: argparse.Namespace) -> int:
    from .server import SandboxServer

    interrupted = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: interrupted.set())
    try:
        server = SandboxServer(
            seed=options.seed,
            host=options.host,
            port=options.port,
            state=options.state,
            faults=_faults(options.fault),
            session_seconds=options.session_seconds,
        )
    except RequestError as error:
        option, _, name = (error.path or "").replace("_", "-").partition(".")
        print(
            f"--fault {name.replace('-', '_')}: {error}" if name else f"--{option}: {error}",
            file=sys.stderr,
        )
        return 2
    except OSError as error:
        print(f"--port: cannot listen on {options.host}:{options.port}: {error}", file=sys.stderr)
        return 1
    with server:
        print(f"Tinker sandbox at {server.url} (Ctrl-C ends it)\n")
        print(_SNIPPET.format(url=server.url), flush=True)
        interrupted.wait()
    print("\nsandbox ended", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
