"""The examples and the page about the training client are run, not believed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tinker_custom_loss.insight import read_run

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"


def run(path, cwd, *arguments, status=0):
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path), *arguments],
        cwd=cwd,
        env={"PATH": "", "PYTHONPATH": str(ROOT / "python"), "TINKER_TELEMETRY": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stdout


def column(output, pattern):
    return [float(value) for value in re.findall(pattern, output)]


def composed(run):
    return [each["name"] for each in read_run(run).composition["regularizers"]]


def test_the_page_is_one_program(tmp_path):
    page = (ROOT / "docs" / "api" / "trainingclient.md").read_text(encoding="utf-8")
    lines = [""] * len(page.splitlines())
    for block in re.finditer(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        first = page.count("\n", 0, block.start(1))
        code = block[1].splitlines()
        lines[first : first + len(code)] = code  # where they are on the page, for tracebacks
    program = tmp_path / "trainingclient.py"
    program.write_text("\n".join(lines) + "\n", encoding="utf-8")
    output = run(program, tmp_path)
    assert 'the term "failing" raised ZeroDivisionError: no tokens' in output
    assert "this call was refused, because step 0 failed before it" in output


def test_grpo(tmp_path):
    output = run(EXAMPLES / "grpo.py", tmp_path, "--steps", "16")
    assert "yes  the resumed run has the same parameters, bit for bit" in output
    assert composed(tmp_path / "runs" / "grpo") == ["kl", "entropy", "liked"]


def test_dpo(tmp_path):
    output = run(EXAMPLES / "dpo.py", tmp_path, "--steps", "12")
    assert "yes  the accuracy of pairs that were held out rises to 100%" in output
    assert composed(tmp_path / "runs" / "dpo") == ["likelihood", "ratio"]


def test_distill(tmp_path):
    output = run(EXAMPLES / "distill.py", tmp_path, "--steps", "16")
    assert "yes  the reverse KL falls to less than half" in output
    assert composed(tmp_path / "runs" / "distill") == ["entropy"]


def test_an_example_that_did_not_learn_fails(tmp_path):
    output = run(EXAMPLES / "dpo.py", tmp_path, "--steps", "1", status=1)
    assert "NO   the margin" in output


def test_topology_and_sparsity(tmp_path):
    pytest.importorskip("gudhi", reason="needs the extra examples")
    output = run(EXAMPLES / "topology_and_sparsity.py", tmp_path)
    for name in ("topology", "sparsity"):
        values = column(output, rf"{name} ([\d.]+)")
        assert values[-1] < 0.1 * values[0]


def test_the_gradient_of_total_persistence_is_true():
    pytest.importorskip("gudhi", reason="needs the extra examples")
    spec = importlib.util.spec_from_file_location(
        "topology_and_sparsity", EXAMPLES / "topology_and_sparsity.py"
    )
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    # Down, up by 2, down, up by 1 and down: minima at -3 and -2, the younger dies at -1.
    x = torch.tensor([-1.5, -3.0, -1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    loss, metrics = example.total_persistence([None], [x])
    assert float(loss.detach()) == 1.0
    assert metrics == {"pairs": 1.0}
    assert torch.autograd.grad(loss, x)[0].tolist() == [0, 0, 1, -1, 0]

    generator = torch.Generator().manual_seed(0)
    batch = [
        torch.rand(n, generator=generator, dtype=torch.float64).log().requires_grad_()
        for n in (1, 2, 17, 40)
    ]
    assert torch.autograd.gradcheck(lambda *x: example.total_persistence(None, x)[0], batch)


def test_smt_check(tmp_path):
    pytest.importorskip("z3", reason="needs the extra examples")
    output = run(EXAMPLES / "smt_check.py", tmp_path)
    assert set(column(output, r"in (\d+) contradictions")) == {3.0}
    contradictory = column(output, r"token: ([\d.]+)")
    others = column(output, r"contradictions, ([\d.]+)")
    assert others[-1] > 0.3 > 3 * contradictory[-1]
