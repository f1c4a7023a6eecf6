"""For all tests: patience, and training clients of the official SDK against their own sandbox."""

import os

import pytest
import tinker
import torch
from hypothesis import HealthCheck, settings

from tinker_custom_loss.sandbox import SandboxServer

# The sandbox, the client and the terms compute at the same time, on as few as two cores.
torch.set_num_threads(1)

# The same examples in every run, and new ones for `make properties`. A busy machine is no failure.
settings.register_profile(
    "same", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.register_profile(
    "new",
    settings.get_profile("same"),
    derandomize=False,
    database=None,
    print_blob=True,
    max_examples=int(os.environ.get("EXAMPLES", "3000")),
)
settings.load_profile("same")


@pytest.fixture
def quiet_sdk(monkeypatch):
    monkeypatch.setenv("TINKER_TELEMETRY", "0")


@pytest.fixture
def sandbox(quiet_sdk):
    with SandboxServer(seed=0) as server:
        yield server


@pytest.fixture
def new_client(sandbox):
    """A function that gives a new client, whose model starts with the same parameters as any."""
    services = []

    def new_client():
        service = tinker.ServiceClient(base_url=sandbox.url, api_key="tml-sandbox")
        services.append(service)
        client = service.create_lora_training_client("any-model", rank=4)
        # Before tinker 0.38 this is the client itself.
        return client.result() if isinstance(client, tinker.APIFuture) else client

    yield new_client
    for service in services:
        holder = service.holder
        holder.run_coroutine_threadsafe(holder.aclose()).result()
