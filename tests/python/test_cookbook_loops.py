"""The calls of tinker-cookbook's loops, as these make them, under the one line that is added.

Each loop here makes the calls of one there, in its order, with its datums and its keywords. It runs
bare and regularized, and must not notice: with weights of 0 its parameters are the same bits.
"""

from __future__ import annotations

import asyncio

import pytest
import tinker
import torch
from tinker import types
from torch.nn.functional import logsigmoid

from tinker_custom_loss import regularized
from training import ADAM, SDK, datums

pytestmark = pytest.mark.filterwarnings(
    "ignore:DEPRECATED:FutureWarning", "ignore:Using the future:FutureWarning"
)

PROMPT = list(b"Q: say it. A: ")
ENTROPY = {"fn": "entropy", "weight": 0.01}
OF_TEXTS = [ENTROPY, {"fn": "l2", "weight": 0.001}]
OF_POLICIES = [ENTROPY, {"fn": "kl", "weight": 0.05, "params": {"reference": "logprobs"}}]


def trajectories(sampler, seed, count=4):
    """Samples of the model with advantages and a mask: what data_processing makes of them."""
    params = types.SamplingParams(max_tokens=6, temperature=1.0, seed=seed)
    prompt = types.ModelInput.from_ints(PROMPT)
    sequences = sampler.sample(prompt, count, params).result().sequences
    data = []
    for i, sequence in enumerate(sequences):
        tokens, before = PROMPT + list(sequence.tokens), len(PROMPT) - 1
        size = len(tokens) - len(PROMPT)
        columns = {
            "target_tokens": torch.tensor(tokens[1:]),
            "logprobs": torch.tensor([0.0] * before + list(sequence.logprobs)),
            "advantages": torch.tensor([0.0] * before + [i - (count - 1) / 2] * size),
            "mask": torch.tensor([0.0] * before + [1.0] * size),
        }
        inputs = {key: types.TensorData.from_torch(value) for key, value in columns.items()}
        model_input = types.ModelInput.from_ints(tokens[:-1])
        data.append(types.Datum(model_input=model_input, loss_fn_inputs=inputs))
    return data


def texts():
    return datums(alternatives=False)


def without_mask(datum):
    inputs = {key: value for key, value in datum.loss_fn_inputs.items() if key != "mask"}
    return types.Datum(model_input=datum.model_input, loss_fn_inputs=inputs)


def sl_loop(service):
    client = service.create_lora_training_client(base_model="any-model", rank=4)
    client = client.result() if isinstance(client, tinker.APIFuture) else client
    rows = []
    for step in range(3):
        if step == 2:
            client.save_state(name="000002").result()
        fwd_bwd_future = client.forward_backward(texts(), loss_fn="cross_entropy")
        optim_step_future = client.optim_step(ADAM)
        output, optim_result = fwd_bwd_future.result(), optim_step_future.result()
        assert len(output.loss_fn_outputs) == 4
        rows.append(dict(optim_result.metrics or {}))
    return client, rows


async def supervised_train(service):
    """It submits a batch before it finishes the one before, and saves in between."""
    client = await service.create_lora_training_client_async("any-model", rank=4)
    rows, pending = [], None

    async def finish(submitted):
        if submitted is not None:
            futures = (
                {
                    "state": await client.save_state_async("000001", ttl_seconds=3600),
                    "sampler": await client.save_weights_for_sampler_async(
                        "000001", ttl_seconds=3600
                    ),
                }
                if not rows
                else {}
            )
            results = {key: await future.result_async() for key, future in futures.items()}
            assert all(result.path for result in results.values())
            output = await submitted[0].result_async()
            result = await submitted[1].result_async()
            assert all("logprobs" in each for each in output.loss_fn_outputs)
            rows.append(dict(result.metrics or {}))

    for _ in range(3):
        fwd_bwd = await client.forward_backward_async(texts(), loss_fn="cross_entropy")
        submitted = fwd_bwd, await client.optim_step_async(ADAM)
        await finish(pending)
        pending = submitted
    await finish(pending)
    return client, rows


def rl_train(loss_fn, loss_fn_config=None, substeps=2):
    async def loop(service):
        client = await service.create_lora_training_client_async("any-model", rank=4)
        rows = []
        for step in range(2):
            data = trajectories(await client.save_weights_and_get_sampling_client_async(), step)
            futures = []
            for i in range(substeps):  # all of them before the first result
                batch = [without_mask(datum) for datum in data[i::substeps]]
                fwd_bwd = await client.forward_backward_async(
                    batch, loss_fn=loss_fn, loss_fn_config=loss_fn_config
                )
                futures.append((fwd_bwd, await client.optim_step_async(ADAM)))
            for fwd_bwd, optim in futures:
                output = await fwd_bwd.result_async()
                assert all(len(each["logprobs"].to_torch()) for each in output.loss_fn_outputs)
                rows.append(dict((await optim.result_async()).metrics or {}))
        return client, rows

    return loop


async def rl_train_streaming(service):
    """Several minibatches, as they come in, before one step of the optimizer."""
    client = await service.create_lora_training_client_async("any-model", rank=4)
    rows = []
    for step in range(2):
        data = trajectories(await client.save_weights_and_get_sampling_client_async(), step)
        futures = [
            await client.forward_backward_async(
                [without_mask(datum) for datum in data[i : i + 2]],
                loss_fn="importance_sampling",
                loss_fn_config=None,
            )
            for i in (0, 2)
        ]
        optim = await client.optim_step_async(ADAM)
        for future in futures:
            await future.result_async()
        rows.append(dict((await optim.result_async()).metrics or {}))
    return client, rows


