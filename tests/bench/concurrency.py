"""How long a step takes whose terms take 200 ms each, against the slowest of them; and two clients.

concurrent_MODE   wall time of a step of 4 such terms / the slowest term, median of 5 steps
concurrent_dask_bare   wall time of 4 calls of 200 ms by Dask alone, with as much to send, / 200 ms
two_clients       wall time of a step of each of two clients of a process, with a term of one
                  second each / of one such client alone, through with_regularizers
two_clients_sdk   the same through the SDK's own queue, for comparison; it has no target
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import importlib.util
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tinker
import torch
from figures import figure
from tinker import types

from tinker_custom_loss import Composer, Regularizer, forward_backward_custom, with_regularizers
from tinker_custom_loss.sandbox import SandboxServer

TERMS, SECONDS, ROUNDS, TARGET = 4, 0.2, 5, 1.1
WARM_UP_SECONDS = 120


def slow(data: Any, logprobs: list[torch.Tensor], *, seconds: float = SECONDS) -> Any:
    time.sleep(seconds)
    return torch.cat(logprobs).square().sum(), {}


async def slow_async(data: Any, logprobs: list[torch.Tensor]) -> Any:
    await asyncio.sleep(SECONDS)
    return torch.cat(logprobs).square().sum(), {}


@contextlib.contextmanager
def places() -> Iterator[dict[str, tuple[Callable[..., Any], Any]]]:
    """Name of each mode: the function, and where it runs."""
    modes: dict[str, tuple[Callable[..., Any], Any]] = {
        "async": (slow_async, False),
        "thread": (slow, True),
        "process": (slow, "process"),
    }
    with contextlib.ExitStack() as stack:
        context = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(TERMS, mp_context=context)
        modes["process_pool"] = (slow, stack.enter_context(pool))
        if importlib.util.find_spec("distributed"):
            from distributed import Client, LocalCluster

            cluster = stack.enter_context(
                LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=None)
            )
            client = stack.enter_context(Client(cluster))
            modes["dask"] = (slow, client.get_executor(pure=False))
        yield modes


def concurrency(fn: Callable[..., Any], place: Any) -> float:
    terms = [Regularizer(fn, 1.0, f"term-{i}", run_in_executor=place) for i in range(TERMS)]
    composer = Composer(None, terms)
    logprobs = [torch.full((1024,), -1.0) for _ in range(8)]

    def ratio() -> float:
        start = time.perf_counter()
        record = composer.compute([None] * 8, logprobs).record
        wall = time.perf_counter() - start
        return wall / max(term["seconds"] for term in record["regularizers"].values())

    # A pool gives its first worker all there is to do while the others still import torch.
    warm_up = time.monotonic() + WARM_UP_SECONDS
    in_a_row = 0
    while in_a_row < 3 and time.monotonic() < warm_up:
        in_a_row = in_a_row + 1 if ratio() < 1.2 else 0
    return statistics.median(ratio() for _ in range(ROUNDS))


def asleep(payload: np.ndarray) -> np.ndarray:
    time.sleep(SECONDS)
    return payload


def of_executor(executor: concurrent.futures.Executor) -> float:
    """What the executor itself takes to send such calls and their results."""
    payload = np.zeros(8 * 1024, np.float32)

    def ratio() -> float:
        start = time.perf_counter()
        futures = [executor.submit(asleep, payload) for _ in range(TERMS)]
        for future in futures:
            future.result()
        return (time.perf_counter() - start) / SECONDS

    return statistics.median(ratio() for _ in range(ROUNDS))


def two_clients(wrap: Callable[[Any], Any]) -> float:
    term = Regularizer(slow, 1.0, "slow", params={"seconds": 1.0})
    datum = types.Datum(types.ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4]})
    os.environ["TINKER_TELEMETRY"] = "0"
    with SandboxServer(seed=0) as server:
        services = [
            tinker.ServiceClient(base_url=server.url, api_key="tml-sandbox") for _ in range(2)
        ]
        clients = [wrap(s.create_lora_training_client("sandbox").result()) for s in services]

        def seconds(clients: list[Any]) -> float:
            start = time.perf_counter()
            futures = [forward_backward_custom(c, [datum], None, [term]) for c in clients]
            futures += [c.optim_step(types.AdamParams(learning_rate=1e-3)) for c in clients]
            for future in futures:
                future.result()
            return time.perf_counter() - start

        seconds(clients)
        ratio = seconds(clients) / seconds(clients[:1])
        for service in services:
            service.holder.close()
    return ratio


def main() -> None:
    torch.set_num_threads(1)
    with places() as modes:
        for name, (fn, place) in modes.items():
            figure(f"concurrent_{name}", concurrency(fn, place), TARGET)
        if "dask" in modes:
            figure("concurrent_dask_bare", of_executor(modes["dask"][1]))
    figure("two_clients", two_clients(with_regularizers), TARGET)
    figure("two_clients_sdk", two_clients(lambda client: client))


if __name__ == "__main__":
    main()
