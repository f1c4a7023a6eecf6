"""Train with a topology and a sparsity regularizer, against the sandbox on this machine.

pip install '.[examples]'  # in a clone of this repository
python docs/examples/topology_and_sparsity.py
"""

from __future__ import annotations

from collections.abc import Sequence

import gudhi
import tinker
import torch
from tinker import types
from torch import Tensor

from tinker_custom_loss import with_regularizers
from tinker_custom_loss.sandbox import SandboxServer
from tinker_custom_loss.terms import nll

TEXT = b"A term is a function of the data and the logprobs that returns a loss and its metrics. "


def total_persistence(
    data: Sequence[types.Datum], logprobs: Sequence[Tensor]
) -> tuple[Tensor, dict[str, float]]:
    """Topology: the total persistence of each sequence's logprobs [T], mean over sequences.

    Raise a threshold from below: a component is born at each local minimum of the logprobs, and
    dies at the maximum where it meets one that is older. ``Σ death - birth`` is how far the
    sequence goes down only to come up again; a monotone sequence has none.

    gudhi says *where* births and deaths are. Their values are entries of the tensor, so the
    gradient is exact: +1 at each death, -1 at each birth (almost everywhere; at ties, one of
    several subgradients). D. Cohen-Steiner et al., "Lipschitz functions have Lp-stable
    persistence" (2010); for gradients, R. B. Gabrielsson et al., "A Topology Layer for Machine
    Learning" (2020).
    """
    losses = []
    pairs = 0
    for x in logprobs:
        cells = gudhi.CubicalComplex(top_dimensional_cells=x.detach().double().numpy())
        cells.compute_persistence()
        finite, _essential = cells.cofaces_of_persistence_pairs()
        if not finite:
            losses.append(x.sum() * 0.0)
            continue
        births, deaths = torch.as_tensor(finite[0], dtype=torch.int64).unbind(dim=1)
        losses.append((x[deaths] - x[births]).sum())
        pairs += len(births)
    return torch.stack(losses).mean(), {"pairs": float(pairs)}


def sparse_surprise(
    data: Sequence[types.Datum], logprobs: Sequence[Tensor]
) -> tuple[Tensor, dict[str, float]]:
    """Sparsity: the mean of ``|logprob|``, an L1 norm, which wants few tokens to surprise."""
    values = torch.cat(list(logprobs))
    return values.abs().mean(), {"surprised": float((values < -1.0).float().mean())}


def batch(length: int = 32) -> list[types.Datum]:
    rows = [TEXT[i : i + length + 1] for i in range(0, len(TEXT) - length, 8)]
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(list(row[:-1])),
            loss_fn_inputs={"target_tokens": list(row[1:])},
        )
        for row in rows
    ]


def main(steps: int = 30) -> None:
    with SandboxServer(seed=0) as server:
        service = tinker.ServiceClient(base_url=server.url, api_key="tml-sandbox")
        client = with_regularizers(service.create_lora_training_client("sandbox").result())
        data = batch()
        regularizers = [
            {"fn": total_persistence, "weight": 0.5, "name": "topology", "run_in_executor": True},
            {"fn": sparse_surprise, "weight": 1.0, "name": "sparsity"},
        ]
        futures = []
        for step in range(steps):
            futures.append(client.forward_backward_custom(data, nll, regularizers, step=step))
            client.optim_step(types.AdamParams(learning_rate=0.01))
        for step, future in enumerate(futures):
            metrics = future.result().metrics
            if step % 10 == 0 or step == steps - 1:
                terms = metrics["regularizers"]
                values = "  ".join(f"{name} {term['value']:.4f}" for name, term in terms.items())
                print(f"step {step:3d}  loss {metrics['loss_total']:.4f}  {values}")
        service.holder.close()


if __name__ == "__main__":
    main()
