"""What sampled estimates are worth: their expectation, enumerated over a small vocabulary."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tinker_custom_loss.terms import distill, entropy, importance_sampling, kl, proximal

LOGITS = torch.tensor([0.3, -1.2, 0.7, 0.1], dtype=torch.float64)
REFERENCE = torch.log_softmax(torch.tensor([0.9, -0.4, -0.6, 0.2], dtype=torch.float64), 0)
SAMPLER = torch.log_softmax(torch.tensor([-0.5, 0.4, 0.3, 0.0], dtype=torch.float64), 0)
ADVANTAGE = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)


def expected(made, sampler, **params):
    """Value and ``∂/∂logits`` of a term in expectation over tokens from ``sampler``."""
    logits = LOGITS.clone().requires_grad_()
    model = torch.log_softmax(logits, 0)
    inputs = {
        "reference_logprobs": REFERENCE,
        "teacher_logprobs": REFERENCE,
        "logprobs": sampler.detach(),
        "advantages": ADVANTAGE,
        "weights": sampler.detach().exp(),  # every token, as often as it is sampled
    }
    loss, _ = made([SimpleNamespace(loss_fn_inputs=inputs)], [model], **params)
    (gradient,) = torch.autograd.grad(loss, logits)
    return float(loss.detach()), gradient


def truth(fn):
    logits = LOGITS.clone().requires_grad_()
    value = fn(torch.log_softmax(logits, 0))
    (gradient,) = torch.autograd.grad(value, logits)
    return float(value.detach()), gradient


ON_POLICY = torch.log_softmax(LOGITS, 0)
REVERSE = truth(lambda p: (p.exp() * (p - REFERENCE)).sum())
NEGATIVE_ENTROPY = truth(lambda p: (p.exp() * p).sum())
REWARD = truth(lambda p: -(p.exp() * ADVANTAGE).sum())


def assert_gradient(got, want):
    torch.testing.assert_close(got[1], want[1])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3_weighted"])
def test_on_policy_every_kl_has_the_gradient_of_the_reverse_kl(estimator):
    assert_gradient(expected(kl, ON_POLICY, estimator=estimator), REVERSE)


@pytest.mark.parametrize("estimator", ["k1", "k3", "k3_weighted"])
def test_on_policy_the_value_of_k1_and_k3_is_the_kl(estimator):
    assert expected(kl, ON_POLICY, estimator=estimator)[0] == pytest.approx(REVERSE[0])


def test_off_policy_k3_weighted_alone_is_unbiased():
    value, gradient = expected(kl, SAMPLER, estimator="k3_weighted")
    assert value == pytest.approx(REVERSE[0])
    torch.testing.assert_close(gradient, REVERSE[1])
    for estimator in ("k1", "k2", "k3"):
        biased = expected(kl, SAMPLER, estimator=estimator)[1]
        assert (biased - REVERSE[1]).norm() > 0.1 * REVERSE[1].norm()


def test_distillation_of_sampled_tokens_is_that_of_the_whole_vocabulary():
    got = expected(distill, ON_POLICY, direction="reverse")
    assert got[0] == pytest.approx(REVERSE[0])
    assert_gradient(got, REVERSE)


def test_the_entropy_of_sampled_tokens_is_that_of_the_distribution():
    got = expected(entropy, ON_POLICY)
    assert got[0] == pytest.approx(NEGATIVE_ENTROPY[0])
    assert_gradient(got, NEGATIVE_ENTROPY)


@pytest.mark.parametrize("sampler", [ON_POLICY, SAMPLER], ids=["on-policy", "off-policy"])
def test_importance_sampling_is_unbiased(sampler):
    got = expected(importance_sampling, sampler)
    assert got[0] == pytest.approx(REWARD[0])
    assert_gradient(got, REWARD)


def test_the_gradient_of_proximal_vanishes_on_policy():
    assert float(expected(proximal, ON_POLICY)[1].norm()) == pytest.approx(0, abs=1e-12)


def test_a_full_support_is_the_same_by_tail_and_renormalized():
    """Where the alternatives are everything, nothing is left over."""
    datum = SimpleNamespace(loss_fn_inputs={"teacher_logprobs": REFERENCE[None]})
    for support in ("tail", "renormalize"):
        logits = LOGITS.clone().requires_grad_()
        model = torch.log_softmax(logits, 0)[None]
        loss, _ = distill([datum], [model], direction="reverse", support=support, weights=None)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.item() == pytest.approx(REVERSE[0])
        torch.testing.assert_close(gradient, REVERSE[1])


def test_sampling_agrees_with_the_expectation():
    """Seeded: the mean of 200,000 sampled gradients, to four standard errors."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.multinomial(SAMPLER.exp(), 200_000, replacement=True, generator=generator)
    model = torch.log_softmax(LOGITS, 0)
    inputs = {"reference_logprobs": REFERENCE[tokens], "logprobs": SAMPLER[tokens]}
    leaf = model[tokens].requires_grad_()
    datum = SimpleNamespace(loss_fn_inputs=inputs)
    loss, _ = kl([datum], [leaf], estimator="k3_weighted", weights=None)
    loss.backward()
    rows = torch.nn.functional.one_hot(tokens, 4) - model.exp()
    each = leaf.grad[:, None] * rows
    error = each.std(0) / len(tokens) ** 0.5
    assert ((each.mean(0) - REVERSE[1]).abs() < 4 * error).all()
