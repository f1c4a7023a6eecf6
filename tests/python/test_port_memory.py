"""Payloads in shared memory, as a host that is not ours would use it."""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import os
import resource
import struct
import time
import weakref

import pytest
import torch

from port_client import PortClient, batch, compute, l2, request_apart
from tinker_custom_loss import CustomLossError
from tinker_custom_loss.errors import ProtocolError
from tinker_custom_loss.port.memory import LEAST_SHARED, SharedFile, SharedMemory
from tinker_custom_loss.port.messagepack import Message, Payload, Place, frame_pieces, unpack
from tinker_custom_loss.port.service import Service
from tinker_custom_loss.terms import CATALOGUE
from tinker_custom_loss.terms.registry import Registry

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="of Linux")

LARGE = torch.full((LEAST_SHARED,), -1.0)


class SharingClient(PortClient):
    """A host that has opened the shared files of its worker."""

    def __init__(self) -> None:
        super().__init__("--shared-memory", "2")
        offered = self.ready["shared_memory"]
        directory = f"/proc/{self.process.pid}/fd"
        self.files = [os.open(f"{directory}/{fd}", os.O_RDWR) for fd in offered["descriptors"]]
        self.token = offered["token"]

    def __exit__(self, *error: object) -> None:
        for fd in self.files:
            os.close(fd)
        super().__exit__(*error)

    def share(self, file: int = 0, place: Place | None = None, **fields: object) -> int:
        """Send a ``compute`` whose payload is in a file; say that it is at ``place``."""
        request_id = next(self._ids)
        payload, packed = request_apart({"op": "compute", "id": request_id, **fields})
        data = b"".join(payload.pieces)
        assert os.pwrite(self.files[file], data, 0) == len(data)
        place = place or Place(file, 0, len(data))
        self.send_frame(b"".join(frame_pieces(payload, packed, place)))
        return request_id

    def answer(self) -> dict:
        """The next answer, with the gradient from the file that it says."""
        frame = self._frame(time.monotonic() + 60)
        message = unpack(frame)
        if message.place is not None:
            data = os.pread(self.files[message.place.file], message.place.size, message.place.at)
            return {
                **message.fields,
                "gradient": torch.frombuffer(bytearray(data), dtype=torch.float32),
            }
        return message.fields


@pytest.fixture(scope="module")
def worker():
    with SharingClient() as client:
        yield client


class TestWorker:
    def test_it_offers_files_without_a_name_that_only_its_user_may_open(self, worker):
        for fd in worker.files:
            assert os.fstat(fd).st_nlink == 0
            assert os.fstat(fd).st_mode & 0o777 == 0o600
            assert os.pread(fd, 32, 0) == worker.token.encode()

    def test_it_offers_none_unasked(self):
        with PortClient() as client:
            assert client.ready["shared_memory"] is None

    def test_it_reads_a_payload_where_it_lies_and_answers_behind_it(self, worker):
        for value in (-1.0, -2.0):  # the second time in memory that is mapped already
            worker.share(**l2(logprobs=batch(value * -LARGE)))
            reply = worker.answer()
            assert reply["op"] == "result", reply
            assert torch.equal(reply["gradient"], 2 * value * -LARGE)
            request = os.pread(worker.files[0], LARGE.nbytes, 0)
            assert request == (value * -LARGE).numpy().tobytes()

    def test_two_requests_at_one_time_have_a_file_each(self, worker):
        ids = [worker.share(n, **l2(logprobs=batch((n + 1) * LARGE))) for n in (0, 1)]
        for _ in ids:
            reply = worker.answer()
            n = ids.index(reply["id"])
            assert torch.equal(reply["gradient"], 2 * (n + 1) * LARGE)

    def test_a_small_answer_goes_with_its_frame(self, worker):
        worker.share(gradients=False, **l2(logprobs=batch(LARGE)))
        assert worker.answer()["gradients"] is None

    @pytest.mark.parametrize(
        ("place", "sentence"),
        [
            (Place(0, 1 << 30, 8), "of a shared file, which has"),
            (Place(0, 0, 1 << 40), "of a shared file, which has"),
            (Place(0, (1 << 64) - 1, (1 << 64) - 1), "of a shared file, which has"),
            (Place(2, 0, 8), "in the shared file 2, of 2"),
            (Place((1 << 32) - 1, 0, 8), f"in the shared file {(1 << 32) - 1}, of 2"),
            (Place(0, 0, 8), "do not lie in the payload"),
        ],
    )
    def test_a_place_that_is_none_is_an_error_that_says_so(self, worker, place, sentence):
        request_id = worker.share(0, place, **l2(logprobs=batch(LARGE)))
        reply = worker.answer()
        assert reply["id"] == request_id
        assert (reply["op"], reply["error"]["kind"]) == ("error", "protocol")
        assert sentence in reply["error"]["message"]
        worker.share(**l2(logprobs=batch(LARGE)))
        assert torch.equal(worker.answer()["gradient"], 2 * LARGE)

    def test_a_header_that_is_cut_is_an_error(self, worker):
        for size in range(1, 23):
            worker.send_frame((b"\xc7\x14\x01" + struct.pack(">IQQ", 0, 0, 8))[:size])
            reply = worker.answer()
            assert (reply["op"], reply["error"]["kind"]) == ("error", "protocol")


