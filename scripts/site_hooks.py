"""For the site of docs: docstrings name things as Sphinx has them, Markdown does not know that."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:\w+:)?(?:func|class|meth|mod|data|attr|exc):<code>~?([^<]+)</code>")
_SHORT = re.compile(r":(?:\w+:)?(?:func|class|meth|mod|data|attr|exc):<code>~([^<]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """``:func:`~a.b``` becomes ``b``, and ``:func:`a.b``` becomes ``a.b``."""
    html = _SHORT.sub(lambda found: f"<code>{found[1].rpartition('.')[2]}</code>", html)
    return _ROLE.sub(r"<code>\1</code>", html)
