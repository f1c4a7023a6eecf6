"""The README and the guides are run, not believed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tinker import Datum, ModelInput

from tinker_custom_loss import Composer, Regularizer
from tinker_custom_loss.sandbox import SandboxServer
from tinker_custom_loss.terms import l2, nll

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCUMENTS = sorted([README, *ROOT.glob("docs/**/*.md")])
SANDBOX = "http://127.0.0.1:8000"  # where guides have one


def blocks(document: Path, language: str) -> list[re.Match[str]]:
    text = document.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(?P<code>.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return list(found)


def only(*blocks: re.Match[str]) -> str:
    """The document with nothing but these blocks left, so that line numbers stay true."""
    text = blocks[0].string
    kept = [""] * len(text.splitlines())
    for block in blocks:
        first = text.count("\n", 0, block.start("code"))
        lines = block["code"].splitlines()
        kept[first : first + len(lines)] = lines
    return "\n".join(kept) + "\n"


def run(document: Path, directory: Path) -> str:
    """What the Python of a document prints.

    A block that begins with ``# NAME.py`` is that file; the others are one program.
    """
    program = []
    for block in blocks(document, "python"):
        if name := re.match(r"# (\w+\.py)\n", block["code"]):
            (directory / name[1]).write_text(only(block), encoding="utf-8")
            compile(only(block), name[1], "exec")
        else:
            program.append(block)
    if not program:
        return ""
    text = only(*program)
    with contextlib.ExitStack() as stack:
        if SANDBOX in text:
            text = text.replace(SANDBOX, stack.enter_context(SandboxServer()).url)
        (directory / "program.py").write_text(text, encoding="utf-8")
        ran = execute(directory)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def execute(directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "program.py"],
        cwd=directory,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT / "python"),
            "TINKER_TELEMETRY": "0",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    "document",
    # Those of docs/api have runners of their own.
    [page for page in [README, *ROOT.glob("docs/*.md")] if blocks(page, "python")],
    ids=lambda document: document.name,
)
def test_python_blocks_run_in_order(document: Path, tmp_path: Path) -> None:
    printed = run(document, tmp_path)
    if document == README:
        assert "regularizers/smoothness/contribution" in printed
        losses = [float(line.split()[0]) for line in printed.splitlines()[:5]]
        assert losses == sorted(losses, reverse=True)  # a first example that learns
        assert losses[-1] < losses[0] / 2


def test_the_tutorial_prints_what_it_shows(tmp_path: Path) -> None:
    tutorial = ROOT / "docs" / "getting-started-python.md"
    printed = {line.rstrip() for line in run(tutorial, tmp_path).splitlines()}
    (table,) = blocks(tutorial, "text")
    assert set(table["code"].splitlines()) <= printed
    assert (tmp_path / "runs" / "first" / "metrics.jsonl").exists()


def test_the_notebook_trains_and_draws(tmp_path: Path) -> None:
    notebook = json.loads((ROOT / "docs" / "getting-started.ipynb").read_text("utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert all(not c.get("outputs") for c in notebook["cells"])
    # What a notebook draws of the last line of a cell is what its object gives it.
    cells[-1] = f"drawn = {cells[-1]}\nprint(drawn._repr_svg_())"
    (tmp_path / "program.py").write_text("\n".join(cells), encoding="utf-8")
    ran = execute(tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "smoothness" in ran.stdout
    assert "<svg" in ran.stdout


def test_the_record_is_the_documented_record() -> None:
    (record,) = blocks(README, "json")
    losses = next(block for block in blocks(README, "python") if "# my_losses.py" in block["code"])
    names: dict[str, Any] = {}
    exec(compile(only(losses), "README.md", "exec"), names)

    composer = Composer(
        nll, [Regularizer(names["smoothness"], 0.1, "smoothness"), Regularizer(l2, 0.01, "l2")]
    )
    data = [Datum(model_input=ModelInput.empty())] * 2
    logprobs = [torch.tensor([-0.1, -2.3, -0.7]), torch.tensor([-1.2, -0.4])]
    assert_documented(json.loads(record["code"]), composer.compute(data, logprobs).record)


def assert_documented(documented: Any, real: Any, key: str = "") -> None:
    if isinstance(documented, dict):
        for inner in documented:
            assert_documented(documented[inner], real[inner], inner)
    elif key not in ("seconds", "compute_seconds"):
        assert real == pytest.approx(documented, abs=5e-5), key


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"
