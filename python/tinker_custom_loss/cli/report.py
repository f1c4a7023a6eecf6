"""``python -m tinker_custom_loss report``: recorded runs as one page, or as figures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..errors import RequestError
from ..wording import counted

__all__ = ["add_report", "report"]


def add_report(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of :func:`report`."""
    command.add_argument("runs", nargs="+", metavar="RUN", help="a directory with metrics.jsonl")
    command.add_argument("-o", "--output", default="report.html", metavar="FILE")
    command.add_argument(
        "--svg", metavar="DIR", help="also write each chart of each run as DIR/RUN-CHART.svg"
    )
    command.add_argument(
        "--png", metavar="DIR", help="the same as pictures of 1920 pixels; needs the extra png"
    )
    command.add_argument(
        "--prefix", default="", help="that of the keys in metrics.jsonl, as given to flatten"
    )
    command.add_argument(
        "--load",
        action="append",
        default=[],
        metavar="MODULE_OR_FILE",
        help="a module, or a .py file, with terms of kept steps (repeatable)",
    )
    command.add_argument(
        "--tokenizer",
        metavar="bytes|NAME",
        help="to show kept steps as text: bytes, or a tokenizer of transformers",
    )


def report(options: argparse.Namespace) -> int:
    """Write the report; the status is 2 if a run cannot be read."""
    from ..insight.report import figures, png, report_page, standalone, titles
    from ..insight.run import read_run

    try:
        runs = [read_run(directory) for directory in options.runs]
        page = report_page(
            runs, prefix=options.prefix, load=options.load, tokenizer=options.tokenizer
        )
        Path(options.output).write_text(page, encoding="utf-8")
        for title, run in (
            zip(titles(runs), runs, strict=True) if options.svg or options.png else ()
        ):
            for figure in figures(run, options.prefix):
                name, svg = f"{title.replace('/', '-')}-{figure.key}", standalone(figure)
                if options.svg:
                    _write(Path(options.svg) / f"{name}.svg", svg.encode())
                if options.png:
                    _write(Path(options.png) / f"{name}.png", png(svg))
    except RequestError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"cannot open {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    steps = sum(len(run.steps) for run in runs)
    of = f"{counted(len(runs), 'run')}, {counted(steps, 'step')}"
    print(f"{options.output}: {of}, {len(page) / 1000:.0f} kB")
    return 0


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
