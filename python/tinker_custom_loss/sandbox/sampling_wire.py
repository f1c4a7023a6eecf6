"""Sampling in the two dialects of Tinker clients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tinker.proto import tinker_public_pb2 as pb

from ..errors import RequestError
from .datums_wire import json_tensor, json_tokens
from .sampling import Sample, SampleRequest, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["encode_sample", "parse_sample", "sample_as_json"]


def parse_sample(request: Mapping[str, Any]) -> SampleRequest:
    """:raises RequestError: the request cannot be read, or asks for what there is not."""
    prompt, params = request.get("prompt"), request.get("sampling_params") or {}
    if not isinstance(prompt, dict):
        raise RequestError("expected an object with chunks", path="prompt")
    if not isinstance(params, dict):
        raise RequestError("expected an object", path="sampling_params")
    if request.get("record_stability_info"):
        raise RequestError(
            "the sandbox records no stability information", path="record_stability_info"
        )
    targets = request.get("target_prompt_logprobs")
    if targets is not None and targets.get("sparse_crow_indices") is not None:
        raise RequestError("the sandbox takes dense ids alone", path="target_prompt_logprobs")
    return SampleRequest(
        prompt=json_tokens(prompt, "prompt"),
        params=SamplingParams.from_mapping(params),
        num_samples=request.get("num_samples", 1),
        prompt_logprobs=bool(request.get("prompt_logprobs")),
        prompt_logprobs_last_n=request.get("prompt_logprobs_last_n"),
        topk_prompt_logprobs=request.get("topk_prompt_logprobs") or 0,
        topk_sample_logprobs=request.get("topk_sample_logprobs") or 0,
        target_prompt_logprobs=None
        if targets is None
        else json_tensor(targets, "target_prompt_logprobs"),
        prompt_alt_tokens_k=request.get("prompt_alt_tokens_k") or 0,
    )


def encode_sample(sample: Sample) -> bytes:
    """A protobuf ``SampleResponse``."""
    response = pb.SampleResponse()
    for each in sample.sequences:
        response.sequences.add(
            stop_reason=pb.STOP_REASON_STOP if each.stopped else pb.STOP_REASON_LENGTH,
            tokens=_bytes(each.tokens, torch.int32),
            logprobs=_bytes(each.logprobs),
        )
        # Messages of older SDKs do not have what only newer ones can ask for.
        if each.topk is not None:
            response.sequences[-1].topk_sampled_logprobs.MergeFrom(_topk(each.topk))
    if sample.prompt_logprobs is not None:
        response.prompt_logprobs = _bytes(sample.prompt_logprobs)
    if sample.topk_prompt is not None:
        response.topk_prompt_logprobs.MergeFrom(_topk(sample.topk_prompt))
    if sample.target_prompt_logprobs is not None:
        response.target_prompt_logprobs.MergeFrom(_tensor(sample.target_prompt_logprobs))
    if sample.prompt_alt is not None:
        tokens, logprobs = sample.prompt_alt
        response.prompt_alt_tokens.tokens.MergeFrom(_tensor(tokens))
        response.prompt_alt_tokens.logprobs.MergeFrom(_tensor(logprobs))
    return bytes(response.SerializeToString())


def sample_as_json(sample: Sample) -> dict[str, Any]:
    """What a client that speaks JSON reads."""
    answer: dict[str, Any] = {
        "type": "sample",
        "sequences": [
            {
                "tokens": each.tokens.tolist(),
                "logprobs": each.logprobs.tolist(),
                "stop_reason": "stop" if each.stopped else "length",
            }
            for each in sample.sequences
        ],
    }
    if sample.prompt_logprobs is not None:
        answer["prompt_logprobs"] = [
            value if value == value else None for value in sample.prompt_logprobs.tolist()
        ]
    if sample.topk_prompt is not None:
        ids, logprobs = sample.topk_prompt
        answer["topk_prompt_logprobs"] = [
            None if value[0] < -9e4 else list(zip(row, value, strict=True))
            for row, value in zip(ids.tolist(), logprobs.tolist(), strict=True)
        ]
    return answer


def _bytes(tensor: Tensor, dtype: torch.dtype = torch.float32) -> bytes:
    return bytes(tensor.to(dtype).contiguous().numpy().tobytes())


def _topk(topk: tuple[Tensor, Tensor]) -> pb.TopkLogprobs:
    ids, logprobs = topk
    return pb.TopkLogprobs(
        token_ids=_bytes(ids, torch.int32),
        logprobs=_bytes(logprobs),
        length=ids.shape[0],
        k=ids.shape[1],
    )


def _tensor(tensor: Tensor) -> pb.Tensor:
    floating = tensor.is_floating_point()
    return pb.Tensor(
        dtype=pb.DTYPE_FLOAT32 if floating else pb.DTYPE_INT64,
        shape=list(tensor.shape),
        dense=_bytes(tensor, torch.float32 if floating else torch.int64),
    )
