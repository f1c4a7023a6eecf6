"""The site of docs/ is built only if every link leads somewhere and every page can be found."""

from __future__ import annotations

import html.parser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def copied(to: Path) -> None:
    for name in ("mkdocs.yml", "docs", "scripts", "python"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, to / name)
    (to / ".make").mkdir()
    (to / ".make" / "reference-elixir.md").write_text("# Elixir\n")  # make site writes it


def built(at: Path) -> subprocess.CompletedProcess[str]:
    command = ["scripts/site.sh", sys.executable]
    return subprocess.run(command, cwd=at, capture_output=True, text=True)


def test_a_page_can_be_switched_between_light_and_dark_and_asks_no_host(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    copied(tmp_path)
    done = built(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    site = tmp_path / ".make" / "site"

    schemes, switches, fetched = {}, [], []

    class Tags(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            given = dict(attributes)
            if given.get("name") == "__palette":
                schemes[given["id"]] = given["data-md-color-scheme"]
            elif tag == "label" and given["for"].startswith("__palette"):
                switches.append(given["for"])
            if tag in ("script", "link", "img", "iframe", "source"):
                fetched.append(given.get("src") or given.get("href") or "")

    Tags().feed((site / "index.html").read_text(encoding="utf-8"))
    assert set(schemes.values()) == {"default", "slate"}
    assert sorted(switches) == sorted(schemes)
    assert fetched
    assert not [url for url in fetched if "//" in url]
    styles = [file.read_text(encoding="utf-8") for file in site.rglob("*.css")]
    assert styles
    assert not [
        style for style in styles if re.search(r"""url\(["']?(https?:)?//|@import""", style)
    ]


def test_a_broken_link_and_a_page_that_nobody_finds_are_errors(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    copied(tmp_path)
    (tmp_path / "docs" / "forgotten.md").write_text("# Forgotten\n\n[nowhere](no-such-page.md)\n")
    done = built(tmp_path)
    assert done.returncode == 1
    assert "forgotten.md" in done.stderr.partition("nav")[2]
    assert "link 'no-such-page.md', but the target is not found" in done.stderr
    assert "2 warnings" in done.stderr
