"""Sampling from the sandbox with the official client, and its tokenizer."""

import time

import pytest
import tinker
import torch
from tinker import types

from tinker_custom_loss.sandbox import Examples, LanguageModel
from tinker_custom_loss.tensors.batch import TensorBatch
from training import ADAM, SDK, datums

PROMPT = types.ModelInput.from_ints(list(b"the quick "))


def value(future):
    """Before tinker 0.38 some calls gave the client, not a future of it."""
    return future.result() if hasattr(future, "result") else future


@pytest.fixture
def client(new_client):
    client = new_client()
    for _ in range(30):
        client.forward_backward(datums(alternatives=False), "cross_entropy").result()
        client.optim_step(ADAM).result()
    return client


@pytest.fixture
def sampler(client):
    return value(client.save_weights_and_get_sampling_client())


def sample(sampler, num_samples=1, prompt=PROMPT, more=None, **params):
    params = types.SamplingParams(**{"max_tokens": 12, "seed": 7, **params})
    return sampler.sample(prompt, num_samples, params, **(more or {})).result()


def logprobs_of(model, prompt, tokens):
    """What training calls the logprobs of ``tokens`` behind ``prompt``."""
    text = torch.tensor([*prompt, *tokens])
    examples = Examples(TensorBatch.from_tensors([text[:-1]]), TensorBatch.from_tensors([text[1:]]))
    return model.forward(examples).logprobs.flat[len(prompt) - 1 :]


def test_samples_have_the_logprobs_that_training_gives_them(sandbox, client, sampler):
    answer = sample(sampler, num_samples=3, temperature=3.0)
    assert len({tuple(each.tokens) for each in answer.sequences}) == 3
    for each in answer.sequences:
        expected = logprobs_of(sandbox.model(client.model_id), PROMPT.to_ints(), each.tokens)
        torch.testing.assert_close(torch.tensor(each.logprobs), expected, rtol=1e-5, atol=1e-5)


def test_a_seed_gives_the_same_samples_and_training_does_not_reach_a_sampler(client, sampler):
    def drawn(sampler, **params):
        answer = sample(sampler, num_samples=4, temperature=3.0, **params)
        return [each.tokens for each in answer.sequences]

    before = drawn(sampler)
    client.forward_backward(datums(alternatives=False), "cross_entropy").result()
    client.optim_step(types.AdamParams(learning_rate=0.5)).result()
    assert drawn(sampler) == before
    assert drawn(sampler, seed=8) != before
    assert drawn(value(client.save_weights_and_get_sampling_client())) != before


def test_temperature_0_top_k_1_and_a_tiny_top_p_take_the_likeliest_token(sampler):
    greedy = sample(sampler, temperature=0).sequences[0].tokens
    assert sample(sampler, top_k=1).sequences[0].tokens == greedy
    assert sample(sampler, top_p=1e-6).sequences[0].tokens == greedy


def test_frequencies_follow_the_tempered_and_cut_distribution(sandbox, client, sampler):
    answer = sample(sampler, num_samples=4000, max_tokens=1, temperature=2.0, top_k=3)
    model = sandbox.model(client.model_id)
    contexts = model.contexts(torch.tensor(PROMPT.to_ints()))
    best, ids = (model.logits(contexts[-1:])[0].detach().log_softmax(0) / 2).topk(3)
    drawn = torch.tensor([each.tokens[0] for each in answer.sequences])
    for token, probability in zip(ids.tolist(), best.softmax(0).tolist(), strict=True):
        assert (drawn == token).float().mean().item() == pytest.approx(probability, abs=0.04)
    assert set(drawn.tolist()) <= set(ids.tolist())


def test_stops_end_a_sample_and_are_its_last_tokens(sampler):
    text = bytes(sample(sampler, temperature=0, max_tokens=8).sequences[0].tokens)
    for stop in (text[2:4].decode(), [text[2:4].decode(), "xyz"], [text[3]]):
        (each,) = sample(sampler, temperature=0, max_tokens=8, stop=stop).sequences
        assert each.stop_reason == "stop"
        ending = text[2:4] if not isinstance(stop[0], int) else text[3:4]
        assert bytes(each.tokens) == text[: text.index(ending) + len(ending)]
    (each,) = sample(sampler, temperature=0, max_tokens=8, stop=[]).sequences
    assert each.stop_reason == "length"
    assert bytes(each.tokens) == text


