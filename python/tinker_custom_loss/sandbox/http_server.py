"""Tinker's HTTP: connections, bodies, and which status an error has."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, cast

from ..errors import RequestError
from .api import json_answer, sentence
from .errors import ClosedError, ExpiredError, UnknownError
from .wire import decompress

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .api import Api
    from .faults import FaultPlan

__all__ = ["HttpServer"]

logger = logging.getLogger(__name__)

# The SDK asks for it through a connection pool of its own that it forgets without closing it.
_LAST_OF_ITS_CONNECTION = "client/config"


class HttpServer(ThreadingHTTPServer):
    """One thread a connection; closing it ends connections that a client keeps open."""

    request_queue_size = 128

    def __init__(self, host: str, port: int, api: Api, faults: FaultPlan | None) -> None:
        self.api = api
        self.faults = faults
        self.closing = False
        self._connections: dict[socket.socket, threading.Thread] = {}
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        # A daemon, so that a script that forgets to close the server can end.
        self._connections[request] = thread = threading.Thread(
            target=self.process_request_thread, args=(request, client_address), daemon=True
        )
        thread.start()

    def shutdown_request(self, request: Any) -> None:
        self._connections.pop(request, None)
        super().shutdown_request(request)

    def server_close(self) -> None:
        self.closing = True
        connections = list(self._connections.items())
        for connection, _ in connections:
            with contextlib.suppress(OSError):  # the client was faster
                connection.shutdown(socket.SHUT_RD)
        for _, thread in connections:
            thread.join()
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a connection from %s ended early", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # with Nagle's algorithm every call takes 45 ms
    wbufsize = -1  # head and body of an answer in one segment

    def do_POST(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def _answer(self) -> None:
        server = cast("HttpServer", self.server)
        endpoint = self.path.partition("?")[0].removeprefix("/api/v1/").strip("/")
        fault = None if server.faults is None else server.faults.on_the_way(endpoint)
        if fault is not None and fault.lost:
            self.close_connection = True
            return
        if fault is not None and fault.status is not None:
            self._read_past_the_body()
            self._send(
                fault.status,
                *json_answer({"detail": "a fault that was asked for"}),
                {"retry-after": str(fault.retry_after)},
            )
            return
        answer = self._carry_out(endpoint, server.api)
        if fault is not None and fault.answer_lost:
            self.close_connection = True
            return
        self._send(*answer, {"Connection": "close"} if endpoint == _LAST_OF_ITS_CONNECTION else {})

    def _carry_out(self, endpoint: str, api: Api) -> tuple[int, str, bytes]:
        """Status, content type and body of the answer."""
        try:
            return 200, *api.answer(self.command, self.path, self._body(), self.headers)
        except (ClosedError, ExpiredError) as error:
            return 410, *json_answer({"detail": str(error)})
        except RequestError as error:
            status = 404 if isinstance(error, UnknownError) else 400
            return status, *json_answer({"detail": sentence(error)})
        except Exception as error:
            logger.exception("%s failed", endpoint)
            return 500, *json_answer({"detail": f"{type(error).__name__}: {error}"})

    def _send(
        self, status: int, content_type: str, body: bytes, headers: Mapping[str, str]
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection |= cast("HttpServer", self.server).closing

    def _read_past_the_body(self) -> None:
        # Else the next request on this connection would begin in it.
        with contextlib.suppress(RequestError):
            self._body()

    def _body(self) -> bytes:
        try:
            length = int(self.headers.get("content-length") or 0)
        except ValueError:
            length = -1
        if length < 0 or self.headers.get("transfer-encoding"):
            self.close_connection = True  # where this body ends is not known
            raise RequestError("send the body with a Content-Length")
        body = self.rfile.read(length)
        encoding = self.headers.get("content-encoding") or "identity"
        if encoding == "zstd":
            return decompress(body)
        if encoding != "identity":
            raise RequestError(f"the sandbox reads bodies in zstd or plain, not in {encoding}")
        return body

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)
