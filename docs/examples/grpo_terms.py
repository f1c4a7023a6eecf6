"""A term that asks a reward model, for grpo.exs."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from typing import Any

import tinker
import torch


async def dullness(
    data: list[tinker.Datum], logprobs: list[torch.Tensor], *, url: str
) -> tuple[torch.Tensor, dict[str, float]]:
    """Texts that the reward model at ``url`` finds duller than the others become less likely."""
    masks = [datum.loss_fn_inputs["mask"].to_torch().bool() for datum in data]
    targets = [datum.loss_fn_inputs["target_tokens"].to_torch() for datum in data]
    texts = [each[mask].tolist() for each, mask in zip(targets, masks, strict=True)]
    scores = torch.tensor(await asyncio.to_thread(_ask, url, texts))
    sums = torch.stack([each[mask].sum() for each, mask in zip(logprobs, masks, strict=True)])
    return ((scores - scores.mean()) * sums).mean(), {"dullness": float(scores.mean())}


def _ask(url: str, texts: list[list[int]]) -> Any:
    request = urllib.request.Request(url, json.dumps(texts).encode())
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)
