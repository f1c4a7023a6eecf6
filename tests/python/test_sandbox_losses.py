"""The losses that the sandbox computes by name, through the official client."""

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from tinker_custom_loss.sandbox import AdamParams
from training import SDK, TEXT

CONFIGS = {
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": {"clip_low_threshold": 0.5, "clip_high_threshold": 1.5},
    "cispo": {"clip_low_threshold": 0.5, "clip_high_threshold": 1.5},
    "dro": {"beta": 0.3},
}


def datums(**without):
    generator = np.random.default_rng(0)
    data = []
    for i in range(3):
        row = TEXT[7 * i : 7 * i + 12 + i]
        n = len(row) - 1
        inputs = {
            "target_tokens": np.array(list(row[1:]), dtype=np.int64),
            "logprobs": generator.normal(-6, 2, n).astype(np.float32),
            "advantages": generator.normal(0, 1, n).astype(np.float32),
            "weights": generator.uniform(0, 1, n).astype(np.float32),
        }
        for name in without:
            del inputs[name]
        data.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(list(row[:-1])), loss_fn_inputs=inputs
            )
        )
    return data


def reference(name, config):
    """The formulas of the service's documentation, on one datum."""

    def loss(logprobs, weights, sampler, advantages):
        ratio = torch.exp(logprobs - sampler)
        low, high = config.get("clip_low_threshold"), config.get("clip_high_threshold")
        if name == "cross_entropy":
            objective = logprobs * weights
        elif name == "importance_sampling":
            objective = ratio * advantages
        elif name == "ppo":
            objective = torch.min(ratio * advantages, ratio.clamp(low, high) * advantages)
        elif name == "cispo":
            objective = ratio.clamp(low, high).detach() * logprobs * advantages
        else:
            quadratic = (logprobs - sampler) ** 2
            objective = logprobs * advantages - 0.5 * config["beta"] * quadratic
        return -objective.sum()

    def custom(data, logprobs):
        total = torch.zeros(())
        for datum, each in zip(data, logprobs, strict=True):
            inputs = [
                datum.loss_fn_inputs[key].to_torch()
                for key in ("weights", "logprobs", "advantages")
            ]
            total = total + loss(each, *inputs)
        return total, {}

    return custom


@pytest.mark.parametrize("name", CONFIGS)
def test_a_loss_by_name_is_its_formula_as_a_custom_loss(name, sandbox, new_client):
    config, data = CONFIGS[name], datums()
    by_name, custom = new_client(), new_client()
    result = by_name.forward_backward(data, name, config or None).result()
    expected = custom.forward_backward_custom(data, reference(name, config)).result()

    assert result.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=1e-5)
    for ours, theirs in zip(result.loss_fn_outputs, expected.loss_fn_outputs, strict=True):
        assert ours["logprobs"].tolist() == theirs["logprobs"].tolist()
    gradient = sandbox.model(by_name.model_id).gradient_flat()
    torch.testing.assert_close(
        gradient, sandbox.model(custom.model_id).gradient_flat(), rtol=1e-5, atol=1e-6
    )
    assert gradient.norm() > 0.01


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("ppo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
        ("cispo", {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}),
        ("dro", {"beta": 0.05}),
    ],
)
def test_a_loss_without_a_config_has_the_services_defaults(name, defaults, new_client):
    client, data = new_client(), datums()
    plain = client.forward(data, name).result().metrics["loss:sum"]
    assert plain == client.forward(data, name, defaults).result().metrics["loss:sum"]
    other = client.forward(data, name, dict.fromkeys(defaults, 2.0)).result()
    assert plain != other.metrics["loss:sum"]


@pytest.mark.parametrize(
    ("name", "config", "without", "says"),
    [
        ("gspo", None, [], r"computes the losses cross_entropy, .*, dro, not 'gspo'"),
        ("ppo", {"clip_low": 0.8}, [], r"ppo has no 'clip_low' .* clip_low_threshold, clip_high"),
        ("importance_sampling", {"beta": 1.0}, [], r"no 'beta' .* its keys are: none"),
        ("dro", {"beta": float("nan")}, [], r"expected a finite number, got nan .*loss_fn_config"),
        ("ppo", {"clip_low_threshold": 2.0}, [], r"2\.0 is above clip_high_threshold 1\.2"),
        ("cispo", None, ["advantages"], r"cispo needs advantages.*data\[0\]"),
        ("dro", None, ["logprobs"], r"dro needs logprobs"),
        ("cross_entropy", None, ["weights"], r"cross_entropy needs weights"),
    ],
)
def test_a_mistake_in_a_loss_is_the_users(name, config, without, says, new_client):
    client = new_client()
    data = datums(**dict.fromkeys(without))
    with pytest.raises(tinker.RequestFailedError, match=says) as error:
        client.forward_backward(data, name, config).result()
    assert error.value.category is types.RequestErrorCategory.User
    client.forward_backward(datums(), "cross_entropy").result()


@pytest.mark.skipif(SDK < (0, 38), reason="before, a loss took numbers alone")
def test_a_text_in_the_config_of_a_loss_is_no_number(new_client):
    with pytest.raises(tinker.RequestFailedError, match="expected a finite number, got 'much'"):
        new_client().forward_backward(datums(), "dro", {"beta": "much"}).result()


def test_gradient_norms_are_reported_when_clipping_is_on(new_client):
    client = new_client()
    for clip, reported in [(0.0, False), (1e9, True)]:
        client.forward_backward(datums(), "cross_entropy").result()
        step = client.optim_step(types.AdamParams(learning_rate=0.0, grad_clip_norm=clip)).result()
        assert bool(step.metrics) is reported
    assert AdamParams().grad_clip_norm == 0
