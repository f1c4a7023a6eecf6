"""``python -m tinker_custom_loss doctor|terms``: is this installation sound, what can be named."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import __version__
from .cli.doctor import examine
from .cli.report import add_report, report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the status is 1 if it found something wrong."""
    parser = argparse.ArgumentParser(prog="python -m tinker_custom_loss")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, summary in (
        ("doctor", "check Python, the packages, the terms and a gradient, one line each"),
        ("terms", "list what may be named as a term, with its parameters"),
    ):
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument(
            "--load",
            action="append",
            default=[],
            metavar="MODULE_OR_FILE",
            help="a module, or a .py file, whose functions are terms too (repeatable)",
        )
    summary = "make one HTML page, with charts, of recorded runs"
    add_report(commands.add_parser("report", help=summary, description=summary))
    options = parser.parse_args(arguments)
    if options.command == "report":
        return report(options)
    return _doctor(options.load) if options.command == "doctor" else _terms(options.load)


def _doctor(load: Sequence[str]) -> int:
    status = 0
    for finding in examine(load):
        print(finding, flush=True)
        status = status or int(finding.remedy is not None)
    return status


def _terms(load: Sequence[str]) -> int:
    from .terms.registry import LoadError, Registry

    try:
        terms = Registry(load).describe()
    except LoadError as error:
        print(error, file=sys.stderr)
        return 1
    for term in terms:
        print("\n".join(_lines(term)), end="\n\n")
    return 0


def _lines(term: Mapping[str, Any]) -> Iterator[str]:
    kinds = [term["kind"]] + ["async"] * term["async"]
    reads = f"; reads {', '.join(term['inputs'])}" if term["inputs"] else ""
    yield f"{term['name']}  ({', '.join(kinds)}, scope {term['scope']}{reads})"
    yield textwrap.indent(term["doc"].partition("\n\n")[0] or "(no docstring)", "    ")
    for param in term["params"]:
        yield f"        {_parameter(param)}"


def _parameter(param: Mapping[str, Any]) -> str:
    annotation = f": {param['type']}" if param["type"] and not param["choices"] else ""
    default = "" if param["required"] else f" = {param['default']!r}"
    choices = f"  ({' | '.join(map(str, param['choices']))})" if param["choices"] else ""
    return f"{param['name']}{annotation}{default}{choices}"


if __name__ == "__main__":
    sys.exit(main())
