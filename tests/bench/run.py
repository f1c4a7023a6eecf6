"""All benches, one after another: what they print, and the same in ``.make/bench.json``.

    python tests/bench/run.py [BENCH ...]     such as bridge, "memory lists"; by default all

Ends with 1 if a bench failed. A figure that is short of its target is a figure, and no failure.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BENCHES = (
    "machine",
    "bridge",
    "lists",
    "memory work",
    "memory lists",
    "pool",
    "start",
    "native",
    "recording",
    "concurrency",
    "terms",
)

FIGURE = re.compile(
    r"(?P<name>\w+) (?P<value>\S+) "
    r"\((?:target (?P<target>\S+)\) (?P<verdict>ok|short)|no target\))$"
)
MEDIANS = re.compile(r"  \w+: (?P<ms>\w+ \S+(?:, \w+ \S+)*) ms, medians of (?P<rounds>\d+)$")


class BenchError(Exception):
    """A bench ended with an error, which it has shown."""


def run(bench: str, tree: Path = ROOT) -> Iterator[dict[str, Any]]:
    """The figures of one bench of this tree, that measures the package of ``tree``."""
    name, *arguments = bench.split()
    script = next(path for path in HERE.glob(f"{name}.*") if path.suffix in (".py", ".exs"))
    command = ["mix", "run", "--no-compile"] if script.suffix == ".exs" else [sys.executable]
    environment = os.environ | {
        "PYTHONPATH": str(tree / "python"),
        "TINKEX_CUSTOM_LOSS_PYTHON": sys.executable,
    }
    with subprocess.Popen(
        [*command, str(script), *arguments],
        cwd=tree,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        yield from figures(shown(process.stdout))
    if process.returncode:
        raise BenchError(f"{bench} ended with {process.returncode}")


def figures(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """What the lines say that ``figure`` and ``medians`` print, each with the medians before it."""
    medians: dict[str, Any] = {}
    for line in lines:
        if found := MEDIANS.match(line):
            pairs = (pair.split() for pair in found["ms"].split(", "))
            medians = {
                "medians_ms": {name: float(value) for name, value in pairs},
                "rounds": int(found["rounds"]),
            }
        elif found := FIGURE.match(line):
            yield {
                "name": found["name"],
                "value": float(found["value"]),
                "target": found["target"] and float(found["target"]),
                "verdict": found["verdict"],
                **medians,
            }


def shown(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        print(line, end="", flush=True)
        yield line.rstrip("\n")


def machine() -> dict[str, Any]:
    def said(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()

    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": version("torch"),
        "tinker": version("tinker"),
        "elixir": said("elixir", "-e", "IO.write(System.version())"),
        "otp": said("elixir", "-e", "IO.write(System.otp_release())"),
        "commit": said("git", "describe", "--always", "--dirty"),
    }


def main(benches: list[str]) -> int:
    start = time.monotonic()
    found: list[dict[str, Any]] = []
    failed: list[str] = []
    for bench in benches or BENCHES:
        try:
            for figure in run(bench):
                found.append(figure)
        except BenchError as error:
            failed.append(str(error))
    report = {
        "machine": machine(),
        "seconds": round(time.monotonic() - start, 1),
        "failed": failed,
        "figures": found,
    }
    path = ROOT / ".make" / "bench.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    short = sum(figure["verdict"] == "short" for figure in found)
    print(f"{len(found)} figures, {short} of them short, in {report['seconds']:.0f} s: {path}")
    for error in failed:
        print(f"failed: {error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
