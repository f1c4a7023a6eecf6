"""What type checkers, and the editors that ask them, know of this package in a user's project."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("typed_program.py")
README = ROOT / "README.md"

# Mistakes in the program, each of which a type that is known makes one.
MISTAKES = [
    ('record["regularizers"]', 'record["regularisers"]'),
    ('term["contribution"]', 'term["contributed"]'),
    ("training_client.optim_step(", "training_client.optim_stp("),
    ("regularizers, step=step)", 'regularizers, step="1")'),
    ("output.record", "output.records"),
    ("timeout=30)", 'timeout="30")'),
    ("Regularizer(smoothness, 0.1,", "Regularizer([smoothness], 0.1,"),
]


def mypy(directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--hide-error-context"]
    # The package, where setup installs a link to it; a user's checker finds it by itself.
    return check([*command, "--cache-dir", str(ROOT / ".mypy_cache" / "users"), "."], directory)


def pyright(directory: Path) -> subprocess.CompletedProcess[str]:
    settings = {"typeCheckingMode": "standard", "extraPaths": [str(ROOT / "python")]}
    (directory / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    # pyright with everything it needs in its wheels: the original fetches itself from npm.
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable]
    return check(command, directory)


def check(command: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MYPYPATH": str(ROOT / "python")}
    return subprocess.run(
        command,
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


checkers = pytest.mark.parametrize("checker", [mypy, pyright], ids=["mypy", "pyright"])


@checkers
def test_a_users_program_passes(checker, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM.read_text(encoding="utf-8"), encoding="utf-8")
    checked = checker(tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@checkers
def test_mistakes_in_it_do_not(checker, tmp_path: Path) -> None:
    """They would pass if the types were Any."""
    lines = PROGRAM.read_text(encoding="utf-8").splitlines()
    wrong = set()
    for right, mistake in MISTAKES:
        number = next(i for i, line in enumerate(lines) if right in line)
        lines[number] = lines[number].replace(right, mistake)
        wrong.add(number + 1)
    (tmp_path / "program.py").write_text("\n".join(lines), encoding="utf-8")
    checked = checker(tmp_path)
    found = {int(line) for line in re.findall(r"program\.py:(\d+):.*error", checked.stdout)}
    assert found == wrong, checked.stdout


def test_it_runs() -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error", str(PROGRAM)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "python"), "TINKER_TELEMETRY": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    assert "smoothness" in ran.stdout
