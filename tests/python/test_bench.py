"""What ``make bench`` prints is what it writes; a bench that fails is no slow figure."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"

SLOW = """
from figures import figure, medians

medians("bridge_1k", {
    "ours": lambda: sum(range(100_000)), "by_hand": lambda: sum(range(10))
}, 5)
figure("bridge_1k", 4.28, 1.3)
figure("pool_scaling", 1.84, 1.8, at_least=True)
figure("large", 12345.6)
"""


@pytest.fixture
def bench(tmp_path):
    """Runs one bench of this source in a tree of its own."""
    directory = tmp_path / "tests" / "bench"
    directory.mkdir(parents=True)
    for name in ("run.py", "figures.py"):
        shutil.copy(BENCH / name, directory)

    def run(source):
        (directory / "it.py").write_text(source)
        command = [sys.executable, str(directory / "run.py"), "it"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return done, json.loads((tmp_path / ".make" / "bench.json").read_text())

    return run


def test_a_figure_that_is_short_of_its_target_is_no_failure(bench):
    done, report = bench(SLOW)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[1:4] == [
        "bridge_1k 4.28 (target 1.3) short",
        "pool_scaling 1.84 (target 1.8) ok",
        "large 12346 (no target)",
    ]
    first, second, third = report["figures"]
    assert (first["value"], first["target"], first["verdict"]) == (4.28, 1.3, "short")
    assert first["medians_ms"]["ours"] > first["medians_ms"]["by_hand"] > 0
    assert first["rounds"] == 5
    assert (second["value"], second["verdict"]) == (1.84, "ok")
    assert (third["value"], third["target"], third["verdict"]) == (12346, None, None)
    assert report["machine"]["cores"] >= 1


def test_a_bench_that_fails_is_shown_and_what_it_measured_is_kept(bench):
    done, report = bench(SLOW + "raise ValueError('the port by hand says otherwise')")
    assert done.returncode == 1
    assert "the port by hand says otherwise" in done.stdout
    assert re.search(r"it ended with 1", done.stderr)
    assert len(report["figures"]) == 3
    assert report["failed"] == ["it ended with 1"]
