"""linearize: the datums of the backward pass, from the buffers of the forward pass."""

from __future__ import annotations

import dataclasses
import itertools
import mmap
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from tinker import ForwardBackwardOutput, TensorData, types

from tinker_custom_loss import Composer, RequestError, linearize
from training import assert_same_parameters, datums, parameters_after, spread, squares, weighted_nll

TERMS = [
    {"fn": squares, "weight": 0.1, "name": "squares"},
    {"fn": spread, "weight": -1, "name": "s"},
]


def forward_output(data):
    generator = np.random.default_rng(0)
    outputs = []
    for datum in data:
        shape = datum.loss_fn_inputs["target_tokens"].to_numpy().shape
        logprobs = -generator.exponential(size=shape).astype(np.float32)
        outputs.append({"logprobs": TensorData.from_numpy(logprobs)})
    return ForwardBackwardOutput("ArrayRecord", outputs, {})


def test_weights_are_the_negative_gradient():
    data = datums()
    output = forward_output(data)
    linear, record = linearize(data, output, weighted_nll, TERMS, step=1)

    leaves = [
        record["logprobs"].to_torch().clone().requires_grad_() for record in output.loss_fn_outputs
    ]
    loss = weighted_nll(data, leaves)[0] + 0.1 * squares(data, leaves)[0] - spread(data, leaves)[0]
    loss.backward()
    assert record["loss_total"] == pytest.approx(float(loss.detach()))
    for datum, sent, leaf in zip(data, linear, leaves, strict=True):
        assert set(sent.loss_fn_inputs) == {"target_tokens", "weights"}
        targets = datum.loss_fn_inputs["target_tokens"]
        assert sent.loss_fn_inputs["target_tokens"] is targets
        assert sent.model_input is datum.model_input
        torch.testing.assert_close(sent.loss_fn_inputs["weights"].to_torch(), -leaf.grad)
        assert sent.loss_fn_inputs["weights"].shape == list(leaf.shape)


def test_driven_by_hand_it_trains_as_the_sdk_does(new_client, sandbox):
    data = datums()

    def by_hand(client, i):
        output = client.forward(data, "cross_entropy").result(60)
        linear, _ = linearize(data, output, weighted_nll, step=i)
        return client.forward_backward(linear, "cross_entropy")

    ours, theirs = new_client(), new_client()
    got = parameters_after(5, sandbox, ours, by_hand)
    want = parameters_after(
        5, sandbox, theirs, lambda c, _: c.forward_backward_custom(data, weighted_nll)
    )
    assert_same_parameters(got, want)


def test_the_weights_are_views_of_one_buffer_and_none_of_the_inputs():
    data = datums(6, alternatives=False)
    output = forward_output(data)
    before = [record["logprobs"].to_numpy().copy() for record in output.loss_fn_outputs]
    linear, _ = linearize(data, output, None, TERMS)
    arrays = [sent.loss_fn_inputs["weights"].to_numpy() for sent in linear]
    addresses = [array.__array_interface__["data"][0] for array in arrays]
    sizes = [array.nbytes for array in arrays]
    assert [b - a for a, b in itertools.pairwise(addresses)] == sizes[:-1]
    for array, record, old in zip(arrays, output.loss_fn_outputs, before, strict=True):
        assert array.flags.writeable  # else TensorData would have copied it
        assert not np.shares_memory(array, record["logprobs"].to_numpy())
        assert np.array_equal(record["logprobs"].to_numpy(), old)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly:UserWarning")
def test_sparse_tensors_go_in_and_out():
    """[T,K] in CSR: logprobs are densified; weights that are mostly 0 are sent as the SDK does."""
    dense = torch.zeros(6, 8, dtype=torch.int64)
    dense[:, 0] = torch.arange(1, 7)
    datum = types.Datum(
        model_input=types.ModelInput.from_ints([1] * 6),
        loss_fn_inputs={"target_tokens": TensorData.from_torch_sparse(dense)},
    )
    assert datum.loss_fn_inputs["target_tokens"].sparse_col_indices is not None
    logprobs = torch.where(dense > 0, -2.0, 0.0)
    record = {"logprobs": TensorData.from_torch_sparse(logprobs)}
    output = ForwardBackwardOutput("ArrayRecord", [record], {})
    (sent,), record = linearize([datum], output, None, TERMS[:1])
    assert record["loss_total"] == pytest.approx(0.1 * 24)
    weights = sent.loss_fn_inputs["weights"]
    assert weights.sparse_crow_indices is not None
    torch.testing.assert_close(weights.to_torch(), -0.2 * logprobs)


