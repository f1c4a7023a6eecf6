"""A host of the port protocol for tests: the real worker process, over real pipes."""

from __future__ import annotations

import fcntl
import itertools
import os
import select
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import torch

from tinker_custom_loss import TensorBatch
from tinker_custom_loss.port.messagepack import Message, Payload, frame_pieces, pack, unpack
from tinker_custom_loss.port.messages import Batch, decode_batch
from tinker_custom_loss.port.typed import read

HERE = Path(__file__).parent
PATHOLOGICAL = str(HERE / "pathological.py")
PATIENCE = 60.0  # seconds; only a failing test waits that long


class PortClient:
    """Starts ``python -m tinker_custom_loss.port`` and speaks with it."""

    def __init__(
        self,
        *options: str,
        load: list[str] | None = None,
        await_ready: bool = True,
        module: str = "tinker_custom_loss.port",
    ):
        for path in load or []:
            options = (*options, "--load", str(path))
        from_host, self.to_worker = os.pipe()
        self.from_worker, to_host = os.pipe()
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115

        def put_at_3_and_4() -> None:
            reading = fcntl.fcntl(from_host, fcntl.F_DUPFD, 10)
            writing = fcntl.fcntl(to_host, fcntl.F_DUPFD, 10)
            os.dup2(reading, 3)
            os.dup2(writing, 4)

        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", module, *options],
            pass_fds=(3, 4),
            preexec_fn=put_at_3_and_4,
            stdout=subprocess.DEVNULL,
            stderr=self.stderr,
            cwd=tempfile.gettempdir(),
            env={**os.environ, "PYTHONPATH": str(HERE.parents[1] / "python")},
        )
        os.close(from_host)
        os.close(to_host)
        self._ids = itertools.count(1)
        self._buffer = b""
        self.logs: list[dict[str, Any]] = []
        self.ready = self.receive() if await_ready else None

    def __enter__(self) -> PortClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        try:
            self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self.from_worker)
            self.stderr.close()

    def hang_up(self) -> None:
        if self.to_worker >= 0:
            os.close(self.to_worker)
            self.to_worker = -1

    def send_bytes(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self.to_worker, view) :]

    def send_frame(self, frame: bytes) -> None:
        self.send_bytes(struct.pack(">I", len(frame)) + frame)

    def send(self, op: str, **fields: Any) -> int:
        """Send a message; its id is returned."""
        request_id = fields.setdefault("id", next(self._ids))
        self.send_frame(request({"op": op, **fields}))
        return request_id

    def receive(self, timeout: float = PATIENCE) -> dict[str, Any] | None:
        """The next message that is not a log; logs are kept. None: the worker is gone."""
        while True:
            frame = self._frame(time.monotonic() + timeout)
            if frame is None:
                return None
            message = opened(unpack(frame))
            if message["op"] != "log":
                return message
            self.logs.append(message)

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Send a request and wait for its reply, which must be the next message."""
        request_id = self.send(op, **fields)
        reply = self.receive()
        assert reply is not None, self.printed()
        assert reply["id"] == request_id, reply
        return reply

    def error(self, op: str = "compute", **fields: Any) -> dict[str, Any]:
        """Ask for something that fails; then show that the worker still serves."""
        reply = self.ask(op, **fields)
        assert reply["op"] == "error", reply
        self.assert_serving()
        return reply["error"]

    def assert_serving(self) -> None:
        reply = self.ask("compute", **l2())
        assert reply["op"] == "result", reply
        (gradient,) = gradients(reply)
        assert gradient.tolist() == [-2.0, -4.0]

    def printed(self) -> str:
        """What the process has written to its stderr."""
        self.stderr.seek(0)
        return self.stderr.read().decode()

    def _frame(self, deadline: float) -> bytes | None:
        header = self._bytes(4, deadline)
        return header and self._bytes(int.from_bytes(header, "big"), deadline)

    def _bytes(self, count: int, deadline: float) -> bytes | None:
        while len(self._buffer) < count:
            if not select.select([self.from_worker], [], [], deadline - time.monotonic())[0]:
                raise TimeoutError(f"the worker did not answer; it printed:\n{self.printed()}")
            piece = os.read(self.from_worker, 1 << 20)
            if not piece:
                return None
            self._buffer += piece
        result, self._buffer = self._buffer[:count], self._buffer[count:]
        return result


def batch(*tensors: torch.Tensor) -> TensorBatch:
    return TensorBatch.from_tensors(list(tensors))


def ragged(flat: torch.Tensor, *shapes: tuple[int, ...] | None) -> TensorBatch:
    """A batch for the wire, in which a datum without a tensor has None for its shape."""
    whole = TensorBatch(flat, (tuple(flat.shape),))
    object.__setattr__(whole, "shapes", shapes)
    return whole


def request(message: dict[str, Any]) -> bytes:
    """The frame of a host's message, which may have batches anywhere."""
    return b"".join(frame_pieces(*request_apart(message)))


def request_apart(message: dict[str, Any]) -> tuple[Payload, bytes]:
    """The payload and the message of that frame."""
    payload = Payload()

    def placed(value: Any) -> Any:
        match value:
            case TensorBatch():
                return payload.place(value)
            case dict():
                return {key: placed(inner) for key, inner in value.items()}
            case list():
                return [*map(placed, value)]
        return value

    return payload, msgspec.msgpack.encode(placed(message))


def opened(message: Message) -> dict[str, Any]:
    """The fields of a message, with a list of tensors in place of each batch."""
    fields = dict(message.fields)
    for key, value in fields.items():
        if isinstance(value, dict) and "shapes" in value:
            whole = decode_batch(read(pack(value), Batch, key), message.payload, key)
            fields[key] = TensorBatch(*whole).tensors()
    return fields


def compute(fn: str, logprobs: TensorBatch | None = None, **fields: Any) -> dict[str, Any]:
    """The fields of a request for one term over ``[-1, -2]``."""
    term = {"name": "term", "fn": fn, "weight": 1.0}
    for key in ("params", "run_in_executor", "timeout", "on_error", "on_non_finite"):
        if key in fields:
            term[key] = fields.pop(key)
    return {
        "logprobs": logprobs or batch(torch.tensor([-1.0, -2.0])),
        "regularizers": [term],
        **fields,
    }


def l2(**fields: Any) -> dict[str, Any]:
    return compute("l2", params={"reduction": "token_sum"}, **fields)


def gradients(reply: dict[str, Any]) -> list[torch.Tensor]:
    return reply["gradients"]


def group_is_empty(pid: int, within: float = 10.0) -> bool:
    """Whether every process of a worker's group is gone, or is within some seconds."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if not group(pid):
            return True
        time.sleep(0.01)
    return False


def group(pid: int) -> list[int]:
    """The processes of a worker's group."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and _group_of(name) == pid]


def _group_of(pid: str) -> int | None:
    try:
        stat = Path("/proc", pid, "stat").read_text()
    except OSError:
        return None
    state, _parent, group = stat.rpartition(")")[2].split()[:3]
    return None if state == "Z" else int(group)
