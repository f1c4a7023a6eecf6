"""A user's program, in the style of the README: test_typing.py has mypy and pyright check it."""

from collections.abc import Mapping, Sequence

import tinker
import torch
from tinker import Datum
from torch import Tensor

from tinker_custom_loss import Composer, Regularizer, StepRecord, with_regularizers
from tinker_custom_loss.sandbox import SandboxServer
from tinker_custom_loss.terms import l2, nll


def smoothness(
    data: Sequence[Datum], logprobs: Sequence[Tensor], *, power: float = 2.0
) -> tuple[Tensor, dict[str, float]]:
    jumps = torch.cat([sequence.diff() for sequence in logprobs])
    return jumps.abs().pow(power).mean(), {"largest_jump": jumps.abs().max().item()}


async def judged(data: list[Datum], logprobs: list[Tensor]) -> tuple[Tensor, Mapping[str, float]]:
    return torch.cat(logprobs).var(correction=0), {}


def shown(record: StepRecord) -> str:
    terms = {name: term["contribution"] for name, term in record["regularizers"].items()}
    return f"{record['loss_total']:.3f} {terms}"


def loop(training_client: tinker.TrainingClient, data: list[Datum]) -> float:
    """It knows the SDK alone, and gets the regularizers all the same."""
    future = training_client.forward_backward_custom(data, nll)
    training_client.optim_step(tinker.AdamParams(learning_rate=0.01)).result()
    return future.result().metrics["loss_total"]


def main() -> None:
    tokens = torch.tensor(list(b"to be or not to be, that is the question"))
    datum = Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1].tolist()),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData.from_torch(tokens[1:]),
            "weights": tinker.TensorData.from_torch(torch.ones(len(tokens) - 1)),
        },
    )
    regularizers = [
        Regularizer(smoothness, 0.1, params={"power": 1.5}),
        Regularizer(judged, lambda step: 0.1 / (1 + step), "judged", timeout=30),
        Regularizer(l2, 0.01),
    ]
    with SandboxServer() as server:
        service = tinker.ServiceClient(base_url=server.url, api_key="tml-sandbox")
        training_client: tinker.TrainingClient = service.create_lora_training_client("any").result()
        training_client = with_regularizers(training_client, regularizers=regularizers)
        print(loop(training_client, [datum]), training_client.get_info().model_id)
        for step in range(2):
            future = training_client.forward_backward_custom([datum], nll, regularizers, step=step)
            optim = training_client.optim_step(tinker.AdamParams(learning_rate=0.01))
            print(shown(future.result().record), optim.result().metrics)
        output = training_client.forward_backward_custom([datum], Composer(nll)).result()
        assert output.record["base_loss"] is not None
        print(output.record["base_loss"]["value"], output.metrics["loss:sum"])
        service.holder.close()


if __name__ == "__main__":
    main()