def test_provenance_is_carried_over():
    span = types.SampledProvenanceSpan(sequence_id="rollout-1", length=9)
    datum = datums(1)[0].with_provenance(model_input=[span], loss_fn_inputs=[span])
    ((sent,), _) = linearize([datum], forward_output([datum]), weighted_nll)
    assert sent.model_input_spans == datum.model_input_spans
    assert sent.loss_fn_input_spans == datum.loss_fn_input_spans


def test_a_datum_of_another_kind_keeps_what_it_has():
    @dataclasses.dataclass(frozen=True)
    class Rollout(types.Datum):
        episode: int = 0

    given = datums(1)[0]
    datum = Rollout(given.model_input, given.loss_fn_inputs, episode=7)
    ((sent,), _) = linearize([datum], forward_output([datum]), weighted_nll)
    assert type(sent) is Rollout
    assert sent.episode == 7


def test_a_composer_may_be_given():
    data = datums()
    output = forward_output(data)
    a, record = linearize(data, output, Composer(weighted_nll, TERMS))
    b, _ = linearize(data, output, weighted_nll, TERMS)
    assert record["regularizers"]["squares"]["weight"] == 0.1
    for x, y in zip(a, b, strict=True):
        assert np.array_equal(
            x.loss_fn_inputs["weights"].to_numpy(), y.loss_fn_inputs["weights"].to_numpy()
        )


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda d, o: (d[1:], o), "3 datums but the forward pass has outputs for 4"),
            (lambda d, o: ([], o[:0]), "the batch is empty"),
            (lambda d, o: (d, [*o[:1], {"loss": o[1]["logprobs"]}, *o[2:]]), 'no "logprobs"; it'),
            (lambda d, o: (d, [o[1], o[0], *o[2:]]), r"logprobs of datum 0 have shape \[10\], its"),
            (lambda d, o: (d, [*o[:2], o[1], o[3]]), r"of datum 2 have shape \[10\], its target_t"),
        ],
    )
    def test_data_and_output_must_fit(self, change, message):
        data = datums()
        output = forward_output(data)
        data, outputs = change(data, output.loss_fn_outputs)
        with pytest.raises(RequestError, match=message):
            linearize(data, ForwardBackwardOutput("ArrayRecord", outputs, {}), weighted_nll)

    def test_nothing_to_compute(self):
        data = datums()
        with pytest.raises(RequestError, match="nothing to compute"):
            linearize(data, forward_output(data))


FAULTS_OF_A_STEP = """
import resource

import numpy as np
import torch
from tinker import Datum, ForwardBackwardOutput, ModelInput, TensorData

from tinker_custom_loss import Regularizer, linearize


def squares(data, logprobs):
    return torch.cat(logprobs).square().sum(), {}


tokens, logprobs = np.zeros(1 << 20, np.int64), np.full(1 << 20, -1.0, np.float32)
data = [Datum(ModelInput.from_ints([0]), {"target_tokens": tokens})]
output = ForwardBackwardOutput("", [{"logprobs": TensorData.from_numpy(logprobs)}], {})


def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    linearize(data, output, None, [Regularizer(squares, 1.0, "squares")])
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


print(sum([faults() for _ in range(40)][8:]) / 32)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_a_step_lies_in_memory_that_the_last_one_has_left():
    command = [sys.executable, "-c", FAULTS_OF_A_STEP]
    pages_of_an_array = (4 << 20) // mmap.PAGESIZE
    # Dask sets MALLOC_TRIM_THRESHOLD_ for its workers, which then holds.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60, env=environment
    )
    assert float(done.stdout) < pages_of_an_array / 4
