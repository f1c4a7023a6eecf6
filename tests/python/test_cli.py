"""``python -m tinker_custom_loss``: what it prints and how it exits."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tinker_custom_loss.__main__ import main
from tinker_custom_loss.cli import doctor
from tinker_custom_loss.terms import CATALOGUE

ROOT = Path(__file__).parents[2]


def test_doctor_prints_a_line_a_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(doctor.REQUIRED) + 3
    assert all(line.startswith("ok    ") for line in lines)
    assert re.match(r"ok    torch \d", lines[[*doctor.REQUIRED].index("torch") + 1])
    assert lines[-1] == "ok    a round trip: the gradient of l2 is 2 · logprobs"


def test_doctor_warns_of_nothing_of_its_own() -> None:
    command = [sys.executable, "-m", "tinker_custom_loss", "doctor"]
    done = subprocess.run(command, cwd=ROOT / "python", capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_doctor_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", {"numpy": "999.1", "no_such_package": "1.0"})
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    version = importlib.metadata.version("numpy")
    assert lines[1].startswith(f"FAIL  numpy {version} is older than 999.1; run: ")
    assert lines[1].endswith("-m pip install 'numpy>=999.1'")
    assert lines[2].startswith("FAIL  no_such_package cannot be imported")
    assert len(lines) == 3  # what builds on them is not tried


def test_doctor_names_what_cannot_be_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken_losses.py"
    broken.write_text("import no_such_package\n")
    assert main(["doctor", "--load", str(broken)]) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL"))
    assert "broken_losses.py" in line
    assert "No module named 'no_such_package'" in line


def test_the_versions_are_those_that_the_package_declares() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == [f"{name}>={low}" for name, low in doctor.REQUIRED.items()]


@pytest.fixture(scope="module")
def listed_losses(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("losses") / "listed_losses.py"
    path.write_text(
        "async def gap(data, logprobs, *, margin: float, power=2):\n"
        '    """The gap.\n\n    More of it.\n    """\n'
        "def gap_between_neighbours(data, logprobs):\n    pass\n"
    )
    return str(path)


def test_terms_fits_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    widest = {}
    for columns in ("80", "300"):
        monkeypatch.setenv("COLUMNS", columns)
        assert main(["terms"]) == 0
        widest[columns] = max(map(len, capsys.readouterr().out.splitlines()))
    assert widest["80"] <= 80 < widest["300"] <= 100


def test_terms_lists_a_line_a_term(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, listed_losses: str
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["terms", "--load", listed_losses]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "built in"
    row = re.compile(r"  nll +Negative log-likelihood: -ℓ, Tinker's cross_entropy\.")
    assert any(map(row.fullmatch, lines))
    loaded = lines.index("listed_losses")
    assert lines[loaded + 1 :] == [
        "  listed_losses:gap                   The gap.",
        "  listed_losses:gap_between_neighbours",
        "                                      (no docstring)",
        "",
        "For what one takes, name it: terms listed_losses:gap_between_neighbours",
    ]
    # What a column and a few headings add, and no wall.
    assert max(map(len, lines)) <= 100
    assert len(lines) < 2 * len([line for line in lines if re.match(r"  \S", line)])


def test_terms_tells_all_of_those_that_are_named(
    capsys: pytest.CaptureFixture[str], listed_losses: str
) -> None:
    assert main(["terms", "--load", listed_losses, "kl", "listed_losses:gap"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("kl  (builtin, scope token, reads reference_logprobs)\n")
    assert "    estimator = 'k2'  (k1 | k2 | k3 | k3_weighted | exact)\n" in told
    assert (
        "listed_losses:gap  (loaded, async, scope batch)\n    margin: float\n    power = 2\n\n"
        "    The gap.\n\n    More of it.\n"
    ) in told


def test_an_output_that_lacks_a_character_ends_no_command() -> None:
    command = [sys.executable, "-m", "tinker_custom_loss", "terms", "kl"]
    ascii_alone = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=ascii_alone)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("kl  (builtin, ")


def test_terms_names_the_nearest_of_one_that_is_not_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["terms", "entropi"]) == 2
    assert capsys.readouterr().err.startswith(
        f'there is no term "entropi"; of {len(CATALOGUE)}, the nearest are: entropy, '
    )


def test_the_page_of_terms_is_that_of_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["terms", "--markdown"]) == 0
    committed = (Path(__file__).parents[2] / "docs/terms.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == committed


def test_terms_of_a_module_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["terms", "--load", "no_such_module"]) == 1
    assert "no_such_module" in capsys.readouterr().err
