"""check_term: sound terms pass, and each flaw fails the check that is about it and no other."""

from __future__ import annotations

import re
import threading

import pytest
import tinker
import torch

from flawed_terms import FLAWED, detaches_a_factor, one_rank_alone, sound, sound_and_async
from tinker_custom_loss import RequestError
from tinker_custom_loss.terms import CATALOGUE, entropy, kl
from tinker_custom_loss.testing import CHECKS, check_term

FLAWS = [(check, flawed) for check, terms in FLAWED.items() for flawed in terms]


def failures(term, **options):
    """What each check that fails says, by the check's name."""
    try:
        check_term(term, **options)
    except AssertionError as error:
        return dict(re.findall(r"^  (\w+): (.*)$", str(error), re.MULTILINE))
    return {}


@pytest.mark.parametrize("term", [sound, sound_and_async])
def test_a_sound_term_passes(term):
    check_term(term, process=True)


# Terms of groups want datums that belong together, which no made-up shape tells.
@pytest.mark.parametrize("name", [n for n, term in CATALOGUE.items() if term.scope != "group"])
def test_the_catalogue_passes(name):
    """A few have another gradient than their value has, on purpose, and three compare K tokens."""
    term = CATALOGUE[name]
    check_term(
        term,
        inputs={
            "logprobs": lambda shape: -0.5 - torch.rand(shape),
            "reference_logprobs": lambda shape: -0.5 - torch.rand(shape),
            "teacher_logprobs": lambda shape: -1.5 - torch.rand(shape),
            "advantages": lambda shape: torch.full(shape, 0.7),
        },
        shapes=[(4, 3), (1, 2)] if name in ("label_smoothing", "margin", "distill") else None,
        skip=["gradient"] if name in ("cispo", "dft", "entropy") else [],
    )


def test_terms_get_the_inputs_and_the_shapes_that_they_need():
    check_term(
        kl,
        params={"estimator": "k2"},
        inputs={"reference_logprobs": lambda shape: -1 - torch.rand(shape)},
        shapes=[(5,), (2,)],
    )
    check_term(entropy, shapes=[(4, 3), (1, 2)])
    check_term(one_rank_alone, shapes=[(5,), (2,)])


def test_datums_of_your_own_give_the_shapes():
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={"target_tokens": [1, 2, 3], "advantages": [0.5, 0.0, -1.0]},
    )
    seen = set()

    def policy_gradient(data, logprobs):
        seen.update(tuple(x.shape) for x in logprobs)
        advantages = [d.loss_fn_inputs["advantages"].to_torch() for d in data]
        return -sum((a * x).sum() for a, x in zip(advantages, logprobs, strict=True)), {}

    check_term(policy_gradient, data=[datum, datum])
    assert seen == {(3,)}


@pytest.mark.parametrize(("check", "flawed"), FLAWS, ids=[flawed.__name__ for _, flawed in FLAWS])
def test_a_flaw_fails_its_check_and_no_other(check, flawed):
    term = flawed() if isinstance(flawed, type) else flawed
    assert list(failures(term, process=check == "process")) == [check]


def test_every_check_has_a_flaw_that_fails_it():
    assert set(FLAWED) == set(CHECKS)


@pytest.mark.parametrize(
    ("check", "flawed"),
    [(check, flawed) for check, flawed in FLAWS if check not in ("returns", "unchanged")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_check_can_be_skipped(check, flawed):
    term = flawed() if isinstance(flawed, type) else flawed
    assert check not in failures(term, process=check == "process", skip=[check])


@pytest.mark.parametrize("gradient", [None, torch.tensor(3.0)])
def test_parameters_keep_the_gradient_that_they_had(gradient):
    temperature = torch.nn.Parameter(torch.tensor(0.5))
    temperature.grad = gradient

    def scaled(data, logprobs):
        return temperature * sound(data, logprobs)[0], {}

    check_term(scaled)
    assert temperature.grad is None if gradient is None else temperature.grad == 3.0


def test_messages_say_where_and_what_to_do():
    said = failures(detaches_a_factor, shapes=[(1,), (2, 2)])["gradient"]
    assert re.search(r"at datum \d, token .* by autograd and .* by finite", said)
    assert 'skip=("gradient",)' in said


def test_a_term_that_no_process_can_load_fails_where_that_is_asked():
    def local(data, logprobs, *, lock):
        return sound(data, logprobs)

    lock = threading.Lock()
    assert failures(local, params={"lock": lock}) == {}
    assert "cannot be pickled" in failures(local, params={"lock": lock}, process=True)["process"]


def test_nothing_of_the_caller_is_changed():
    state = torch.get_rng_state()
    for flawed in FLAWED["modes"]:
        failures(flawed)
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": ["gradients"]}, "no check 'gradients'; known are: gradient"),
        ({"skip": ["unchanged"]}, "'unchanged' cannot be skipped"),
        ({"skip": "graph"}, "a list of names"),
        ({"data": [], "shapes": []}, "0 datums and 0 shapes"),
        ({"data": [None], "inputs": {}}, "not both"),
        ({"params": {"sclae": 1}}, "cannot be called as"),
    ],
)
def test_a_check_that_cannot_be_made_is_refused(options, message):
    with pytest.raises(RequestError, match=message):
        check_term(sound, **options)
