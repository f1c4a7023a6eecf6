"""Every picture in the docs is made by the program from the run that is committed beside it."""

from __future__ import annotations

from pathlib import Path

from tinker_custom_loss.__main__ import main

DOCS = Path(__file__).parents[2] / "docs"


def test_the_pictures_are_those_of_the_committed_run(tmp_path):
    run, page = DOCS / "runs" / "demo", tmp_path / "report.html"
    assert main(["report", str(run), "-o", str(page), "--svg", str(tmp_path)]) == 0
    pictures = sorted((DOCS / "pictures").glob("*.svg"))
    assert pictures
    for picture in pictures:
        assert picture.read_text("utf-8") == (tmp_path / picture.name).read_text("utf-8"), (
            f"{picture.name} is not what the program makes: run make pictures"
        )