def rl_loop(service):
    client = service.create_lora_training_client(base_model="any-model", rank=4)
    client = client.result() if isinstance(client, tinker.APIFuture) else client
    rows = []
    for step in range(2):
        sampler = client.save_weights_and_get_sampling_client()
        sampler = sampler.result() if isinstance(sampler, tinker.APIFuture) else sampler
        data = [without_mask(datum) for datum in trajectories(sampler, step)]
        fwd_bwd_future = client.forward_backward(data, loss_fn="importance_sampling")
        optim_step_future = client.optim_step(ADAM)
        fwd_bwd_future.result()
        rows.append(dict(optim_step_future.result().metrics or {}))
    return client, rows


def train_dpo(service):
    """It logs the metrics of the pass, not those of the optimizer."""
    client = service.create_lora_training_client("any-model", rank=4)
    client = client.result() if isinstance(client, tinker.APIFuture) else client
    reference = client.save_weights_and_get_sampling_client()
    rows = []
    for _ in range(2):
        data = texts()
        sequences = [
            each.model_input.append_int(int(each.loss_fn_inputs["target_tokens"].data[-1]))
            for each in data
        ]

        async def all_reference_logprobs(sequences=sequences):
            return await asyncio.gather(*map(reference.compute_logprobs_async, sequences))

        references = asyncio.run(all_reference_logprobs())
        references = [torch.tensor(each[1:]) for each in references]

        def dpo_loss_fn(data, logprobs_list, references=references):
            weights = [torch.tensor(each.loss_fn_inputs["weights"].data) for each in data]
            gains = [
                torch.dot(logprobs.float() - before, weight)
                for logprobs, before, weight in zip(logprobs_list, references, weights, strict=True)
            ]
            margins = torch.stack(gains[0::2]) - torch.stack(gains[1::2])
            loss = -logsigmoid(0.1 * margins).mean()
            return loss, {"dpo_loss": loss.item(), "accuracy": (margins > 0).float().mean().item()}

        metrics = client.forward_backward_custom(data, dpo_loss_fn).result().metrics
        client.optim_step(ADAM).result()
        rows.append({"num_pairs": len(data) // 2, **metrics})
    return client, rows


async def distill_on_policy(service):
    """The advantages are the negative reverse KL to a teacher."""
    client = await service.create_lora_training_client_async("any-model", rank=4)
    teacher = await service.create_sampling_client_async(base_model="any-model")
    rows = []
    for step in range(2):
        data = trajectories(await client.save_weights_and_get_sampling_client_async(), step)
        sequences = [
            each.model_input.append_int(int(each.loss_fn_inputs["target_tokens"].data[-1]))
            for each in data
        ]
        theirs = await asyncio.gather(*map(teacher.compute_logprobs_async, sequences))
        for datum, logprobs in zip(data, theirs, strict=True):
            inputs = datum.loss_fn_inputs
            kl = inputs["logprobs"].to_torch() - torch.tensor(logprobs[1:])
            advantages = inputs["advantages"].to_torch() - inputs["mask"].to_torch() * kl
            inputs["advantages"] = types.TensorData.from_torch(advantages)
        fwd_bwd = await client.forward_backward_async(
            [without_mask(datum) for datum in data],
            loss_fn="importance_sampling",
            loss_fn_config=None,
        )
        optim = await client.optim_step_async(ADAM)
        await fwd_bwd.result_async()
        rows.append(dict((await optim.result_async()).metrics or {}))
    return client, rows


LOOPS = {
    "supervised.train": (supervised_train, OF_TEXTS),
    "recipes.sl_loop": (sl_loop, OF_TEXTS),
    "rl.train": (rl_train("importance_sampling"), OF_POLICIES),
    "rl.train, ppo": (
        rl_train("ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
        OF_POLICIES,
    ),
    "rl.train, streaming": (rl_train_streaming, OF_POLICIES),
    "recipes.rl_loop": (rl_loop, OF_POLICIES),
    "preference.train_dpo": (train_dpo, OF_TEXTS),
    "distillation.train_on_policy": (distill_on_policy, OF_POLICIES),
}


def run(loop, sandbox):
    """The parameters that the loop ends with, and the rows that it logs."""
    service = tinker.ServiceClient(base_url=sandbox.url, api_key="tml-sandbox")
    try:
        ended = loop(service)
        client, rows = asyncio.run(ended) if asyncio.iscoroutine(ended) else ended
        return sandbox.parameters(client.model_id), rows
    finally:
        holder = service.holder
        holder.run_coroutine_threadsafe(holder.aclose()).result()


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_of_tinker_cookbook(name, sandbox):
    loop, regularizers = LOOPS[name]
    bare, theirs = run(loop, sandbox)
    with regularized(regularizers=regularizers, flat_metrics=True):
        parameters, rows = run(loop, sandbox)
    ours = {
        f"regularizers/{each['fn']}/{key}" for each in regularizers for key in ("value", "weight")
    }
    for row, their in zip(rows, theirs, strict=True):
        assert {*ours, *their} <= set(row)
        assert all(isinstance(value, int | float) for value in row.values())
    assert not torch.equal(parameters, bare)

    weightless = [{**each, "weight": 0.0} for each in regularizers]
    with regularized(regularizers=weightless, flat_metrics=True):
        parameters, rows = run(loop, sandbox)
    assert torch.equal(parameters, bare)
    for row, their in zip(rows, theirs, strict=True):
        if SDK < (0, 38):  # for a custom loss it gives the server's linear one under this name
            their.pop("loss:sum", None)
        assert {key: row[key] for key in their} == pytest.approx(their)
