"""The arithmetic of the sandbox's model, against torch's own."""

import pytest
import torch

from tinker_custom_loss import RequestError, TensorBatch
from tinker_custom_loss.sandbox import AdamParams, Examples, LanguageModel, check_gradient
from tinker_custom_loss.sandbox import model as model_module


def batch(*rows, dtype=torch.int64):
    return TensorBatch.from_tensors([torch.tensor(row, dtype=dtype) for row in rows])


def mixed(weights=True):
    """Three datums: [5], [3,2] and [1]."""
    tokens = batch([72, 101, 108, 108, 111], [1, 2, 3], [255])
    targets = batch([101, 108, 108, 111, 33], [[2, 7], [3, 7], [4, 7]], [256])
    values = batch([1, 0.5, 0, 1, -2], [[1, 0.25], [1, 0], [0, 3]], [0.125], dtype=torch.float32)
    return Examples(tokens, targets, values if weights else None)


def test_logprobs_are_a_distribution_over_the_next_token():
    model = LanguageModel(seed=3)
    every_token = torch.arange(512).expand(4, 512)
    examples = Examples(batch([9, 8, 7, 6]), TensorBatch.from_tensors([every_token]))
    (logprobs,) = model.logprobs(examples).tensors()
    torch.testing.assert_close(logprobs.exp().sum(1), torch.ones(4))


def test_a_position_depends_on_the_tokens_up_to_it_and_on_no_other_datum():
    model = LanguageModel()

    def logprobs(*rows):
        examples = Examples(batch(*rows), batch(*([1] * len(row) for row in rows)))
        return model.logprobs(examples).tensors()

    (alone,) = logprobs([10, 20, 30])
    later, second = logprobs([10, 20, 31], [10, 20, 30])
    torch.testing.assert_close(later[:2], alone[:2])
    torch.testing.assert_close(second, alone)
    assert later[2] != alone[2]


def test_alternatives_score_like_single_targets():
    model = LanguageModel()
    tokens = batch([5, 6, 7])
    both = model.logprobs(Examples(tokens, batch([[1, 2], [3, 4], [5, 6]]))).tensors()[0]
    for column in (0, 1):
        targets = batch([[1, 3, 5], [2, 4, 6]][column])
        (single,) = model.logprobs(Examples(tokens, targets)).tensors()
        torch.testing.assert_close(both[:, column], single)


def test_forward_backward_gives_the_loss_and_accumulates_its_gradient():
    model, examples = LanguageModel(seed=1), mixed()
    result = model.forward_backward(examples)
    assert [list(shape) for shape in result.logprobs.shapes] == [[5], [3, 2], [1]]
    loss = (-model.logprobs(examples).flat * examples.weights.flat).sum()
    assert result.loss_sum == pytest.approx(loss.item(), rel=1e-6)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters)])
    torch.testing.assert_close(model.gradient_flat(), expected)
    model.forward_backward(examples)
    torch.testing.assert_close(model.gradient_flat(), 2 * expected)


def test_forward_accumulates_nothing():
    model = LanguageModel()
    result = model.forward(mixed(weights=False))
    assert result.loss_sum == 0.0
    assert not model.gradient_flat().any()


def test_long_batches_go_through_in_parts_with_the_same_result(monkeypatch):
    whole, parts = LanguageModel(), LanguageModel()
    expected = whole.forward_backward(mixed())
    monkeypatch.setattr(model_module, "_POSITIONS_AT_ONCE", 2)
    result = parts.forward_backward(mixed())
    torch.testing.assert_close(result.logprobs.flat, expected.logprobs.flat)
    torch.testing.assert_close(parts.gradient_flat(), whole.gradient_flat())


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_optim_step_is_adamw_and_clears_the_gradient(clip):
    model, twin = LanguageModel(), LanguageModel()
    reference = torch.optim.AdamW(
        twin.parameters, lr=0.01, betas=(0.8, 0.9), eps=1e-10, weight_decay=0.1
    )
    for _ in range(3):
        for each in (model, twin):
            each.forward_backward(mixed())
        norm = torch.linalg.vector_norm(twin.gradient_flat())
        if clip:
            torch.nn.utils.clip_grad_norm_(twin.parameters, clip)
        reference.step()
        twin.zero_gradients()
        metrics = model.optim_step(AdamParams(0.01, 0.8, 0.9, 1e-10, 0.1, clip))
        assert metrics == ({"parameter_grad_norm": pytest.approx(float(norm))} if clip else {})
    torch.testing.assert_close(model.parameters_flat(), twin.parameters_flat())
    assert not model.gradient_flat().any()


