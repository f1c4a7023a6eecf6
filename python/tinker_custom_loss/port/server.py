"""A worker's threads: frames in, requests side by side, one reply for each.

All serving threads do the same: wait for their turn to read, read a request, pass the turn on,
compute, reply. So a request is never handed from one thread to another, which would cost a small
one a good part of its time; and there is one thread more than there may be requests, so that
somebody always reads, and a ``ping`` or ``cancel`` is answered whatever the others do.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import select
import threading
import time
from typing import Any

from ..errors import CancelledError, CustomLossError, ProtocolError, RequestError
from .cancellation import Request, current_request
from .frames import FrameReader, FrameTooLargeError, FrameWriter
from .logs import LogStream
from .memory import SharedMemory
from .messagepack import Message, Place, frame_pieces, pack_apart, pack_pieces, unpack
from .process import end, end_if_forked, resident_bytes
from .service import Service, error_message, id_of, op_of

__all__ = ["Server"]

MOST_INTERNAL_IN_A_ROW = 3


class Server:
    """Serves one host until it goes away.

    Args:
        max_in_flight: most requests that are computed at one time; one more is refused.
        memory: what is shared with the host.
    """

    def __init__(
        self,
        reader: FrameReader,
        writer: FrameWriter,
        logs: LogStream,
        service: Service,
        max_in_flight: int,
        memory: SharedMemory,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._logs = logs
        self._service = service
        self._max_in_flight = max_in_flight
        self._memory = memory
        self._turn = _ReadingTurn(reader.fd)
        self._worker = os.getpid()
        self._internal_in_a_row = 0
        self._in_flight: dict[int, Request] = {}
        self._lock = threading.Lock()
        self._started = time.monotonic()

    def start(self) -> None:
        """Start the serving threads. They end with the process."""
        for number in range(self._max_in_flight + 1):
            threading.Thread(
                target=self._serve, name=f"tinker-custom-loss-port-{number}", daemon=True
            ).start()

    def _serve(self) -> None:
        while True:
            try:
                with self._turn:
                    request, message = self._next_request()
                self._compute(request, message)
            except BrokenPipeError:
                end(0)
            except BaseException as error:  # the stream may be anywhere: no thread may go on
                with contextlib.suppress(OSError):
                    self._writer.write(pack_pieces(error_message(error)))
                end(2)

    def _next_request(self) -> tuple[Request, Message]:
        """Read until there is something to compute; answer everything else at once.

        A request is registered before the next frame is read, so a ``cancel`` finds it.
        """
        while True:
            try:
                frame = self._reader.read()
            except FrameTooLargeError as error:
                self._send(error_message(error))
                end(2)
            if frame is None:
                end(0)
            message = None
            try:
                message = unpack(frame)
                request = self._dispatch(message)
            except CustomLossError as error:
                # What is wrong with an id cannot be told under that id.
                about_id = isinstance(error, ProtocolError) and error.path == "id"
                self._send(error_message(error, None if about_id else id_of(message)))
                continue
            if request is not None:
                return request, message

    def _dispatch(self, message: Message) -> Request | None:
        op = op_of(message)
        request_id = id_of(message)
        if request_id is None:
            raise ProtocolError(
                f'a "{op}" needs an "id", a non-negative integer at `id`', path="id"
            )
        if op == "cancel":
            with self._lock:
                request = self._in_flight.get(request_id)
            if request is not None:
                request.cancel()
        elif op == "ping":
            self._send(self._pong(request_id))
        elif op == "terms":
            self._send({**self._service.terms(), "id": request_id})
        elif op in ("compute", "totals"):
            return self._register(request_id)
        else:
            raise ProtocolError(
                f'unknown op "{op}" at `op`; known are compute, totals, cancel, terms and ping',
                path="op",
            )
        return None

    def _register(self, request_id: int) -> Request:
        with self._lock:
            if request_id in self._in_flight:
                raise ProtocolError(
                    f"the id {request_id} is in use by a request in flight", path="id"
                )
            if len(self._in_flight) >= self._max_in_flight:
                raise RequestError(
                    f"{self._max_in_flight} requests are being computed already, which is the "
                    "limit; wait for one of them, or raise --max-in-flight"
                )
            request = self._in_flight[request_id] = Request(request_id)
        return request

    def _compute(self, request: Request, message: Message) -> None:
        current_request.set(request)
        lent, room = None, None
        try:
            place = message.place
            if place is not None:
                message = message.with_payload(self._memory.lend(place))
                lent, room = place, functools.partial(self._memory.room, place)
            if op_of(message) == "totals":
                reply = {**self._service.totals(message), "id": request.id}
            else:
                reply = {**self._service.compute(message, request, room), "id": request.id}
        except BaseException as error:  # whatever a term did, it ends its request and no more
            reply = error_message(error, request.id)
        finally:
            end_if_forked(self._worker)
            current_request.set(None)
        # The host may use the id again, and can no longer cancel, once it has the answer.
        with self._lock:
            del self._in_flight[request.id]
        if request.is_set():
            cancelled = CancelledError("the computation was cancelled by its caller")
            reply = error_message(cancelled, request.id)
        broken = self._is_broken(reply)  # the next answer, of another thread, counts after this one
        self._send(reply, lent)
        if broken:
            logging.getLogger(__name__).error(
                "%d requests in a row have failed by a bug of this package: the worker ends, to be "
                "replaced by a fresh one",
                MOST_INTERNAL_IN_A_ROW,
            )
            self._logs.drain()
            end(3)

    def _is_broken(self, reply: dict[str, Any]) -> bool:
        """One bug is an answer; a process that has no other answer is of no use to anybody."""
        internal = reply["op"] == "error" and reply["error"]["kind"] == "internal"
        with self._lock:
            self._internal_in_a_row = self._internal_in_a_row + 1 if internal else 0
            return self._internal_in_a_row >= MOST_INTERNAL_IN_A_ROW

    def _send(self, message: dict[str, Any], lent: Place | None = None) -> None:
        """Send a message; ``lent`` is where the request that it answers lies in shared memory."""
        self._logs.drain()  # what a request logged is with the host before its answer
        try:
            payload, packed = pack_apart(message)
            self._writer.check(payload.size + len(packed))
        except FrameTooLargeError as error:
            self._send(error_message(RequestError(str(error)), message["id"]), lent)
        except (TypeError, OverflowError, RecursionError) as error:  # no value of MessagePack
            self._send(error_message(error, message["id"]), lent)
        else:
            there = None
            if lent is not None:
                there = self._memory.answer(lent, payload)
                self._memory.give_back(lent)
            self._writer.write(frame_pieces(payload, packed, there))

    def _pong(self, request_id: int) -> dict[str, Any]:
        with self._lock:
            in_flight = len(self._in_flight)
        return {
            "op": "result",
            "id": request_id,
            "in_flight": in_flight,
            "uptime": time.monotonic() - self._started,
            "rss": resident_bytes(),
        }


class _ReadingTurn:
    """The right to read, held by one thread at a time.

    On Linux the kernel passes it on: it wakes one of the waiting threads when there is something
    to read. With a lock, passing it on would wake a thread for every request, and that would
    compete for the interpreter with the thread that computes.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._epoll = None
        if hasattr(select, "epoll"):
            self._epoll = select.epoll()
            self._epoll.register(fd, select.EPOLLIN | select.EPOLLONESHOT)

    def __enter__(self) -> None:
        if self._epoll is None:
            self._lock.acquire()
        else:
            while not self._epoll.poll():
                pass

    def __exit__(self, *_: object) -> None:
        if self._epoll is None:
            self._lock.release()
        else:
            self._epoll.modify(self._fd, select.EPOLLIN | select.EPOLLONESHOT)
