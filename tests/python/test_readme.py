"""The README is run, not believed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tinker import Datum, ModelInput

from tinker_custom_loss import Composer, Regularizer
from tinker_custom_loss.terms import l2, nll

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def only(*blocks: re.Match[str]) -> str:
    """The README with nothing but these blocks left, so that line numbers stay true."""
    kept = [""] * len(README.splitlines())
    for block in blocks:
        first = README.count("\n", 0, block.start("code"))
        lines = block["code"].splitlines()
        kept[first : first + len(lines)] = lines
    return "\n".join(kept) + "\n"


def blocks(language: str) -> list[re.Match[str]]:
    found = re.finditer(rf"^```{language}\n(?P<code>.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return list(found)


def test_python_blocks_run_in_order(tmp_path: Path) -> None:
    """A block that begins with ``# NAME.py`` is that file; the others are one program."""
    program = []
    for block in blocks("python"):
        if name := re.match(r"# (\w+\.py)\n", block["code"]):
            (tmp_path / name[1]).write_text(only(block), encoding="utf-8")
        else:
            program.append(block)
    assert len(program) >= 2
    (tmp_path / "readme.py").write_text(only(*program), encoding="utf-8")

    ran = subprocess.run(
        [sys.executable, "-W", "error", "readme.py"],
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": str(ROOT / "python"), "TINKER_TELEMETRY": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "regularizers/smoothness/contribution" in ran.stdout


def test_telemetry_is_the_documented_record() -> None:
    (record,) = blocks("json")
    losses = next(block for block in blocks("python") if "# my_losses.py" in block["code"])
    names: dict[str, Any] = {}
    exec(compile(only(losses), "README.md", "exec"), names)

    composer = Composer(
        nll, [Regularizer(names["smoothness"], 0.1, "smoothness"), Regularizer(l2, 0.01, "l2")]
    )
    data = [Datum(model_input=ModelInput.empty())] * 2
    logprobs = [torch.tensor([-0.1, -2.3, -0.7]), torch.tensor([-1.2, -0.4])]
    assert_documented(json.loads(record["code"]), composer.compute(data, logprobs).telemetry)


def assert_documented(documented: Any, real: Any, key: str = "") -> None:
    if isinstance(documented, dict):
        for inner in documented:
            assert_documented(documented[inner], real[inner], inner)
    elif key != "seconds":
        assert real == pytest.approx(documented, abs=5e-5), key


@pytest.mark.parametrize("document", sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")]))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"
