"""The report of a run: one file, the numbers that were recorded, and nothing that was hidden."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
from xml.etree import ElementTree

import pytest

from tinker_custom_loss import Composer
from tinker_custom_loss.__main__ import main
from tinker_custom_loss.insight import Recorder, read_run
from tinker_custom_loss.insight.report import report_page
from tinker_custom_loss.insight.report.buckets import bucket, edges


def metrics(step, names=("kl", "l2")):
    flat = {"loss_total": 5.0 - step * 1e-4, "base_loss/value": 4.0, "base_loss/grad_norm": 2.0}
    for index, name in enumerate(names):
        value = math.sin(step / 50 + index)
        flat |= {
            f"regularizers/{name}/value": value,
            f"regularizers/{name}/weight": 0.1,
            f"regularizers/{name}/contribution": 0.1 * value,
            f"regularizers/{name}/grad_norm_weighted": 0.5 + 0.1 * value,
            f"regularizers/{name}/cosine_to_total": value,
            f"regularizers/{name}/seconds": 0.001,
        }
    return flat


def recorded(directory, steps, change=lambda step, flat: flat, **options):
    with Recorder(directory, overwrite=True, **options) as recorder:
        for step in range(steps):
            recorder.log(change(step, metrics(step)), step)
    return read_run(directory)


def numbers_of(page):
    return json.loads(re.search(r'id="numbers">(.*?)</script>', page, re.DOTALL).group(1))


def test_a_bucket_keeps_its_extremes_and_counts_what_is_not_finite():
    values = [0.0] * 10_000
    values[5_003], values[5_004], values[7] = 9.0, -9.0, math.nan
    ranges = edges(range(10_000), 160)
    assert len(ranges) == 160
    assert sum(end - start for start, end in ranges) == 10_000
    made = bucket(values, ranges)
    assert (max(made.high), min(made.low), made.non_finite) == (9.0, -9.0, 1)
    assert bucket([None, 2.0, 4.0], edges(range(3), 1)).mean == [3.0]
    assert bucket([1.0, 2.0], edges(range(2), 160)).mean == [1.0, 2.0]


def test_the_page_asks_nothing_of_anyone_and_runs_only_its_own_script(tmp_path):
    page = report_page([recorded(tmp_path / "run", 20)])

    seen = []

    class Tags(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            seen.append((tag, dict(attributes)))

    Tags().feed(page)
    assert not [a for _, a in seen if {"src", "href", "style", "onclick"} & a.keys()]
    assert "url(" not in page
    assert set(re.findall(r"https?://[^\"' ]+", page)) == {"http://www.w3.org/2000/svg"}
    (policy,) = [a["content"] for t, a in seen if t == "meta" and "http-equiv" in a]
    assert policy.startswith("default-src 'none'; ")
    for kind, text in (
        ("style", re.search(r"<style>(.*?)</style>", page, re.DOTALL).group(1)),
        ("script", re.search(r"<script>(.*?)</script>", page, re.DOTALL).group(1)),
    ):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium is installed")
def test_a_browser_has_nothing_to_complain_of(tmp_path):
    page = report_page([recorded(tmp_path / "run", 20, with_pairs)] * 2)
    assert complaints(tmp_path, page) == []
    # Nor is it mute: a policy that does not fit the script is an error, as a request would be.
    (complaint,) = complaints(tmp_path, page.replace('"use strict";', '"use strict"; '))
    assert "Content Security Policy" in complaint


def complaints(directory, page):
    file = directory / "page.html"
    file.write_text(page, encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--enable-logging=stderr", "--dump-dom"]
    command += ["--virtual-time-budget=2000"]  # so that what a script has to say is said by then
    profile = tempfile.mkdtemp(dir=directory)  # the one before may still be closing its own
    ran = subprocess.run(
        [*command, f"--user-data-dir={profile}", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "Which terms fight" in ran.stdout
    return [line for line in ran.stderr.splitlines() if "CONSOLE" in line]


def test_the_charts_hold_the_recorded_numbers(tmp_path):
    page = report_page([recorded(tmp_path / "run", 20)])
    numbers = numbers_of(page)
    assert set(numbers) == {
        f"r0-{key}" for key in ("contributions", "norms", "cosines", "values", "weights", "seconds")
    }
    kl = numbers["r0-contributions"]["series"]["kl"]["mean"]
    assert kl == [
        float(f"{metrics(step)['regularizers/kl/contribution']:.4g}") for step in range(20)
    ]
    assert numbers["r0-contributions"]["steps"][3] == [3, 3]


def test_ten_thousand_steps_are_less_than_500_kb_and_an_outlier_is_still_seen(tmp_path):
    def change(step, flat):
        return flat | ({"regularizers/kl/value": 77.0} if step == 6_789 else {})

    names = [f"term{index}" for index in range(4)]
    with Recorder(tmp_path) as recorder:
        for step in range(10_000):
            recorder.log(change(step, metrics(step, ["kl", *names])), step)
    page = report_page([read_run(tmp_path)])
    assert len(page.encode()) < 500_000
    assert max(numbers_of(page)["r0-values"]["series"]["kl"]["high"]) == 77.0


def test_what_is_not_finite_is_counted_and_leaves_a_gap(tmp_path):
    run = recorded(
        tmp_path, 10, lambda step, flat: flat | ({"loss_total": math.inf} if step == 4 else {})
    )
    page = report_page([run])
    assert "1 values were not finite and are not drawn" in page
    assert numbers_of(page)["r0-contributions"]["series"]["loss_total"]["mean"][4] is None
    assert "nan" not in re.findall(r'<path[^>]*d="([^"]*)"', page)


def test_text_of_a_run_stays_text(tmp_path):
    evil = "<img src=x>"
    with Recorder(tmp_path / "<b>run", config={"note": "</pre><script>alert(1)</script>"}) as r:
        r.log(metrics(0, [evil]), 0)
    page = report_page([read_run(tmp_path / "<b>run")])
    assert evil not in page
    assert "<b>run" not in page
    assert page.count("<script") == 3


def test_runs_are_compared_over_one_axis(tmp_path):
    runs = [recorded(tmp_path / "a", 10), recorded(tmp_path / "b", 5)]
    across = numbers_of(report_page(runs))["all-loss"]
    assert across["series"]["b"]["mean"][4:6] == [float(f"{5.0 - 4e-4:.4g}"), None]
    assert list(across["series"]) == ["a", "b"]


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    runs = [recorded(tmp_path / "one" / "run", 3), recorded(tmp_path / "two" / "run", 5)]
    across = numbers_of(report_page(runs))["all-loss"]
    assert list(across["series"]) == ["one/run", "two/run"]


def test_each_term_that_runs_have_in_common_is_compared(tmp_path):
    with Recorder(tmp_path / "b") as recorder:
        for step in range(2, 6):
            recorder.log(metrics(step, ["kl", "other"]), step)
    page = report_page([recorded(tmp_path / "a", 4), read_run(tmp_path / "b")])
    titles = re.findall(r'<figure id="all-[^"]*"><h3>([^<]*)</h3>', page)
    assert titles == [
        "Loss of each run",
        "base_loss: value",
        "base_loss: weight · |∇|",
        "kl: value",
        "kl: weight · value",
        "kl: weight · |∇|",
    ]
    table = page[page.index("At step 3, the last that all have") :]
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", table[: table.index("</table>")])
    kl, other = f"{math.sin(3 / 50):.4g}", f"{math.sin(3 / 50 + 1):.4g}"
    assert cells[cells.index("kl") :][1:3] == [kl, kl]
    assert cells[cells.index("other") :][1:3] == ["-", other]


def test_runs_without_a_common_step_are_shown_at_their_own_last(tmp_path):
    with Recorder(tmp_path / "b") as recorder:
        recorder.log(metrics(9), 9)
    page = report_page([recorded(tmp_path / "a", 4), read_run(tmp_path / "b")])
    assert "since no step is common to all" in page
    assert '<th scope="col">a, step 3</th><th scope="col">b, step 9</th>' in page


def test_what_was_composed_otherwise_is_listed_and_what_was_not_is_not(tmp_path):
    def run(name, weight, *more):
        terms = [{"fn": "kl", "weight": weight}, {"fn": "l2", "weight": 0.5}, *more]
        told = {"composition": Composer("nll", terms).describe(), "learning_rate": 0.01}
        return recorded(tmp_path / name, 3, config=told)

    page = report_page([run("a", 0.1), run("b", 1.0, {"fn": "entropy", "weight": 0.2})])
    table = page[page.index("What differs") :]
    rows = re.findall(r"<tr>(.*?)</tr>", table[: table.index("</table>")])
    cells = [re.findall(r">([^<]+)<", row) for row in rows]
    assert cells == [
        ["a", "b"],
        ["kl: weight", "0.1", "1.0"],
        ["entropy: fn", "-", "entropy"],
        ["entropy: weight", "-", "0.2"],
    ]
    same = report_page([run("c", 0.1), run("d", 0.1)])
    assert "Nothing differs in what their config.json says." in same
    mute = report_page([recorded(tmp_path / name, 3) for name in "ef"])
    assert "f does not say what it was composed of." in mute
    assert "Nothing differs" not in mute


def test_a_run_that_logs_every_hundredth_step_is_a_line_beside_one_that_logs_each(tmp_path):
    with Recorder(tmp_path / "b") as recorder:
        for step in range(0, 2_001, 100):
            recorder.log(metrics(step), step)
    page = report_page([recorded(tmp_path / "a", 2_001), read_run(tmp_path / "b")])
    (chart,) = re.findall(r'<figure id="all-loss">.*?</figure>', page)
    lines = re.findall(r'class="line (c\d)" d="([^"]*)"', chart)
    assert [(color, d.count("M")) for color, d in lines] == [("c0", 1), ("c1", 1)]


def test_steps_lie_to_scale(tmp_path):
    with Recorder(tmp_path) as recorder:
        for step in (0, 1, 10):
            recorder.log(metrics(step), step)
    (line,) = re.findall(r'class="total" d="([^"]*)"', report_page([read_run(tmp_path)]))
    first, second, last = (float(x) for x in re.findall(r"[ML]([\d.]+) ", line))
    assert (second - first) / (last - first) == pytest.approx(0.1, abs=0.001)


def test_what_hides_in_a_mean_is_seen_in_the_heat_map(tmp_path):
    def change(step, flat):
        cosine = -1.0 if step == 1_234 else 1.0
        return flat | {
            "regularizers/kl/cosine_to_total": cosine,
            "regularizers/l2/cosine_to_total": 1.0,
        }

    page = report_page([recorded(tmp_path, 3_000, change)])
    (chart,) = re.findall(r'<figure id="r0-cosines">.*?</figure>', page)
    (cells,) = re.findall(r'class="cell c5" fill-opacity="1" d="([^"]*)"', chart)
    assert cells.count("M") == 1
    assert "below each mean the least" in chart


@pytest.mark.parametrize("size", [1.7e308, -1.7e308, 1e-310, 0.0])
def test_numbers_of_any_size_are_drawn(tmp_path, size):
    def change(step, flat):
        return {key: size * (1 - step / 400) for key in flat if "cosine" not in key}

    page = report_page([recorded(tmp_path, 400, change)])
    paths = re.findall(r'<path[^>]* d="([^"]*)"', page)
    assert paths
    assert not [d for d in paths if "nan" in d or "inf" in d]
    shown = numbers_of(page)["r0-values"]["series"]["kl"]["mean"][0]
    assert shown / 2 == pytest.approx(size / 2, rel=0.01)


def test_a_norm_of_0_is_not_drawn_as_the_least_that_is_not(tmp_path):
    def change(step, flat):
        norm = [0.0, 1e-4, 1.0][step % 3]
        return flat | {"regularizers/kl/grad_norm_weighted": norm, "base_loss/grad_norm": 1.0}

    (chart,) = re.findall(
        r'<figure id="r0-norms">.*?</figure>', report_page([recorded(tmp_path, 6, change)])
    )
    (line,) = re.findall(r'class="line c1" d="([^"]*)"', chart)
    zero, least, _ = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", line)][:3]
    assert zero > least + 10
    assert re.search(rf'y="{zero + 3:.1f}" text-anchor="end">0</text>', chart)


def test_what_takes_from_the_loss_is_piled_below_0(tmp_path):
    def change(step, flat):
        return {
            "loss_total": 2.0,
            "base_loss/value": 3.0,
            "regularizers/kl/value": 1.0,
            "regularizers/kl/contribution": -1.0,
        }

    (chart,) = re.findall(
        r'<figure id="r0-contributions">.*?</figure>', report_page([recorded(tmp_path, 2, change)])
    )
    areas = re.findall(r'class="area (c\d)" d="([^"]*)"', chart)
    heights = {c: {float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", d)} for c, d in areas}
    zero = max(heights["c0"])
    assert min(heights["c1"]) == zero
    assert (max(heights["c1"]) - zero) * 3 == pytest.approx(zero - min(heights["c0"]), abs=0.3)
    (total,) = re.findall(r'class="total" d="M[\d.]+ ([\d.]+)', chart)
    assert zero - float(total) == pytest.approx(2 * (max(heights["c1"]) - zero), abs=0.3)


def test_a_number_that_is_absent_is_not_said_to_be_infinite(tmp_path):
    def change(step, flat):
        if step < 3:
            return {key: value for key, value in flat.items() if "/kl/" not in key}
        return flat | {"regularizers/kl/value": math.nan if step == 4 else 1.0}

    page = report_page([recorded(tmp_path, 6, change)])
    kl = numbers_of(page)["r0-values"]["series"]["kl"]
    assert kl["mean"] == [None, None, None, 1.0, None, 1.0]
    assert kl["lost"] == [0, 0, 0, 0, 1, 0]


def test_the_last_numbers_of_a_term_that_went_away_say_when(tmp_path):
    def change(step, flat):
        return {key: value for key, value in flat.items() if step < 4 or "/kl/" not in key}

    page = report_page([recorded(tmp_path, 9, change)])
    assert "kl (last at step 3)</th>" in page
    assert "l2</th>" in page


def test_a_term_has_one_colour_in_all_runs(tmp_path):
    with Recorder(tmp_path / "b") as recorder:
        recorder.log(metrics(0, ["l2", "kl"]), 0)
    page = report_page([recorded(tmp_path / "a", 3), read_run(tmp_path / "b")])
    swatches = set(re.findall(r'swatch (c\d)"[^>]*/></svg> (kl|l2)<', page))
    assert swatches == {("c1", "kl"), ("c2", "l2")}


def with_pairs(step, flat):
    return flat | {
        "cosines/base_loss/kl": 0.5,
        "cosines/base_loss/l2": math.sin(step),
        "cosines/kl/l2": -0.25 * (step > 5),
    }


def test_the_pairs_of_terms_are_a_heat_map_the_worst_first(tmp_path):
    conflicts = numbers_of(report_page([recorded(tmp_path, 12, with_pairs)]))["r0-conflicts"]
    assert list(conflicts["series"]) == ["kl · l2", "base_loss · l2", "base_loss · kl"]
    assert conflicts["series"]["kl · l2"]["mean"] == [0] * 6 + [-0.25] * 6
    assert conflicts["plot"][0] > 100  # where its first step is, right of the names


def test_of_many_pairs_the_worst_are_shown_and_the_caption_says_so(tmp_path):
    def change(step, flat):
        return flat | {f"cosines/kl/t{i}": 1 - i / 10 for i in range(20)}

    page = report_page([recorded(tmp_path, 3, change)])
    shown = numbers_of(page)["r0-conflicts"]["series"]
    assert list(shown) == [f"kl · t{i}" for i in range(19, 7, -1)]
    assert "the 12 of 20 pairs that differ most" in page


def test_the_composition_is_a_table_and_anothers_config_is_none(tmp_path):
    described = {
        "base_loss": {"fn": "nll", "scope": "token", "params": {}},
        "regularizers": [
            {
                "name": "<kl>",
                "fn": "kl",
                "scope": "token",
                "params": {"estimator": "k3"},
                "weight": {"schedule": "ramp", "at": {"0": 0.0, "10": 0.5}},
                "enabled": False,
            }
        ],
        "versions": {"torch": "2.13.0", "tinker": None},
    }
    page = report_page([recorded(tmp_path / "a", 3, config={"composition": described})])
    table = page[page.index('class="words"') :]
    assert "&lt;kl&gt; (not enabled)" in table
    assert "ramp: 0 at 0, 0.5 at 10" in table
    assert "estimator=&quot;k3&quot;" in table
    assert "torch 2.13.0</p>" in table
    for other in ("text", {"regularizers": 3}, {"regularizers": ["kl"]}):
        page = report_page([recorded(tmp_path / "b", 3, config={"composition": other})])
        assert 'class="words"' not in page


def test_ten_thousand_steps_are_drawn_at_once(tmp_path):
    run = recorded(tmp_path, 10_000, with_pairs)
    started = time.perf_counter()
    report_page([run])
    assert time.perf_counter() - started < 10  # one second, on a machine that does nothing else


def test_a_report_imports_neither_torch_nor_the_sdk(tmp_path):
    """Which would take longer than the report itself."""
    recorded(tmp_path / "run", 3)
    program = (
        "import sys; from tinker_custom_loss.__main__ import main\n"
        f"assert main(['report', {str(tmp_path / 'run')!r}, '-o', {str(tmp_path / 'r')!r}]) == 0\n"
        "print([name for name in ('torch', 'tinker', 'rich') if name in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout.splitlines()[-1] == "[]"


def test_pictures_are_png_with_letters_in_them(tmp_path, capsys):
    resvg_py = pytest.importorskip("resvg_py", reason="needs the extra png")
    recorded(tmp_path / "run", 12, with_pairs)
    command = ["report", str(tmp_path / "run"), "-o", str(tmp_path / "r.html")]
    status = main([*command, "--png", str(tmp_path / "png"), "--svg", str(tmp_path / "svg")])
    if "no font" in capsys.readouterr().err:
        assert status == 2
        pytest.skip("no font is installed")
    picture = (tmp_path / "png" / "run-conflicts.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert int.from_bytes(picture[16:20]) == 1920
    svg = (tmp_path / "svg" / "run-conflicts.svg").read_text()
    assert "var(" not in svg  # which resvg, Inkscape and LaTeX do not know
    silent = re.sub("<text.*?</text>", "", svg)
    assert picture != resvg_py.svg_to_bytes(silent, zoom=4)


def test_without_resvg_the_command_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    recorded(tmp_path / "run", 3)
    command = ["report", str(tmp_path / "run"), "-o", str(tmp_path / "r.html")]
    assert main([*command, "--png", str(tmp_path)]) == 2
    assert "pip install 'tinker-custom-loss[png]'" in capsys.readouterr().err


def test_the_command_writes_the_page_and_figures_that_stand_alone(tmp_path, capsys):
    recorded(tmp_path / "run", 12)
    page, figures = tmp_path / "r.html", tmp_path / "figures"
    status = main(["report", str(tmp_path / "run"), "-o", str(page), "--svg", str(figures)])
    assert status == 0
    assert "1 run, 12 steps" in capsys.readouterr().out
    assert page.read_text().startswith("<!doctype html>")
    for file in figures.iterdir():
        ElementTree.parse(file)
    assert {file.name for file in figures.iterdir()} == {
        f"run-{key}.svg"
        for key in ("contributions", "norms", "cosines", "values", "weights", "seconds")
    }


def test_what_cannot_be_written_is_named_in_a_sentence(tmp_path, capsys):
    recorded(tmp_path / "run", 3)
    page = tmp_path / "no" / "such" / "r.html"
    assert main(["report", str(tmp_path / "run"), "-o", str(page)]) == 2
    assert capsys.readouterr().err == f"cannot open {page}: No such file or directory\n"


def test_the_page_says_of_how_many_steps_it_judged(tmp_path):
    assert "Nothing odd in the last 12 steps." in report_page([recorded(tmp_path, 12)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "holds no run"),
        (lambda path: recorded(path, 3, lambda step, flat: {"a": 1.0}), "holds no step with"),
    ],
)
def test_what_is_no_run_of_ours_is_said_in_a_sentence(tmp_path, capsys, make, message):
    make(tmp_path)
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "r.html")]) == 2
    assert message in capsys.readouterr().err


def test_keys_may_have_a_prefix(tmp_path):
    with Recorder(tmp_path / "run") as recorder:
        for step in range(3):
            recorder.log({f"loss/{key}": value for key, value in metrics(step).items()}, step)
    out = tmp_path / "r.html"
    assert main(["report", str(tmp_path / "run"), "-o", str(out), "--prefix", "loss"]) == 0
    assert "kl" in numbers_of(out.read_text())["r0-norms"]["series"]
