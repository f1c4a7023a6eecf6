"""What type checkers, and the editors that ask them, know of this package in a user's project."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from test_readme import README, ROOT, blocks

PROGRAM = Path(__file__).with_name("typed_program.py")

# Each is a mistake because the type is known; it would pass if that were Any.
MISTAKES = [
    ('record["regularizers"]', 'record["regularisers"]'),
    ("record['loss_total']", "record['loss']"),
    ("training_client.optim_step(", "training_client.optim_stp("),
    ("regularizers, step=step)", 'regularizers, step="1")'),
    ("output.metrics", "output.metric"),
    ("timeout=30)", 'timeout="30")'),
    ("Regularizer(smoothness, 0.1,", "Regularizer([smoothness], 0.1,"),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> tuple[Path, set[int]]:
    """A user's project, and the lines of its mistaken.py that are mistakes."""
    directory = tmp_path_factory.mktemp("project")
    text = PROGRAM.read_text(encoding="utf-8")
    (directory / "program.py").write_text(text, encoding="utf-8")
    losses, program, *_ = (block["code"] for block in blocks(README, "python"))
    assert losses.startswith("# my_losses.py\n")
    (directory / "my_losses.py").write_text(losses, encoding="utf-8")
    (directory / "readme.py").write_text(program, encoding="utf-8")
    lines, wrong = text.splitlines(), set()
    for right, mistake in MISTAKES:
        number = next(i for i, line in enumerate(lines) if right in line)
        lines[number] = lines[number].replace(right, mistake)
        wrong.add(number + 1)
    (directory / "mistaken.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {"typeCheckingMode": "standard", "extraPaths": [str(ROOT / "python")]}
    (directory / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory, wrong


@pytest.mark.parametrize(
    "command",
    [
        ["mypy", "--strict", "--cache-dir", str(ROOT / ".mypy_cache" / "users"), "."],
        # Pyright with all that it needs in its wheel; the original fetches itself from npm.
        ["basedpyright", "--pythonpath", sys.executable],
    ],
    ids=["mypy", "pyright"],
)
def test_programs_pass_and_mistakes_do_not(command, project) -> None:
    directory, wrong = project
    checked = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=directory,
        env={**os.environ, "MYPYPATH": str(ROOT / "python")},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    errors = re.findall(r"(\w+)\.py:(\d+).*error", checked.stdout)
    assert {("mistaken", str(line)) for line in wrong} == set(errors), checked.stdout


def test_the_program_runs() -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error", str(PROGRAM)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "python"), "TINKER_TELEMETRY": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "'smoothness': " in ran.stdout
