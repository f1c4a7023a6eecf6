"""What a request to the sandbox can end in beside a mistake of its own."""

from ..errors import RequestError

__all__ = ["ClosedError", "ExpiredError", "UnknownError"]


class UnknownError(RequestError):
    """A session, model, checkpoint or request that this server does not have."""


class ExpiredError(RequestError):
    """A session of which nothing was heard for too long, or something of it."""


class ClosedError(Exception):
    """The server was closed before the request was executed."""
