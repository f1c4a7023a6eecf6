"""How time and memory grow with the values of a batch, and with the datums that they are in.

    python tests/bench/growth.py [--largest VALUES]

nll + l2 + entropy + kl, in Python and over the bridge, each point in a process of its own; prints a
table, and for each column the exponent of a power law: 1 is linear. It is fitted to the larger half
of the sizes, since what each call costs hides the growth of small ones.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

VALUES = tuple(4**power * 1000 for power in range(9))
DATUMS = (1, 16, 64, 256, 1024, 4096, 16384)
OF_VALUES = 8  # datums, where values grow
OF_DATUMS = 1_048_576  # values, where datums grow
ROUNDS = 15


def native(values: int, datums: int, rounds: int) -> tuple[float, float]:
    """Milliseconds, and the most megabytes over those of an idle process, the batch among them."""
    import numpy as np
    import torch
    from figures import milliseconds
    from tinker import Datum, ModelInput, TensorData

    from tinker_custom_loss import Composer

    torch.set_num_threads(1)
    terms = [
        {"fn": "l2", "weight": 0.1},
        {"fn": "entropy", "weight": 0.01},
        {"fn": "kl", "weight": 0.1},
    ]
    composer = Composer("nll", terms)

    def batch(values: int, datums: int) -> tuple[list[Datum], list[torch.Tensor]]:
        length = values // datums
        generator = np.random.default_rng(0)

        def random() -> np.ndarray:
            return -generator.exponential(size=length).astype(np.float32)

        weights = np.ones(length, np.float32)
        weights[: length // 3] = 0.0
        data = []
        for _ in range(datums):
            inputs = {"weights": weights.copy(), "reference_logprobs": random()}
            data.append(
                Datum(
                    ModelInput.from_ints([0]),
                    {key: TensorData.from_numpy(array) for key, array in inputs.items()},
                )
            )
        return data, [torch.from_numpy(random()) for _ in range(datums)]

    small = batch(1000, 8)
    composer.compute(*small)
    idle = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    large = batch(values, datums)
    times = [milliseconds(lambda: composer.compute(*large)) for _ in range(rounds)]
    return statistics.median(times), (resident("VmHWM") - idle) / 1e6


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def point(face: str, values: int, datums: int) -> tuple[float, float]:
    arguments = [str(number) for number in (values, datums, ROUNDS)]
    here = Path(__file__)
    command = {
        "native": [sys.executable, str(here), "--point"],
        "bridge": ["mix", "run", "--no-compile", str(here.with_suffix(".exs"))],
    }[face]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{face}, {values} values in {datums} datums:\n{done.stdout}{done.stderr}")
    ms, megabytes = done.stdout.split()[-2:]
    return float(ms), float(megabytes)


def exponent(sizes: Sequence[int], found: Sequence[float]) -> float:
    half = len(sizes) // 2
    logs = [(math.log(x), math.log(max(y, 0.1))) for x, y in zip(sizes, found, strict=True)][half:]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def table(head: str, sizes: Sequence[int], points: Sequence[tuple[int, int]]) -> None:
    print(f"| {head} | Python: ms | MB | over the bridge: ms | MB |")
    print("|--:|--:|--:|--:|--:|", flush=True)
    columns: list[list[float]] = [[], [], [], []]
    for size, (values, datums) in zip(sizes, points, strict=True):
        found = [*point("native", values, datums), *point("bridge", values, datums)]
        for column, number in zip(columns, found, strict=True):
            column.append(number)
        cells = " | ".join(f"{number:.3g}" if number < 100 else f"{number:.0f}" for number in found)
        print(f"| {size:,} | {cells} |", flush=True)
    exponents = " | ".join(f"{exponent(sizes, column):.2f}" for column in columns)
    print(f"| exponent | {exponents} |\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--largest", type=int, default=VALUES[-1], help="values, of the first table"
    )
    parser.add_argument("--point", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(*native(*options.point))
        return
    table(f"datums, of {OF_DATUMS:,} values", DATUMS, [(OF_DATUMS, datums) for datums in DATUMS])
    sizes = [values for values in VALUES if values <= options.largest]
    table(f"values, in {OF_VALUES} datums", sizes, [(values, OF_VALUES) for values in sizes])


if __name__ == "__main__":
    main()
