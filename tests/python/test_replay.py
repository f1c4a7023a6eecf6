"""A step that was kept is computed again from its file alone, bit for bit, or with changes."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import tinker
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import replayed_terms
from tinker_custom_loss import Composer, NonFiniteError, Recorder, RequestError, TermError
from tinker_custom_loss.__main__ import main
from tinker_custom_loss.insight import kept_steps, read_run, read_step, replay

TEXT = b"the quick brown fox jumps over the lazy dog"


def datum(text=TEXT, **inputs):
    length = len(text) - 1
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(list(text[:-1])),
        loss_fn_inputs={
            "target_tokens": list(text[1:]),
            "weights": [1.0] * length,
            "reference_logprobs": tinker.TensorData.from_numpy(np.full(length, -1.5, np.float32)),
        }
        | {key: tinker.TensorData.from_numpy(np.asarray(value)) for key, value in inputs.items()},
    )


DATA = [datum(), datum(TEXT[:20])]


def logprobs(seed=0, data=DATA):
    generator = torch.Generator().manual_seed(seed)
    lengths = [len(each.model_input.to_ints()) for each in data]
    return [-3 * torch.rand(length, generator=generator) for length in lengths]


def keep(directory, composer, *, step=3, data=DATA, given=None, keep="all", **options):
    """The file of one step."""
    with Recorder(directory, keep=keep) as recorder, contextlib.suppress(TermError):
        composer.recorded_by(recorder).compute(
            data, logprobs(data=data) if given is None else given, step=step, **options
        )
    (file,) = kept_steps(directory)
    return file


def test_a_step_without_changes_comes_out_bit_equal(tmp_path):
    composer = Composer("nll", [{"fn": "kl", "weight": 0.1}, {"fn": "entropy", "weight": 0.01}])
    again = replay(keep(tmp_path, composer))
    assert again.is_same
    assert again.changes == []
    assert str(again).splitlines()[1].startswith("bit-equal: the loss ")


def test_changes_are_shown_beside_the_step_as_it_was(tmp_path):
    composer = Composer(
        "nll", [{"fn": "kl", "weight": lambda step: 0.1 * step}, {"fn": "entropy", "weight": 0.01}]
    )
    file = keep(tmp_path, composer)
    again = replay(
        file,
        weights={"kl": 3.0},
        drop=["entropy"],
        add=[{"fn": "l2", "weight": 0.5}],
        replace={"base_loss": "dft"},
    )
    expected = Composer("dft", [{"fn": "kl", "weight": 3.0}, {"fn": "l2", "weight": 0.5}]).compute(
        DATA, logprobs()
    )
    assert again.again.loss_total == expected.loss_total
    before, after, cosine = again.gradient_change
    assert after == pytest.approx(float(torch.cat(expected.gradients).norm()), rel=1e-6)
    was = Composer(composer.base_loss.fn, [{"fn": "kl", "weight": 0.3}, composer.regularizers[1]])
    was = torch.cat(was.compute(DATA, logprobs()).gradients)
    assert before == pytest.approx(float(was.norm()), rel=1e-6)
    assert cosine == pytest.approx(
        float(torch.cosine_similarity(was, torch.cat(expected.gradients), 0)), abs=1e-6
    )
    text = str(again)
    assert '"kl" weighted 3 rather than 0.3' in text
    assert 'without "entropy"' in text
    assert "with l2, weighted 0.5" in text
    assert max(map(len, text.splitlines())) <= 90
    assert "cosine" in text


def test_the_total_is_under_all_terms_and_takes_the_row_of_none(tmp_path):
    composer = Composer("nll", [{"fn": "kl", "weight": 0.1, "name": "total"}])
    text = str(replay(keep(tmp_path, composer), add=[{"fn": "l2", "weight": 0.5}]))
    names = [line.split()[0] for line in text.splitlines() if " then " in line]
    assert names == ["base_loss", "total", "l2", "total"]


def test_a_logprob_that_is_not_finite_is_shown_in_its_text(tmp_path, capsys):
    given = logprobs()
    given[1][7] = math.nan
    with Recorder(tmp_path, keep="failures") as recorder:
        composer = Composer("nll", [{"fn": "kl", "weight": 0.1}], recorder=recorder)
        with pytest.raises(NonFiniteError) as raised:
            composer.compute(DATA, given, step=12)
    assert (raised.value.datum, raised.value.token) == (1, (7,))
    (file,) = kept_steps(tmp_path)
    assert main(["replay", str(file), "--weight", "kl=1", "--tokenizer", "bytes"]) == 0
    out = capsys.readouterr().out
    assert "datum 1, token 7: the quic«k» brown f…" in out
    assert "w·value" not in out  # neither then nor now is there a record to show


def test_a_gradient_that_is_not_finite_is_reproduced_by_the_command_line_with_its_text(tmp_path):
    composer = Composer("nll", [{"fn": replayed_terms.root, "weight": 0.1}])
    given = logprobs()
    given[1][7] = 0.0
    with Recorder(tmp_path, keep="failures") as recorder:
        recorded = composer.recorded_by(recorder)
        recorded.compute(DATA, logprobs(), step=11)
        with pytest.raises(NonFiniteError) as raised:
            recorded.compute(DATA, given, step=12)
    (file,) = kept_steps(tmp_path)
    assert file.name == "00000012.safetensors"

    command = [sys.executable, "-m", "tinker_custom_loss", "replay", str(file)]
    load = ["--load", str(Path(__file__).with_name("replayed_terms.py"))]
    done = subprocess.run([*command, *load, "--tokenizer", "bytes"], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode == 0
    assert f"reproduced: NonFiniteError: {raised.value}" in done.stdout
    assert "datum 1, token 7: the quic«k» brown f…" in done.stdout

    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "was replayed_terms:root; a file imports nothing by itself: give --load" in done.stderr


def test_where_there_is_no_tokenizer_the_ids_are_shown(tmp_path):
    from tinker_custom_loss.insight.tokenizing import decoder, text_around

    step = read_step(keep(tmp_path, Composer("nll")))
    assert text_around(step, 1, [7]).endswith("113 117 105 99 «107» 32 98 114 111 119 110 32 102…")
    assert text_around(step, 0, [0], decoder("bytes")) == "t«h»e quick …"


def test_a_lambda_is_said_to_have_no_name_and_can_be_given_one(tmp_path):
    fn = lambda data, logprobs: replayed_terms.spread(data, logprobs)  # noqa: E731
    file = keep(tmp_path, Composer("nll", [{"fn": fn, "weight": 0.1, "name": "spread"}]))
    with pytest.raises(RequestError, match=r'"spread" was a lambda in .*--replace spread=module:'):
        replay(file)
    again = replay(file, replace={"spread": "replayed_terms:spread"})
    assert again.changes == []
    assert again.is_same


def test_a_term_that_draws_draws_the_same_again(tmp_path):
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)
    composer = Composer("nll", [{"fn": replayed_terms.draws, "weight": 0.1}])
    file = keep(tmp_path, composer)
    before = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(1)
    assert replay(file, load=["replayed_terms"]).is_same
    torch.manual_seed(4)
    other = composer.compute(DATA, logprobs(), step=3)
    assert other.loss_total != read_step(file).outcome.loss_total
    assert len(before) == 3


def test_params_with_tensors_and_a_step_in_parts(tmp_path):
    composer = Composer(
        "nll",
        [
            {
                "fn": replayed_terms.towards,
                "weight": 0.5,
                "params": {"target": torch.tensor([0.25]), "scales": (1.0, 2.0)},
            },
        ],
    )
    assert replay(keep(tmp_path / "a", composer), load=["replayed_terms"]).is_same
    split = Composer("nll", [{"fn": "kl", "weight": 0.1, "reduction": "token_mean"}])
    file = keep(
        tmp_path / "b", split, data=DATA[:1], given=logprobs()[:1], totals=split.totals(DATA)
    )
    assert replay(file).is_same


def test_every_nth_step_is_kept_and_a_step_that_lost_a_term(tmp_path):
    skips = {"fn": replayed_terms.root, "weight": 1.0, "on_non_finite": "skip"}
    with Recorder(tmp_path, keep="every:4") as recorder:
        composer = Composer("nll", [skips], recorder=recorder)
        for step in range(9):
            given = logprobs(step)
            if step == 5:
                given[0][2] = 0.0
            composer.compute(DATA, given, step=step)
    assert [read_step(file).step for file in kept_steps(tmp_path)] == [0, 4, 5, 8]


def test_the_oldest_steps_make_room_which_the_log_says(tmp_path, caplog):
    size = keep(tmp_path / "one", Composer("nll")).stat().st_size
    with Recorder(tmp_path / "many", keep="all", keep_bytes=int(3.5 * size)) as recorder:
        composer = Composer("nll", recorder=recorder)
        for step in range(8):
            composer.compute(DATA, logprobs(step), step=step)
    assert [read_step(file).step for file in kept_steps(tmp_path / "many")] == [5, 6, 7]
    (said,) = [r for r in caplog.records if "the oldest are deleted" in r.getMessage()]
    assert said.levelno == logging.WARNING


def test_what_cannot_be_kept_costs_a_file_and_no_step(tmp_path, caplog):
    with Recorder(tmp_path, keep="all") as recorder:
        Composer(replayed_terms.spread, recorder=recorder).compute([object()] * 2, logprobs())
    assert kept_steps(tmp_path) == []
    assert "a step without a number cannot be kept: datum 0 is <object" in caplog.text


def test_nor_does_a_tensor_of_an_unforeseen_kind(tmp_path, caplog):
    def loss(data, logprobs, *, bigrams):
        return replayed_terms.likelihood(data, logprobs)

    with Recorder(tmp_path, keep="all") as recorder:
        composer = Composer(loss, base_params={"bigrams": torch.eye(2).to_sparse()})
        assert composer.recorded_by(recorder).compute(DATA, logprobs(), step=1).loss_total
    assert kept_steps(tmp_path) == []
    assert "step 1 cannot be kept: RuntimeError" in caplog.text


def test_a_full_disk_holds_no_half_of_a_step(tmp_path):
    """The limit of the size of a file stands for it."""
    script = (
        "import resource, signal, sys, torch\n"
        "from tinker_custom_loss import Composer, Recorder\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "recorder = Recorder(sys.argv[1], keep='all')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "Composer('nll', recorder=recorder).compute([None], [-torch.ones(5)], step=1)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "step 1 cannot be kept" in ran.stderr
    assert list((tmp_path / "steps").iterdir()) == []


@pytest.mark.parametrize("keep", ["every", "every:0", "sometimes", 3])
def test_a_keep_that_means_nothing_is_refused_at_once(tmp_path, keep):
    with pytest.raises(RequestError, match='keep must be "failures", "all" or "every:N"'):
        Recorder(tmp_path / "run", keep=keep)
    assert not (tmp_path / "run").exists()


def test_a_file_of_something_else_is_named(tmp_path):
    file = tmp_path / "x.safetensors"
    with pytest.raises(RequestError, match="there is no file"):
        replay(file)
    file.write_bytes(b"no tensors")
    with pytest.raises(RequestError, match="holds no step that was kept"):
        replay(file)
    file.write_bytes(safetensors.torch.save({"a": torch.ones(1)}))
    with pytest.raises(RequestError, match="holds no step that this version can read"):
        replay(file)


def test_a_name_that_the_step_does_not_have_is_refused_with_those_that_it_has(tmp_path):
    file = keep(tmp_path, Composer("nll", [{"fn": "kl", "weight": 0.1}]))
    with pytest.raises(RequestError, match='weight: the step had no term "k1"; known are: kl'):
        replay(file, weights={"k1": 1.0})
    with pytest.raises(RequestError, match='drop: the step had no term "l2"'):
        replay(file, drop=["l2"])


def test_the_composition_is_written_down(tmp_path):
    terms = [
        {"fn": "kl", "weight": lambda step: 0.5 + step, "params": {"estimator": "k2"}},
        {"fn": replayed_terms.spread, "weight": 0.1, "on_error": "skip"},
    ]
    with Recorder(tmp_path, config={"model": "tiny"}) as recorder:
        composer = Composer("nll", terms, recorder=recorder)
        composer.compute(DATA, logprobs(), step=0)
    config = read_run(tmp_path).config
    assert config["model"] == "tiny"
    assert config["composition"] == json.loads(json.dumps(composer.describe()))
    kl, spread = config["composition"]["regularizers"]
    assert kl["fn"] == "kl"
    assert kl["params"] == {"estimator": "k2"}
    assert kl["defaults"]["reduction"] == "token_sum"
    assert kl["weight"]["at"] == {str(n): 0.5 + n for n in (0, 1, 10, 100, 1_000, 10_000)}
    assert kl["weight"]["schedule"].startswith("a lambda in ")
    assert (spread["fn"], spread["weight"]) == ("replayed_terms:spread", 0.1)
    assert spread["on_error"] == "skip"
    versions = config["composition"]["versions"]
    assert set(versions) == {"tinker_custom_loss", "torch", "tinker", "python"}
    assert versions["torch"] == torch.__version__


def test_a_wrapped_client_keeps_its_steps(tmp_path, new_client):
    from tinker_custom_loss import with_regularizers

    with Recorder(tmp_path, keep="all") as recorder:
        client = with_regularizers(
            new_client(),
            base_loss=replayed_terms.likelihood,
            regularizers=[{"fn": "l2", "weight": 0.1}],
            recorder=recorder,
        )
        outputs = []
        for _ in range(2):
            outputs.append(client.forward_backward_custom(DATA).result())
            client.optim_step(tinker.AdamParams(learning_rate=0.01)).result()
    steps = [read_step(file) for file in kept_steps(tmp_path)]
    assert [step.step for step in steps] == [0, 1]
    assert [s.outcome.loss_total for s in steps] == [o.record["loss_total"] for o in outputs]
    assert all(replay(step, load=["replayed_terms"]).is_same for step in steps)


CATALOGUE_TERMS = ("nll", "dft", "focal", "kl", "entropy", "l1", "l2", "elastic_net", "proximal")
random_terms = st.lists(
    st.builds(
        dict,
        fn=st.sampled_from([*CATALOGUE_TERMS, replayed_terms.spread, replayed_terms.draws]),
        weight=st.floats(-2, 2, width=32),
        run_in_executor=st.booleans(),
        on_non_finite=st.sampled_from(["raise", "skip", "zero"]),
    ),
    min_size=1,
    max_size=4,
)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])


@settings(max_examples=int(os.environ.get("REPLAYS", "20")))  # more: make replays
@given(
    terms=random_terms,
    base=st.sampled_from([None, "nll", "importance_sampling", replayed_terms.likelihood]),
    lengths=st.lists(st.integers(2, len(TEXT)), min_size=1, max_size=4),
    kinds=st.lists(dtypes, min_size=4, max_size=4),
    seed=st.integers(0, 2**16),
    bad=st.booleans(),
)
def test_any_composition_comes_out_bit_equal(
    tmp_path_factory, terms, base, lengths, kinds, seed, bad
):
    rng = np.random.default_rng(seed)
    data = [
        datum(
            TEXT[:length],
            advantages=rng.standard_normal(length - 1).astype(np.float32),
            logprobs=-rng.random(length - 1).astype(np.float32),
        )
        for length in lengths
    ]
    given = [x.to(kind) for x, kind in zip(logprobs(seed, data), kinds, strict=False)]
    if bad:
        given[-1][0] = torch.nan
    named = [{**term, "name": f"term {i}"} for i, term in enumerate(terms)]
    drawing = [term for term in named if term["fn"] is replayed_terms.draws]
    if len(drawing) > 1:  # in threads, it is open who of them draws first
        for term in drawing:
            term["run_in_executor"] = False
    file = keep(
        tmp_path_factory.mktemp("run"), Composer(base, named), data=data, given=given, step=seed
    )
    again = replay(file, load=["replayed_terms"])
    assert again.is_same, str(again)
    assert again.changes == []


def test_a_process_killed_while_it_keeps_steps_leaves_whole_ones(tmp_path):
    program = (
        "import sys, itertools, torch\n"
        "from tinker_custom_loss import Composer, Recorder\n"
        "recorder = Recorder(sys.argv[1], keep='all', keep_bytes=1_000_000)\n"
        "composer = Composer('nll', [{'fn': 'l2', 'weight': 0.1}], recorder=recorder)\n"
        "for step in itertools.count():\n"
        "    composer.compute([None], [torch.full((4000,), -1.0)], step=step)\n"
        "    if step == 30: print('going', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "going\n"
    process.kill()
    process.communicate()
    files = kept_steps(tmp_path)
    assert len(files) >= 2
    assert all(replay(file).is_same for file in (files[0], files[-1]))
    assert [read_step(file).step for file in files] == sorted(read_step(f).step for f in files)
    assert read_run(tmp_path).config["composition"]["regularizers"][0]["fn"] == "l2"
