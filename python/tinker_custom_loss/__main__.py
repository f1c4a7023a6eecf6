"""``python -m tinker_custom_loss doctor|terms``: is this installation sound, what can be named."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence

from . import __version__
from .cli.replay import add_replay, replay_command
from .cli.report import add_report, report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the status is 1 if it found something wrong."""
    parser = argparse.ArgumentParser(prog="python -m tinker_custom_loss")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, summary in (
        ("doctor", "check Python, the packages, the terms and a gradient, one line each"),
        ("terms", "list what may be named as a term, or tell what those named here take"),
    ):
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument(
            "--load",
            action="append",
            default=[],
            metavar="MODULE_OR_FILE",
            help="a module, or a .py file, whose functions are terms too (repeatable)",
        )
        if name == "terms":
            command.add_argument("names", nargs="*", metavar="NAME", help="a term to tell all of")
            command.add_argument("--markdown", action="store_true", help="all of all, as a page")
    summary = "make one HTML page, with charts, of recorded runs"
    add_report(commands.add_parser("report", help=summary, description=summary))
    summary = "compute a step again that a run has kept, as it was or with changes"
    add_replay(commands.add_parser("replay", help=summary, description=summary))
    options = parser.parse_args(arguments)
    if options.command == "report":
        return report(options)
    if options.command == "replay":
        return replay_command(options)
    if options.command == "doctor":
        return _doctor(options.load)
    return _terms(options.load, options.names, options.markdown)


def _doctor(load: Sequence[str]) -> int:
    from .cli.doctor import examine

    status = 0
    for finding in examine(load):
        print(finding, flush=True)
        status = status or int(finding.remedy is not None)
    return status


def _terms(load: Sequence[str], names: Sequence[str], markdown: bool) -> int:
    from .cli.markdown import page
    from .cli.terms import describe, overview
    from .terms.registry import LoadError, Registry

    try:
        terms = Registry(load).describe()
        lines = list(describe(terms, names) if names else overview(terms))
    except LoadError as error:
        print(error, file=sys.stderr)
        return 1
    except LookupError as error:
        print(error, file=sys.stderr)
        return 2
    if markdown:
        print(page(terms))
        return 0
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What its encoding lacks is a question mark, and not the end of the command.
            stream.reconfigure(errors="replace")
    sys.exit(main())