def test_the_seed_is_the_model():
    a, b, c = (LanguageModel(seed).parameters_flat() for seed in (7, 7, 8))
    assert a.equal(b)
    assert not a.equal(c)


def test_building_a_model_leaves_the_users_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    LanguageModel(seed=5)
    assert torch.rand(3).equal(expected)


def test_a_few_hundred_steps_learn_a_text():
    text = torch.tensor(list(b"the cat sat on the mat, and the dog sat on the log. " * 4))
    size = len(text) - 1
    examples = Examples(
        batch(text[:-1].tolist()),
        batch(text[1:].tolist()),
        TensorBatch(torch.full((size,), 1 / size), ((size,),)),
    )
    model = LanguageModel()
    losses = []
    for _ in range(60):
        losses.append(model.forward_backward(examples).loss_sum)
        model.optim_step(AdamParams(learning_rate=0.01))
    assert losses[0] > 5
    assert losses[-1] < 0.2


def test_the_linearized_gradient_is_the_end_to_end_gradient():
    def base(data, logprobs):
        return -torch.cat([each.reshape(-1) for each in logprobs]).mean(), {}

    def square(data, logprobs, scale):
        return sum((scale * each**2).sum() for each in logprobs), {}

    async def across_datums(data, logprobs):
        return torch.exp(logprobs[0].mean() - logprobs[2].mean()).double(), {}

    model, examples = LanguageModel(seed=2), mixed(weights=False)
    model.forward_backward(mixed())
    accumulated = model.gradient_flat()
    check = check_gradient(
        model,
        examples,
        [None] * 3,
        base,
        [
            {"fn": square, "weight": 0.1, "name": "square", "params": {"scale": 0.5}},
            {"fn": across_datums, "weight": -0.3, "name": "ratio"},
            {"fn": square, "weight": 9.0, "name": "off", "enabled": False, "params": {"scale": 1}},
        ],
    )
    assert check.max_abs_gradient > 0.01
    assert check.max_abs_difference < 1e-6
    assert model.gradient_flat().equal(accumulated)


def test_the_check_sees_a_wrong_gradient():
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.shape = x.shape
            return x.sum()

        @staticmethod
        def backward(ctx, g):
            return (g * wrongness.pop()).expand(ctx.shape)

    def term(data, logprobs):
        return Halved.apply(logprobs[0]), {}

    wrongness = [1.0, 0.5]
    check = check_gradient(LanguageModel(), mixed(weights=False), [None] * 3, term)
    assert check.max_abs_difference > 0.1


@pytest.mark.parametrize(
    ("targets", "weights", "path", "says"),
    [
        ([[1, 2, 600]], None, 'data[0].loss_fn_inputs["target_tokens"][2]', "token 600 is outside"),
        ([[1, 2]], None, 'data[0].loss_fn_inputs["target_tokens"]', r"expected \[3\] or \[3, K\]"),
        ([[1, 2, 3]], [[1.0]], 'data[0].loss_fn_inputs["weights"]', "must be one a target"),
        ([[1, 2, 3]], [[0, float("nan"), 0]], 'data[0].loss_fn_inputs["weights"][1]', "holds nan"),
        ([[1, 2, 3], [4]], None, "data", "1 datum, but 2 tensors of target_tokens"),
    ],
)
def test_examples_that_do_not_fit_together_say_where(targets, weights, path, says):
    with pytest.raises(RequestError, match=says) as error:
        Examples(
            batch([1, 2, 3]),
            batch(*targets),
            batch(*weights, dtype=torch.float32) if weights else None,
        )
    assert error.value.path == path


def test_forward_backward_without_weights_is_an_error():
    with pytest.raises(RequestError, match="needs weights"):
        LanguageModel().forward_backward(mixed(weights=False))


def test_a_diverged_model_says_so_and_accumulates_nothing():
    model = LanguageModel()
    with torch.no_grad():
        model.parameters[0][111] = float("inf")
    with pytest.raises(RequestError, match="training diverged"):
        model.forward_backward(mixed())
    assert not model.gradient_flat().any()


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"learning_rate": -1.0}, "invalid learning_rate"),
        ({"learning_rate": float("nan")}, "invalid learning_rate"),
        ({"beta1": 1.0}, "at least 0 and below 1"),
        ({"eps": "small"}, "got 'small'"),
        ({"momentum": 0.9}, "unknown parameter 'momentum' of AdamW"),
    ],
)
def test_adam_params_are_checked(params, says):
    with pytest.raises(RequestError, match=says):
        AdamParams.from_mapping(params)


@pytest.mark.parametrize("seed", [1.5, "1", True, 2**63])
def test_a_seed_is_an_integer(seed):
    with pytest.raises(RequestError, match="integer of 64 bits"):
        LanguageModel(seed)
