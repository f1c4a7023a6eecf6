"""Payloads in memory that is shared with the host, where a pipe would cost more than the work.

Linux has files that live in memory and never have a name. The worker makes them, the host opens
them through ``/proc/PID/fd``, and they are gone with the last of the two, however it ended. Each
holds one request at a time: the host writes its payload, the worker reads that where it lies, and
writes the answer's behind it.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ProtocolError
from .messagepack import Buffer, Payload, Place
from .process import may_write_any_size, point_at_nothing

__all__ = ["LEAST_SHARED", "SharedFile", "SharedMemory"]

LEAST_SHARED = 1 << 16
"""An answer's payload of fewer bytes goes with its frame, as the pipe is no slower then."""


class SharedFile:
    """One file, and the request that has it."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("tinker_custom_loss", os.MFD_CLOEXEC)
        os.fchmod(self.fd, 0o600)
        self._mapped: mmap.mmap | None = None
        self._reserved = 0
        self.in_use = False

    def view(self, at: int, size: int) -> memoryview:
        """The bytes in the file, not copied. They stay what they are until the host has its answer.

        Raises:
            ProtocolError: the file does not have them.
        """
        there = os.fstat(self.fd).st_size
        if at + size > there:
            raise ProtocolError(
                f"the payload is said to be the {size} bytes from {at} on of a shared file, which "
                f"has {there}"
            )
        if not size:  # perhaps of a file that has no bytes, which cannot be mapped
            return memoryview(b"")
        if self._mapped is None or len(self._mapped) < at + size:
            self._mapped = mmap.mmap(self.fd, there)  # the old one lives on in what refers to it
        return memoryview(self._mapped)[at : at + size]

    def room(self, at: int, size: int) -> memoryview:
        """Memory of the file that may be written to.

        Raises:
            OSError: the system has no memory for it. (To write to what it does not have is a
                signal that ends the process.)
        """
        if at + size > min(self._reserved, os.fstat(self.fd).st_size):  # the host may have cut it
            os.posix_fallocate(self.fd, at, size)
            self._reserved = at + size
        return self.view(at, size)

    def write(self, at: int, pieces: Sequence[Buffer]) -> None:
        """Write ``pieces`` one after another, from ``at`` on, but for one that lies there already.
        The file grows as it has to."""
        views = [memoryview(piece) for piece in pieces if len(piece)]
        if self._mapped is not None and len(views) == 1:
            there = memoryview(self._mapped)[at : at + len(views[0])]
            if len(there) == len(views[0]) and _address(there) == _address(views[0]):
                return
        while views:
            written = os.pwritev(self.fd, views[: os.sysconf("SC_IOV_MAX")], at)
            at += written
            while views and written >= len(views[0]):
                written -= len(views.pop(0))
            if written:
                views[0] = views[0][written:]


class SharedMemory:
    """The files of a worker: as many as asked for, or none where the system has no such files."""

    def __init__(self, count: int) -> None:
        self._files: list[SharedFile] = []
        # By which the host knows that it has opened these and no others.
        self._token = secrets.token_hex(16)
        try:
            if may_write_any_size():
                for _ in range(count):
                    self._files.append(SharedFile())
                    self._files[-1].write(0, [self._token.encode()])
        except (OSError, AttributeError):  # some would leave terms no descriptors: none, then
            for file in self._files:
                os.close(file.fd)
            self._files = []
        descriptors = [file.fd for file in self._files]
        os.register_at_fork(after_in_child=lambda: point_at_nothing(*descriptors))

    def describe(self) -> dict[str, Any] | None:
        """What the host needs in order to open them; None if there are none."""
        if not self._files:
            return None
        return {"descriptors": [file.fd for file in self._files], "token": self._token}

    def lend(self, place: Place) -> memoryview:
        """The payload that the host says is there; the file is in use until :meth:`give_back`.

        Raises:
            ProtocolError: there is no such payload, or another request has the file.
        """
        if place.file >= len(self._files):
            raise ProtocolError(
                f"the payload is said to be in the shared file {place.file}, of {len(self._files)}"
            )
        file = self._files[place.file]
        if file.in_use:
            raise ProtocolError(f"the shared file {place.file} has another request in flight")
        payload = file.view(place.at, place.size)
        file.in_use = True
        return payload

    def room(self, place: Place, size: int) -> memoryview | None:
        """Where the payload of an answer will be, for who wants to make it there.

        None: it should be made elsewhere.
        """
        if size < LEAST_SHARED:
            return None
        try:
            return self._files[place.file].room(_behind(place), size)
        except OSError:
            return None

    def answer(self, place: Place, payload: Payload) -> Place | None:
        """Write the payload of an answer behind that of its request, and say where.

        None: it should go with the frame.
        """
        if payload.size < LEAST_SHARED:
            return None
        at = _behind(place)
        try:
            self._files[place.file].write(at, payload.pieces)
        except OSError:  # no memory is left, say; the pipe needs none
            return None
        return Place(place.file, at, payload.size)

    def give_back(self, place: Place) -> None:
        """Another request may have the file, once the host has the answer."""
        self._files[place.file].in_use = False


def _behind(place: Place) -> int:
    return -(-(place.at + place.size) // mmap.PAGESIZE) * mmap.PAGESIZE


def _address(buffer: Buffer) -> int:
    address: int = np.frombuffer(buffer, np.uint8).ctypes.data
    return address
