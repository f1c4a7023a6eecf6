"""For the site: the page of the Elixir modules, and names in docstrings, which are Sphinx's."""

from __future__ import annotations

import re
from typing import Any

from mkdocs.structure.files import File

_ROLE = re.compile(r":(?:\w+:)?(?:func|class|meth|mod|data|attr|exc):<code>~?([^<]+)</code>")
_SHORT = re.compile(r":(?:\w+:)?(?:func|class|meth|mod|data|attr|exc):<code>~([^<]+)</code>")


def on_files(files: Any, config: Any) -> Any:
    """The page that ``make site`` has written, which is not among the docs."""
    page = "reference-elixir.md"
    files.append(File.generated(config, page, abs_src_path=f".make/{page}"))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """``:func:`~a.b``` becomes ``b``, and ``:func:`a.b``` becomes ``a.b``."""
    html = _SHORT.sub(lambda found: f"<code>{found[1].rpartition('.')[2]}</code>", html)
    return _ROLE.sub(r"<code>\1</code>", html)