def test_a_file_has_one_request_at_a_time():
    memory = SharedMemory(1)
    memory.lend(Place(0, 0, 8))
    with pytest.raises(Exception, match="another request in flight"):
        memory.lend(Place(0, 0, 8))
    memory.give_back(Place(0, 0, 8))
    memory.lend(Place(0, 0, 8))


@contextlib.contextmanager
def limited(limit: int, value: int):
    """With a limit of this process lowered."""
    soft, hard = resource.getrlimit(limit)
    resource.setrlimit(limit, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(limit, (soft, hard))


def test_there_are_no_files_where_a_large_one_would_kill_who_writes_it():
    with limited(resource.RLIMIT_FSIZE, 1 << 20):
        assert SharedMemory(2).describe() is None


def test_there_are_no_files_and_no_descriptors_gone_where_not_all_can_be_made():
    spare = [os.dup(0) for _ in range(3)]  # the lowest numbers that are free
    for fd in spare:
        os.close(fd)
    with limited(resource.RLIMIT_NOFILE, max(spare) + 1):
        assert SharedMemory(8).describe() is None
        again = [os.dup(0) for _ in range(3)]
    for fd in again:
        os.close(fd)
    assert again == spare


def test_a_file_that_was_cut_and_written_again_is_read_anew():
    file = SharedFile()
    file.write(0, [b"\x01" * 10_000])
    assert bytes(file.view(0, 10_000)) == b"\x01" * 10_000
    os.ftruncate(file.fd, 0)
    file.write(0, [b"\x02" * 3, b"\x03" * 20_000])
    assert bytes(file.view(2, 3)) == b"\x02\x03\x03"
    assert bytes(file.view(20_000, 3)) == b"\x03" * 3


def test_a_file_that_was_cut_has_a_payload_of_no_bytes():
    file = SharedFile()
    assert file.view(0, 0) == b""
    with pytest.raises(ProtocolError, match="which has 0"):
        file.view(0, 1)


def test_there_is_room_again_in_a_file_that_was_cut():
    """To write to a mapped page that the file no longer has would end the process."""
    file = SharedFile()
    for value in (b"\x01", b"\x02"):
        room = file.room(4096, 100_000)
        assert os.fstat(file.fd).st_blocks * 512 >= 100_000  # that it has, and not only promises
        room[:] = value * 100_000
        assert os.pread(file.fd, 100_000, 4096) == value * 100_000
        os.ftruncate(file.fd, 10)


def test_an_answer_that_lies_there_already_is_not_written_over():
    memory = SharedMemory(1)
    place = Place(0, 0, 0)
    made = memory.room(place, LEAST_SHARED)
    made[:] = b"\x05" * LEAST_SHARED
    payload = Payload()
    payload.place(batch(torch.frombuffer(made, dtype=torch.float32)))
    assert memory.answer(place, payload) == Place(0, 0, LEAST_SHARED)
    assert bytes(made) == b"\x05" * LEAST_SHARED


def test_an_answer_of_that_size_that_lies_elsewhere_is_written():
    memory = SharedMemory(1)
    place = Place(0, 0, 0)
    room = memory.room(place, LEAST_SHARED)
    payload = Payload()
    payload.place(batch(torch.ones(LEAST_SHARED // 4)))
    memory.answer(place, payload)
    assert torch.equal(torch.frombuffer(room, dtype=torch.float32), torch.ones(LEAST_SHARED // 4))


def test_where_the_system_has_no_memory_the_gradient_is_made_elsewhere(monkeypatch):
    def no_space(*_):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    assert SharedMemory(1).room(Place(0, 0, 8), LEAST_SHARED) is None


def test_a_gradient_is_made_where_there_is_room_for_it():
    payload, packed = request_apart({"id": 1, **compute("l2", batch(LARGE))})
    message = unpack(packed).with_payload(memoryview(b"".join(payload.pieces)))
    room = memoryview(bytearray(LARGE.nbytes))
    reply = Service(Registry()).compute(message, room=lambda size: room[:size])
    there = torch.frombuffer(room, dtype=torch.float32)
    assert torch.equal(there, 2 * LARGE)
    assert reply["gradients"].flat.data_ptr() == there.data_ptr()


KEYS = ("logprobs", "old_logprobs", "reference_logprobs", "teacher_logprobs")


def request_for_any_term(name: str, shape: tuple[int, ...]) -> tuple[dict, bytes]:
    """The fields of a request for a term of the catalogue, and its payload."""
    generator = torch.Generator().manual_seed(0)

    def column(make):
        return batch(*(make(index) for index in range(4)))

    def logprobs(_index):
        return torch.randn(shape, generator=generator).log_softmax(-1) - 0.1

    inputs = {key: column(logprobs) for key in KEYS}
    inputs |= {
        "weights": column(lambda _: torch.ones(shape)),
        "advantages": column(lambda _: torch.randn(shape, generator=generator)),
        "target_tokens": column(lambda _: torch.ones(shape, dtype=torch.int64)),
        "group": column(lambda index: torch.tensor([index // 2])),
        "chosen": column(lambda index: torch.tensor([index % 2])),
    }
    data = {"count": 4, "inputs": inputs}
    message = {**compute(name, column(logprobs)), "data": data}
    payload, packed = request_apart(message)
    return unpack(packed), b"".join(payload.pieces)


def placed(message: Message, file: SharedFile, size: int) -> Message:
    """``message`` with a payload that is in a file."""
    payload = file.view(0, size)
    return Message(message.op, message.id, message.packed, payload, Place(0, 0, size))


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_term_of_the_catalogue_neither_keeps_nor_changes_what_it_borrows(name):
    answers = set()
    for shape in ((6,), (6, 3)):
        message, payload = request_for_any_term(name, shape)
        file = SharedFile()
        file.write(0, [payload])
        message = placed(message, file, len(payload))
        with contextlib.suppress(CustomLossError):  # it is for the other shape
            answers.add(Service(Registry()).compute(message)["op"])
        assert os.pread(file.fd, len(payload), 0) == payload
        mapped = weakref.ref(file._mapped)
        del file, message
        gc.collect()  # of an error and its traceback
        assert mapped() is None
    assert answers == {"result"}


@functools.wraps(CATALOGUE["l2"])
def wraps_l2(data, logprobs):
    kept.append(torch.from_numpy(data[0].loss_fn_inputs["weights"].to_numpy()))
    return (logprobs[0] ** 2).sum(), {}


kept: list[torch.Tensor] = []


def test_a_term_that_wraps_one_of_the_catalogue_is_given_a_copy(monkeypatch):
    registry = Registry()
    monkeypatch.setattr(registry, "resolve", lambda _name: wraps_l2)
    data = {"count": 1, "inputs": {"weights": batch(LARGE)}}
    payload, packed = request_apart(compute("wraps_l2", batch(LARGE), data=data))
    file = SharedFile()
    file.write(0, payload.pieces)
    Service(registry).compute(placed(unpack(packed), file, payload.size))
    file.write(0, [bytes(payload.size)])  # the next request's
    assert torch.equal(kept.pop(), LARGE)
