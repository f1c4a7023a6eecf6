"""The figures of this tree over those of another commit, each measured twice, in turns.

    python tests/bench/compare.py BASE [BENCH ...]

prints ``NAME RATIO (now VALUE, base VALUE)`` a figure: below 1 is less than before. Both are
measured by the benches of this tree, which may ask an old one for what it does not have; that is
shown, and the bench left out. By default those that are compared are bridge and native.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import geometric_mean

from figures import digits
from run import ROOT, BenchError, run

BENCHES = ("bridge", "native")
BASE = ROOT / ".make" / "base"


def check_out(commit: str) -> Path:
    """A worktree of the commit with a build of its own."""
    if not BASE.exists():
        subprocess.run(["git", "worktree", "prune"], cwd=ROOT, check=True)
        subprocess.run(
            ["git", "worktree", "add", "--quiet", "--detach", str(BASE), commit],
            cwd=ROOT,
            check=True,
        )
    subprocess.run(["git", "checkout", "--quiet", "--detach", commit], cwd=BASE, check=True)
    for tree in (ROOT, BASE):
        subprocess.run(["mix", "compile"], cwd=tree, check=True)
    return BASE


def compare(bench: str, base: Path) -> None:
    found: dict[Path, dict[str, list[float]]] = {ROOT: {}, base: {}}
    for tree in (ROOT, base, base, ROOT):
        print(f"# {bench} of {'this tree' if tree is ROOT else 'the base'}", flush=True)
        for figure in run(bench, tree):
            found[tree].setdefault(figure["name"], []).append(figure["value"])
    for name, values in found[ROOT].items():
        now, before = geometric_mean(values), geometric_mean(found[base][name])
        print(f"{name} {digits(now / before)} (now {digits(now)}, base {digits(before)})")


def main(commit: str, *benches: str) -> int:
    base = check_out(commit)
    failed = 0
    for bench in benches or BENCHES:
        try:
            compare(bench, base)
        except BenchError as error:
            print(f"left out: {error}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