def test_prompt_logprobs_and_the_best_alternatives(sandbox, client, sampler):
    more = {"include_prompt_logprobs": True, "topk_prompt_logprobs": 2}
    answer = sample(sampler, more=more, max_tokens=1)
    expected = logprobs_of(
        sandbox.model(client.model_id), [PROMPT.to_ints()[0]], PROMPT.to_ints()[1:]
    )
    assert answer.prompt_logprobs[0] is None
    assert answer.prompt_logprobs[1:] == pytest.approx(expected.tolist(), abs=1e-5)
    assert answer.topk_prompt_logprobs[0] is None
    assert all(row[0][1] >= row[1][1] for row in answer.topk_prompt_logprobs[1:])
    assert sampler.compute_logprobs(PROMPT).result() == answer.prompt_logprobs


@pytest.mark.skipif(SDK < (0, 38), reason="asked for by newer SDKs")
def test_chosen_ids_alternatives_and_a_suffix_of_the_prompt(sampler):
    tokens = PROMPT.to_ints()
    ids = torch.full((len(tokens) - 1, 1), -1, dtype=torch.int64)
    ids[-1, 0] = tokens[-1]
    answer = sample(
        sampler,
        max_tokens=1,
        more={
            "include_prompt_logprobs": True,
            "prompt_logprobs_last_n": 2,
            "target_prompt_logprobs": types.TensorData.from_torch(ids),
            "prompt_alt_tokens_k": 4,
            "topk_sample_logprobs": 3,
        },
    )
    assert [logprob is None for logprob in answer.prompt_logprobs] == [True] * 8 + [False] * 2
    targets = answer.target_prompt_logprobs.to_torch()
    assert targets[-1, 0].item() == pytest.approx(answer.prompt_logprobs[-1])
    assert targets[:-1].count_nonzero() == 0
    assert answer.prompt_alt_tokens.tokens.to_torch().shape == (len(tokens) - 1, 4)
    assert answer.prompt_alt_tokens.logprobs.to_torch().max() < 0
    ((top, *_),) = answer.sequences[0].topk_logprobs
    assert top[1] <= 0
    assert len({each.sequence_id for each in answer.sequences}) == 1


def test_the_base_model_samples_as_it_was_before_training(sandbox):
    service = tinker.ServiceClient(base_url=sandbox.url, api_key="tml-sandbox")
    sampler = value(service.create_sampling_client(base_model=sandbox.base_model))
    (each,) = sample(sampler).sequences
    expected = logprobs_of(LanguageModel(0), PROMPT.to_ints(), each.tokens)
    torch.testing.assert_close(torch.tensor(each.logprobs), expected, rtol=1e-5, atol=1e-5)
    holder = service.holder
    holder.run_coroutine_threadsafe(holder.aclose()).result()


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"temperature": -1.0}, "invalid temperature"),
        ({"top_p": 0.0}, "invalid top_p"),
        ({"top_k": 0}, "invalid top_k"),
        ({"max_tokens": 40_000}, "exceed the context of 32768"),
    ],
)
def test_sampling_parameters_are_checked(sampler, params, says):
    with pytest.raises(tinker.BadRequestError, match=says):
        sample(sampler, **params)


def test_get_tokenizer_finds_bytes_on_this_machine(sandbox, new_client):
    client = new_client()
    client.get_tokenizer()  # imports the library
    started = time.monotonic()
    tokenizers = [
        client.get_tokenizer(),
        value(client.save_weights_and_get_sampling_client()).get_tokenizer(),
    ]
    assert time.monotonic() - started < 5
    for tokenizer in tokenizers:
        text = "Hé  llo\n\tUser: 😀"
        assert tokenizer.encode(text) == list(text.encode())
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.eos_token_id == 257
        assert len(tokenizer) == 512
