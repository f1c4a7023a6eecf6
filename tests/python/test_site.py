"""The site of docs/ is built only if every link leads somewhere and every page can be found."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_a_broken_link_and_a_page_that_nobody_finds_are_errors(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    for name in ("mkdocs.yml", "docs", "scripts", "python"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / ".make").mkdir()
    (tmp_path / ".make" / "reference-elixir.md").write_text("# Elixir\n")  # make site writes it
    (tmp_path / "docs" / "forgotten.md").write_text("# Forgotten\n\n[nowhere](no-such-page.md)\n")
    built = subprocess.run(
        ["scripts/site.sh", sys.executable], cwd=tmp_path, capture_output=True, text=True
    )
    assert built.returncode == 1
    assert "forgotten.md" in built.stderr.partition("nav")[2]
    assert "link 'no-such-page.md', but the target is not found" in built.stderr
    assert "2 warnings" in built.stderr
