"""The examples in the docstrings of the official SDK, as they stand there, against the sandbox."""

import ast
import asyncio
import inspect
import re
import textwrap

import pytest
import tinker
import torch
from tinker import types

from tinker_custom_loss.sandbox import SandboxServer
from training import SDK, datums, weighted_nll

EXAMPLES = [
    # The first of these reads a field, loss, that no result of the SDK has; so do those of forward
    # and forward_backward, whose targets are no targets either, and that of list_user_checkpoints.
    "TrainingClient.forward_backward_custom#1",
    *("TrainingClient", "TrainingClient.optim_step", "TrainingClient.save_state"),
    *("TrainingClient.optim_step_async", "TrainingClient.forward_backward_async"),
    *("TrainingClient.forward_backward_custom_async",),
    *("TrainingClient.save_weights_and_get_sampling_client",),
    *("TrainingClient.load_state", "TrainingClient.load_state_with_optimizer"),
    *("TrainingClient.save_weights_for_sampler", "TrainingClient.create_sampling_client"),
    *("TrainingClient.get_info", "TrainingClient.get_tokenizer"),
    *("SamplingClient", "SamplingClient.sample", "SamplingClient.compute_logprobs"),
    "ServiceClient.create_training_client_from_state",
    "ServiceClient.create_training_client_from_state_with_optimizer",
    "ServiceClient.create_sampling_client",
    *("ServiceClient", "ServiceClient.create_lora_training_client", "ServiceClient.close"),
    *("RestClient", "RestClient.list_checkpoints", "RestClient.get_training_run"),
    *("RestClient.get_sampler", "RestClient.get_session", "RestClient.list_sessions"),
    *("RestClient.get_training_run_by_tinker_path",),
    *("RestClient.get_weights_info_by_tinker_path", "RestClient.get_server_capabilities"),
    "RestClient.set_checkpoint_ttl_from_tinker_path",
    "RestClient.list_training_runs",
]

pytestmark = [
    pytest.mark.skipif(SDK < (0, 38), reason="earlier SDKs have other examples"),
    # Some of what the SDK documents it also deprecates.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def names():
    """What the examples take for granted."""
    with pytest.MonkeyPatch.context() as patch, SandboxServer(seed=0) as server:
        patch.setenv("TINKER_TELEMETRY", "0")
        patch.setenv("TINKER_BASE_URL", server.url)
        patch.setenv("TINKER_API_KEY", "tml-sandbox")
        service = tinker.ServiceClient(base_url=server.url, api_key="tml-sandbox")
        client = service.create_lora_training_client("any-model").result()
        tokenizer = client.get_tokenizer()
        yield {
            "tinker": tinker,
            "types": types,
            "torch": torch,
            "service_client": service,
            "ServiceClient": tinker.ServiceClient,
            "rest_client": service.create_rest_client(),
            "training_client": client,
            "sampling_client": client.save_weights_and_get_sampling_client().result(),
            "tokenizer": tokenizer,
            "training_data": datums(alternatives=False),
            "data": datums(alternatives=False),
            "custom_loss": weighted_nll,
            "candidate_token_id": tokenizer.encode("x")[0],
            "long_context": "once upon a time ",
            "completions": ["there was", "nobody was"],
            "checkpoint": client.save_state("example").result().path,
            "sampler": client.save_weights_for_sampler("example-sampler").result().path,
        }
        holder = service.holder
        holder.run_coroutine_threadsafe(holder.aclose()).result()


def blocks(name):
    """All examples of a docstring, or with ``#i`` the i-th alone."""
    name, _, chosen = name.partition("#")
    documented = tinker
    for part in name.split("."):
        documented = getattr(documented, part)
    found = re.findall(r"```python\n(.*?)```", inspect.getdoc(documented), re.DOTALL)
    found = [found[int(chosen)]] if chosen else found
    return [textwrap.dedent(code) for code in found]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_of_the_sdk_runs(name, names):
    path = names["sampler" if "sampling_client" in name else "checkpoint"]
    examples = blocks(name)
    assert examples, f"{name} documents no example any more"
    for code in examples:
        code = code.replace("tinker://run-id/weights/checkpoint-001", path)
        code = code.replace("tinker://run-id/weights/0001", path)
        code = code.replace('"run-id"', repr(names["training_client"].model_id))
        session = names["training_client"].holder.get_session_id()
        code = code.replace('"session-id"', repr(session)).replace("session-id:", f"{session}:")
        scope = dict(names)
        if name == "ServiceClient.close":  # not the one of the other examples
            scope["service_client"] = tinker.ServiceClient()
        program = compile(code, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        coroutine = eval(program, scope)
        if inspect.iscoroutine(coroutine):

            async def finish(coroutine=coroutine):
                await asyncio.wait_for(coroutine, 60)

            asyncio.run(finish())
