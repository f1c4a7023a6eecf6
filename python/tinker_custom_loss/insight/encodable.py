"""An output that refuses no character: a table must not end the training that it shows."""

from __future__ import annotations

from typing import Any, TextIO

__all__ = ["Encodable"]

_DRAWN = "▁▂▃▄▅▆▇█▏▎▍▌▋▊▉∇·…"
_ASCII = str.maketrans(_DRAWN, "_.-~=+*#   :|||g*~")


class Encodable:
    """``file``, in ASCII of the same width where its encoding lacks a character that is drawn: of
    all of them, lest a bar be of two alphabets. What else it lacks, as in the name of a term, is a
    question mark."""

    def __init__(self, file: TextIO) -> None:
        # What rich's displays put in the place of the standard output.
        self._file: TextIO = getattr(file, "rich_proxied_file", file)
        # A StringIO has none, and takes everything.
        self._encoding = getattr(self._file, "encoding", None) or "utf-8"
        self._draws = _can_show(_DRAWN, self._encoding)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        if not self._draws:
            text = text.translate(_ASCII)
        if not _can_show(text, self._encoding):
            text = text.encode(self._encoding, "replace").decode(self._encoding)
        return self._file.write(text)


def _can_show(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
