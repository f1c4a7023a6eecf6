"""The door for ErlPort, called as ErlPort calls it: by name, with bytes, over 0 and 1."""

from __future__ import annotations

import math
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from port_client import batch, opened, request
from tinker_custom_loss.port.messagepack import pack, unpack

ROOT = Path(__file__).parents[2]

# What ErlPort's cli.py does, with its Erlang terms left out: each frame on descriptor 0 names a
# function and holds its argument, and the frame on descriptor 1 is what the function returned.
HOST = """
import importlib, os, struct, sys

def read(size):
    data = b""
    while len(data) < size:
        data += os.read(0, size - len(data)) or sys.exit()
    return data

while True:
    function, _, argument = read(*struct.unpack(">I", read(4))).partition(b"\\0")
    module = importlib.import_module("tinker_custom_loss.port.erlport")
    result = getattr(module, function.decode())(
        argument if function == b"compute" else argument.split(b",")
    )
    assert type(result) is bytes, result
    os.write(1, struct.pack(">I", len(result)) + result)
"""

TERMS = '''
import ctypes, math, os, subprocess, sys

def floods_stdout(data, logprobs):
    """Says the same in every way there is."""
    print("print")
    os.write(1, b"write")
    ctypes.CDLL(None).puts(b"puts")
    subprocess.run(["echo", "echo"], check=True)
    return logprobs[0].sum(), {}

def reads_stdin(data, logprobs):
    read = subprocess.run(["cat"], capture_output=True, check=True).stdout + os.read(0, 100)
    return logprobs[0].sum(), {"bytes": len(read)}

def returns_nan(data, logprobs):
    return logprobs[0].detach().sum() * math.nan, {"metric": math.nan}

def exits(data, logprobs):
    sys.exit(3)
'''


class Host:
    def __init__(self, directory: Path) -> None:
        (directory / "erlport_terms.py").write_text(TERMS)
        self.stderr = (directory / "stderr").open("w+b")
        self._process = subprocess.Popen(
            [sys.executable, "-c", HOST],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            cwd=directory,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT / 'python'}:{directory}"},
        )

    def call(self, function: str, argument: bytes) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        frame = function.encode() + b"\0" + argument
        # A stream that something was printed into may promise more than ever comes.
        watchdog = threading.Timer(60, self._process.kill)
        watchdog.start()
        try:
            stdin.write(struct.pack(">I", len(frame)) + frame)
            stdin.flush()
            header = stdout.read(4)
            assert len(header) == 4, "the stream ended"
            return opened(unpack(stdout.read(*struct.unpack(">I", header))))
        finally:
            watchdog.cancel()

    def compute(self, fn: str, request_id: int | None = 7) -> Any:
        message: dict[str, Any] = {
            "op": "compute",
            "logprobs": batch(torch.tensor([-1.0, -2.0])),
            "data": None,
            "base_loss": {"fn": fn},
            "regularizers": [],
        }
        return self.call("compute", request(message | ({} if request_id is None else {"id": 7})))

    def close(self) -> None:
        self._process.communicate(timeout=60)
        self.stderr.close()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    host = Host(tmp_path_factory.mktemp("erlport"))
    yield host
    host.close()


@pytest.fixture
def loaded(host: Host) -> Host:
    reply = host.call("load", b"erlport_terms")
    assert "erlport_terms:exits" in [term["name"] for term in reply["terms"]]
    return host


def test_a_gradient_comes_back_as_the_message_of_the_protocol(host: Host) -> None:
    reply = host.compute("l2")
    assert (reply["op"], reply["id"], reply["loss_total"]) == ("result", 7, 5.0)
    assert reply["gradients"][0].tolist() == [-2.0, -4.0]


def test_a_call_needs_no_id(host: Host) -> None:
    assert host.compute("l2", request_id=None)["id"] is None


def test_terms_lists_what_may_be_named(loaded: Host) -> None:
    reply = loaded.call("compute", pack({"op": "terms", "id": 1}))
    names = [term["name"] for term in reply["terms"]]
    assert {"l2", "erlport_terms:returns_nan"} <= set(names)


def test_nothing_printed_reaches_the_stream(loaded: Host) -> None:
    assert loaded.compute("erlport_terms:floods_stdout")["loss_total"] == -3.0
    assert loaded.compute("l2")["loss_total"] == 5.0
    loaded.stderr.seek(0)
    said = loaded.stderr.read()
    assert all(way in said for way in (b"print", b"write", b"puts", b"echo"))


def test_a_term_that_reads_standard_input_takes_nothing_from_the_stream(loaded: Host) -> None:
    reply = loaded.compute("erlport_terms:reads_stdin")
    assert reply["record"]["base_loss"]["custom"] == {"bytes": 0.0}


@pytest.mark.parametrize(
    ("fn", "kind", "says"),
    [
        ("erlport_terms:exits", "term", "SystemExit: 3"),
        ("erlport_terms:returns_nan", "term", "nan"),
        ("erlport_terms:missing", "request", "there is no term"),
        ("os:getpid", "request", "was not loaded at start-up"),
    ],
)
def test_errors_come_back_as_values(loaded: Host, fn: str, kind: str, says: str) -> None:
    reply = loaded.compute(fn)
    assert (reply["op"], reply["id"], reply["error"]["kind"]) == ("error", 7, kind)
    assert says in reply["error"]["message"]
    assert loaded.compute("l2")["loss_total"] == 5.0


@pytest.mark.parametrize(
    ("request_bytes", "says"),
    [
        (b"", "truncated"),
        (b"\xc1", "invalid opcode"),
        (b"\x92\x01\x02", "expected a map as the whole message, got an array"),
        (pack({"id": 1}), "`op`"),
        (pack({"op": "ping", "id": 1}), "known are compute and terms"),
        (pack({"op": "compute", "id": 1}), "`logprobs`"),
    ],
)
def test_a_malformed_request_is_answered(host: Host, request_bytes: bytes, says: str) -> None:
    reply = host.call("compute", request_bytes)
    assert reply["error"]["kind"] == "protocol"
    assert says in reply["error"]["message"]


def test_what_cannot_be_loaded_changes_nothing(loaded: Host) -> None:
    reply = loaded.call("load", b"no_such_module")
    assert reply["error"]["kind"] == "startup"
    assert "no_such_module" in reply["error"]["message"]
    assert math.isclose(loaded.compute("erlport_terms:floods_stdout")["loss_total"], -3.0)
