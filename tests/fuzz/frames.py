"""Mutated and random frames into the Python decoder: every one is a message or an error value.

``python tests/fuzz/frames.py [COUNT [SEED]]`` prints what came of them and the memory it took.
"""

from __future__ import annotations

import json
import math
import os
import random
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinker_custom_loss.errors import CustomLossError
from tinker_custom_loss.port.memory import SharedMemory
from tinker_custom_loss.port.messagepack import Payload, Place, frame_pieces, pack, unpack
from tinker_custom_loss.port.messages import Terms, decode_compute
from tinker_custom_loss.port.service import id_of, op_of
from tinker_custom_loss.port.typed import read

VECTORS = Path(__file__).parents[1] / "vectors"
MEMORY_LIMIT = 256 << 20
PLACES = ((0, 8), (0, 4096), (4095, 2), (1 << 40, 8), (8, (1 << 64) - 1), ((1 << 64) - 1, 1))
INTERESTING = [b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x00" * 4, b"\xdd\xff\xff\xff\xff", b"\xc1"]
INTERESTING += [b"\xdf\x80\x00\x00\x00", b"\xc6\xff\xff\xff\xff", b"\xc9\xff\xff\xff\xff\xff"]
INTERESTING += [b"\xc7\x14\x01" + struct.pack(">IQQ", 0, at, size) for at, size in PLACES]
INTERESTING += [b"\xcb\x7f\xf8" + b"\x00" * 6, b"\xcf" + b"\xff" * 8, b"\xd3\x80" + b"\x00" * 7]


def frames(seed: int) -> Iterator[bytes]:
    """Frames without end, the same for the same seed."""
    dice = random.Random(seed)
    known = [bytes.fromhex(json.loads(p.read_text())["hex"]) for p in VECTORS.glob("messages/*")]
    for name in ("formats.json", "invalid.json"):
        known += [bytes.fromhex(v["hex"]) for v in json.loads((VECTORS / name).read_text())]
    known = sorted(frame for frame in known if len(frame) < 4096)
    while True:
        kind = dice.random()
        if kind < 0.8:
            frame = dice.choice(known)
            if dice.random() < 0.2:  # it says that its payload is in shared memory
                frame = placed(frame, dice)
            for _ in range(dice.choice((1, 1, 1, 2, 8))):
                frame = mutated(frame, dice, known)
            yield frame
        elif kind < 0.9:
            yield dice.randbytes(int(dice.expovariate(1 / 50)))
        else:
            yield pack({"op": dice.choice(("compute", "cancel", "ping")), **random_map(dice, 4)})


def placed(frame: bytes, dice: random.Random) -> bytes:
    """``frame`` with a place where its payload was."""
    payload = frame[:1] == b"\xc6"
    size = int.from_bytes(frame[1:5], "big") if payload else 8
    place = Place(dice.choice((0, 0, 0, 1, 2)), dice.choice((0, 0, 8, 5000)), size)
    return bytes(frame_pieces(Payload(), b"", place)[0]) + (frame[5 + size :] if payload else frame)


def mutated(frame: bytes, dice: random.Random, known: list[bytes]) -> bytes:
    """``frame`` with one thing wrong."""
    at = dice.randrange(len(frame) + 1)
    end = min(len(frame), at + int(dice.expovariate(1 / 8)))
    match dice.randrange(7):
        case 0:
            return frame[:at] + bytes([dice.randrange(256)]) + frame[at + 1 :]
        case 1:
            return frame[:at] + frame[end:]
        case 2:
            return frame[:at] + dice.randbytes(end - at) + frame[at:]
        case 3:
            return frame[:at]
        case 4:
            return frame[:at] + dice.choice(INTERESTING) + frame[end:]
        case 5:
            other = dice.choice(known)
            return frame[:at] + other[dice.randrange(len(other) + 1) :]
        case _:
            return bytes([dice.choice((0x91, 0x81))]) * dice.randrange(200) + frame


def random_map(dice: random.Random, depth: int) -> dict[str, Any]:
    names = ("id", "logprobs", "data", "base_loss", "regularizers", "fn", "params", "shapes", "x")
    return {dice.choice(names): random_value(dice, depth) for _ in range(dice.randrange(6))}


def random_value(dice: random.Random, depth: int) -> Any:
    kind = dice.randrange(10)
    if depth and kind < 2:
        return random_map(dice, depth - 1)
    if depth and kind < 4:
        return [random_value(dice, depth - 1) for _ in range(dice.randrange(6))]
    return dice.choice(
        (
            None,
            True,
            dice.randrange(-(2**63), 2**64),
            dice.randrange(4),
            struct.unpack("d", dice.randbytes(8))[0],
            math.nan,
            "float32",
            "l2",
            dice.randbytes(dice.randrange(64)),
        )
    )


shared = SharedMemory(2)
for descriptor in (shared.describe() or {"descriptors": []})["descriptors"]:
    os.ftruncate(descriptor, 4096)


def outcome(frame: bytes) -> str:
    """What the worker makes of a frame: "computable", "another message", or the kind of an error.

    Anything but an error of this package is a failure, and raised.
    """
    try:
        message = unpack(frame)
        id_of(message)
        if op_of(message) != "compute":
            return "another message"
        if message.place is not None:
            payload = shared.lend(message.place)
            shared.give_back(message.place)
            message = message.with_payload(payload)
        decode_compute(message)
        read(message.packed, Terms)
    except CustomLossError as error:
        str(error)
        return error.kind
    return "computable"


def memory(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) << 10
    return 0


def fuzz(count: int, seed: int) -> tuple[Counter[str], int]:
    """The outcomes of ``count`` frames, and how much more memory they took at the worst moment."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    before = memory("VmRSS")
    outcomes: Counter[str] = Counter()
    source = frames(seed)
    for _ in range(count):
        frame = next(source)
        try:
            outcomes[outcome(frame)] += 1
        except BaseException as error:
            raise AssertionError(f"{error!r} from the frame {frame.hex()}") from error
    return outcomes, memory("VmHWM") - before


if __name__ == "__main__":
    count, seed = (int(text) for text in (sys.argv[1:] + ["1000000", "4"][len(sys.argv) - 1 :])[:2])
    started = time.monotonic()
    outcomes, spike = fuzz(count, seed)
    seconds = time.monotonic() - started
    print(f"python: {count} frames, seed {seed}, {seconds:.0f} s, {dict(outcomes)}")
    print(f"python: crashes 0, memory +{spike / 2**20:.1f} MiB at most")
    sys.exit(spike > MEMORY_LIMIT)
