"""A chart as pixels, by resvg, which the extra ``png`` brings."""

from __future__ import annotations

from ...errors import RequestError

__all__ = ["png"]

_SCALE = 4  # of a chart 480 units wide: 300 dots an inch over 6.4 inches
_LETTER = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><text y="9">{}</text></svg>'


def png(svg: str) -> bytes:
    """The picture of a :func:`standalone` figure, four times as wide as its units.

    Raises:
        RequestError: resvg is not installed, or finds no font, without which it would leave out
            every letter.
    """
    try:
        import resvg_py
    except ModuleNotFoundError:
        raise RequestError(
            "--png needs resvg: pip install 'tinker-custom-loss[png]'; --svg needs nothing"
        ) from None
    if resvg_py.svg_to_bytes(_LETTER.format("M")) == resvg_py.svg_to_bytes(_LETTER.format("")):
        raise RequestError(
            "resvg finds no font on this machine, and would draw charts without a letter; install "
            "one, such as DejaVu (apt install fonts-dejavu-core), or use --svg"
        )
    return bytes(resvg_py.svg_to_bytes(svg, zoom=_SCALE))
