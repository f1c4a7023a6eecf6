"""What stands in for a client of the SDK: all that it has, and something more."""

from __future__ import annotations

from typing import Any, NoReturn

__all__ = ["Proxy"]


class Proxy:
    """``_client`` to ``isinstance``, ``dir`` and ``repr``; what its attributes are, subclasses say.

    The order of calls, and the number of the step, are those of one object: a copy would have its
    own and send what it likes in between.
    """

    _client: Any

    # What `isinstance` asks after the type itself.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._client)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._client)})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._client!r})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be copied or sent to another process: its calls have "
            "one order, and its steps one count; hand on the object itself"
        )

    def _of_client(self, name: str) -> Any:
        """The client's own attribute, for ``__getattr__``."""
        if name.startswith("__") or name == "_client":  # before __init__
            raise AttributeError(name)
        return getattr(self._client, name)
