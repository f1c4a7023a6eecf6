"""``python -m tinker_custom_loss replay``: a kept step, computed again."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..errors import CustomLossError

__all__ = ["add_replay", "replay_command"]


def add_replay(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of :func:`replay_command`."""
    command.add_argument("file", metavar="FILE", help="a file in the directory steps of a run")
    command.add_argument(
        "--load",
        action="append",
        default=[],
        metavar="MODULE_OR_FILE",
        help="a module, or a .py file, with terms of the step (repeatable)",
    )
    command.add_argument(
        "--weight",
        action="append",
        default=[],
        type=_pair(float),
        metavar="NAME=NUMBER",
        help="weigh a regularizer otherwise",
    )
    command.add_argument(
        "--drop", action="append", default=[], metavar="NAME", help="leave a term out"
    )
    command.add_argument(
        "--add",
        action="append",
        default=[],
        type=_regularizer,
        metavar="JSON",
        help='add a regularizer: \'{"fn": "l2", "weight": 0.1}\'; fn may be MODULE:FUNCTION',
    )
    command.add_argument(
        "--replace",
        action="append",
        default=[],
        type=_pair(str),
        metavar="NAME=MODULE:FUNCTION",
        help="compute a term by another function, or say what a lambda was",
    )
    command.add_argument(
        "--tokenizer",
        metavar="bytes|NAME",
        help="to show text: bytes, or a tokenizer of transformers, by its directory or name",
    )


def replay_command(options: argparse.Namespace) -> int:
    """Print the step again; the status is 1 if it should be the same and is not, 2 if it cannot
    be computed."""
    from ..insight.replaying import replay
    from ..insight.tokenizing import decoder

    try:
        decode = decoder(options.tokenizer)
        replayed = replay(
            options.file,
            load=options.load,
            weights=dict(options.weight),
            drop=options.drop,
            add=options.add,
            replace=dict(options.replace),
        )
    except CustomLossError as error:
        print(error, file=sys.stderr)
        return 2
    print(replayed)
    for line in _places(replayed, decode):
        print(line)
    return 0 if replayed.changes or replayed.is_same else 1


def _places(replayed: Any, decode: Any) -> Iterator[str]:
    """Where the errors were, with the text around them."""
    from ..insight.tokenizing import place_of

    seen = []
    for error in (replayed.step.outcome.error, replayed.again.error):
        if error is None or error["datum"] is None or (error["datum"], error["token"]) in seen:
            continue
        seen.append((error["datum"], error["token"]))
        yield place_of(error, replayed.step, decode)


def _pair(kind: Callable[[str], Any]) -> Callable[[str], tuple[str, Any]]:
    wanted = "NAME=NUMBER" if kind is float else "NAME=MODULE:FUNCTION"

    def pair(text: str) -> tuple[str, Any]:
        name, equals, value = text.partition("=")
        try:
            if equals and value:
                return name, kind(value)
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")

    return pair


def _regularizer(text: str) -> Mapping[str, Any]:
    try:
        spec = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"it is no JSON: {error}") from None
    if not isinstance(spec, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return spec
