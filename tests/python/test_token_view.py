"""The report shows at which tokens of a kept step which term pulls."""

from __future__ import annotations

import json
import re

import pytest
import tinker
import torch

import replayed_terms
from tinker_custom_loss import Composer, NonFiniteError, Recorder, flatten
from tinker_custom_loss.insight import kept_steps, read_run, replay
from tinker_custom_loss.insight.report import report_page
from tinker_custom_loss.insight.report.tokens import pulls

TEXT = b"abc<"


@pytest.fixture
def run(tmp_path):
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([256, *TEXT[:-1]]),
        loss_fn_inputs={"target_tokens": list(TEXT), "weights": [0.0, 1.0, 1.0, 1.0]},
    )
    terms = [
        {"fn": "l2", "weight": 0.5},
        {"fn": replayed_terms.towards, "weight": 0.1, "params": {"target": -9.0, "scales": (1, 0)}},
    ]
    with Recorder(tmp_path / "run", keep="all") as recorder:
        composer = Composer("nll", terms, recorder=recorder)
        composition = composer.compute([datum], [torch.tensor([-0.5, -0.25, -4.0, -1.5])], step=0)
        recorder.log(flatten(composition.record), 0)
    return read_run(tmp_path / "run")


def test_the_pull_of_a_term_at_a_token_is_its_weighted_gradient(run):
    (file,) = kept_steps(run.directory)
    found = pulls(replay(file, load=["replayed_terms"], term_gradients=True))
    assert found["base_loss"][0].tolist() == [0.0, -1.0, -1.0, -1.0]
    assert found["l2"][0].tolist() == [0.0, -0.25, -4.0, -1.5]  # 0.5 · 2 · logprob
    assert found["towards"][0].tolist() == [0.0, 0.0, 0.0, 0.0]


def marked(page):
    return re.findall(r'<span class="([^"]*)">([^<]*)</span>', page[page.index('"tokens"') :])


def pulls_of(page):
    return json.loads(re.search(r'id="pulls">(.*?)</script>', page).group(1))


def test_each_token_is_marked_by_the_term_and_the_regularizer_that_pull_hardest(run):
    page = report_page([run], tokenizer="bytes", load=["replayed_terms"])
    assert [text for _, text in marked(page)] == ["a", "b", "c", "&lt;"]
    # Of base_loss 0, 1, 1, 1 and l2 0, 0.25, 4, 1.5; the ground of both, the line of l2 alone.
    assert [kind for kind, _ in marked(page)] == [
        "prompt",
        "c0 p3 u1 q2",
        "c1 p4 u1 q4",
        "c1 p3 u1 q3",
    ]
    (pulled,) = pulls_of(page)
    assert pulled["terms"] == ["base_loss", "l2", "towards"]
    assert pulled["pulls"][6:9] == [-1.0, -4.0, 0.0]


def test_a_term_has_the_colour_that_it_has_in_the_charts(run):
    page = report_page([run], load=["replayed_terms"])
    swatch = re.search(r'swatch (c\d)"[^>]*/></svg> l2</li>', page).group(1)
    mark = re.search(r'class="mark (c\d)[^"]*">&nbsp;</span> l2</li>', page).group(1)
    assert swatch == mark == "c1"


def test_tokens_without_weight_are_set_apart_which_the_legend_says(run):
    page = report_page([run], tokenizer="bytes", load=["replayed_terms"])
    assert marked(page)[0] == ("prompt", "a")
    assert "weight 0, as a prompt has</li>" in page


@pytest.mark.parametrize(("shape", "directed"), [((3,), True), ((3, 2), False)])
def test_a_pull_at_several_alternatives_is_not_said_to_have_a_direction(tmp_path, shape, directed):
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={"target_tokens": torch.ones(shape, dtype=torch.int64)},
    )
    with Recorder(tmp_path, keep="all") as recorder:
        composer = Composer(None, [{"fn": "l2", "weight": 1.0}], recorder=recorder)
        composition = composer.compute([datum], [torch.full(shape, -1.0)], step=0)
        recorder.log(flatten(composition.record), 0)
    (pulled,) = pulls_of(report_page([read_run(tmp_path)]))
    assert pulled["directed"] is directed
    assert len(pulled["pulls"]) == 3


def test_a_step_that_failed_shows_the_text_around_the_token(tmp_path):
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([256, *TEXT[:-1]]),
        loss_fn_inputs={"target_tokens": list(TEXT)},
    )
    terms = [{"fn": replayed_terms.root, "weight": 0.1}]
    with Recorder(tmp_path, keep="failures") as recorder:
        composer = Composer("nll", terms, recorder=recorder)
        kept = composer.compute([datum], [torch.full((4,), -1.0)], step=0)
        recorder.log(flatten(kept.record), 0)
        with pytest.raises(NonFiniteError):
            composer.compute([datum], [torch.tensor([-1.0, -1.0, -1.0, 0.0])], step=1)
    run, load = read_run(tmp_path), ["replayed_terms"]
    page = report_page([run], tokenizer="bytes", load=load)
    assert "; datum 0, token 3: &lt;256&gt;abc«&lt;»</p>" in page
    assert "; datum 0, token 3: 256 97 98 99 «60»</p>" in report_page([run], load=load)


def test_a_term_that_cannot_be_had_is_left_out_which_the_section_says(run):
    page = report_page([run])
    assert "without &quot;towards&quot;, which cannot be had here" in page
    assert ">97</span> <span" in page
