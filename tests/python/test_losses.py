"""Losses that people train with, as base losses and as regularizers, against the plain SDK.

Both need more of a batch than one token at a time: DPO compares datums, reverse-KL distillation
normalizes over the alternatives of each position.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tinker import types

from tinker_custom_loss import forward_backward_custom, with_regularizers
from training import SDK, TEXT, assert_same_parameters, parameters_after

pytestmark = [
    pytest.mark.skipif(SDK < (0, 32), reason="this SDK refuses arrays of one's own in a datum"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning"),
]

ALTERNATIVES = 20


def dpo(data, logprobs, *, beta=0.1):
    """``-log sigmoid(β·(Δ_chosen - Δ_rejected))``, mean over pairs.

    Δ is the sum of logprob - reference over a text; datums 2i and 2i+1 are the chosen and the
    rejected text of pair i. R. Rafailov et al., "Direct Preference Optimization" (2023), eq. 7.
    """
    margins = torch.stack(
        [
            ((x - datum.loss_fn_inputs["reference"].to_torch()) * mask).sum()
            for datum, x in zip(data, logprobs, strict=True)
            for mask in [datum.loss_fn_inputs["weights"].to_torch()]
        ]
    )
    chosen, rejected = margins[0::2], margins[1::2]
    loss = -F.logsigmoid(beta * (chosen - rejected)).mean()
    return loss, {"accuracy": (chosen > rejected).float().mean().item()}


def top_k_reverse_kl(data, logprobs):
    """``Σ_k p_k·(log p_k - log q_k)``, mean over positions, p and q normalized over K alternatives.

    ``mask`` [N,K] is 0 for padding among the alternatives. The teacher's q needs no gradient.
    """
    positions = []
    for datum, x in zip(data, logprobs, strict=True):
        mask = datum.loss_fn_inputs["mask"].to_torch() > 0
        teacher = datum.loss_fn_inputs["teacher"].to_torch()
        student = torch.log_softmax(x.masked_fill(~mask, -torch.inf), dim=-1)
        teacher = torch.log_softmax(teacher.masked_fill(~mask, -torch.inf), dim=-1).detach()
        student, teacher = student.masked_fill(~mask, 0.0), teacher.masked_fill(~mask, 0.0)
        positions.append(((student.exp() * (student - teacher)) * mask).sum(dim=-1))
    return torch.cat(positions).mean(), {}


def pairs():
    generator = np.random.default_rng(1)
    data = []
    for i in range(6):
        row = TEXT[3 * i : 3 * i + 12 + i]
        reference = -generator.exponential(4, size=len(row) - 1).astype(np.float32)
        mask = (np.arange(len(row) - 1) >= 4).astype(np.float32)
        inputs = {"target_tokens": list(row[1:]), "weights": mask, "reference": reference}
        data.append(types.Datum(types.ModelInput.from_ints(list(row[:-1])), inputs))
    return data


def distillation():
    generator = np.random.default_rng(2)
    data = []
    for i in range(3):
        row = TEXT[7 * i : 7 * i + 9 + i]
        targets = np.stack(
            [generator.choice(256, ALTERNATIVES, replace=False) for _ in range(len(row) - 1)]
        )
        teacher = -generator.exponential(3, size=targets.shape).astype(np.float32)
        mask = (generator.random(targets.shape) < 0.7).astype(np.float32)
        mask[:, 0] = 1.0
        inputs = {"target_tokens": targets, "teacher": teacher, "mask": mask}
        data.append(types.Datum(types.ModelInput.from_ints(list(row[:-1])), inputs))
    return data


@pytest.mark.parametrize("face", ["function", "client"])
@pytest.mark.parametrize("role", ["base loss", "regularizer", "both"])
@pytest.mark.parametrize(("loss", "batch"), [(dpo, pairs), (top_k_reverse_kl, distillation)])
def test_five_steps_end_where_the_sdks_do(new_client, sandbox, loss, batch, role, face):
    data = batch()
    term = {"fn": loss, "weight": 1.0, "name": "the-loss"}
    base, terms, scale = {
        "base loss": (loss, [], 1.0),
        "regularizer": (None, [term], 1.0),
        "both": (loss, [{**term, "weight": -0.25}], 0.75),
    }[role]

    def on_the_sdk(data, logprobs):
        value, metrics = loss(data, logprobs)
        return scale * value, metrics

    def on_ours(client, step):
        if face == "client":
            return client.forward_backward_custom(data, base, terms, step=step)
        return forward_backward_custom(client, data, base, terms, step=step)

    ours = with_regularizers(new_client()) if face == "client" else new_client()
    got = parameters_after(5, sandbox, ours, on_ours)
    want = parameters_after(
        5, sandbox, new_client(), lambda c, _: c.forward_backward_custom(data, on_the_sdk)
    )
    assert_same_parameters(got, want)


@pytest.mark.parametrize(("loss", "batch"), [(dpo, pairs), (top_k_reverse_kl, distillation)])
def test_they_train(new_client, loss, batch):
    client = with_regularizers(new_client())
    data = batch()
    custom = functools.partial(client.forward_backward_custom, data, loss, [])
    futures = []
    for _ in range(15):
        futures.append(custom())
        client.optim_step(types.AdamParams(learning_rate=0.02))
    losses = [future.result(60).metrics["loss:sum"] for future in futures]
    assert losses[-1] < 0.9 * losses[0]
