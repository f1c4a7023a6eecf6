"""Whatever the composition: the fast paths give what the general one gives.

The same examples in every run of the tests; `make properties` draws thousands of new ones.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from naive_terms import ALTERNATIVES, CASES, CHOSEN, GROUPS, MIXED, PAIRED, TOKENS
from tinker_custom_loss import Composer, Composition, CustomLossError, TensorBatch, term
from tinker_custom_loss.errors import CancelledError
from tinker_custom_loss.fast_paths import fast
from tinker_custom_loss.port.data import Column, WireData
from tinker_custom_loss.terms import CATALOGUE
from tinker_custom_loss.terms.reduction import REDUCTIONS
from tinker_custom_loss.testing import without_fast_paths

KINDS = ("ones", "mask", "any", "negative")
KEYS = ("reference_logprobs", "teacher_logprobs", "logprobs", "old_logprobs", "advantages")


@term(scope="token", inputs=("reference_logprobs",))
def drift(logprob, reference, *, power: float = 2.0):
    return (logprob - reference).abs() ** power, {"far": (logprob - reference).abs()}


@drift.derivative
def _(logprob, reference, *, power: float = 2.0):
    d = logprob - reference
    return power * d.abs() ** (power - 1) * d.sign()


@term(scope="sequence")
def peak(logprob, *, sequences):
    return sequences.mean(logprob).square()


@peak.derivative
def _(logprob, *, sequences):
    return 2 * sequences.shares * sequences.spread(sequences.mean(logprob))


def plain(data, logprobs):
    return sum(x.square().sum() for x in logprobs), {"n": len(logprobs)}


def weights(kind, shape, generator):
    picked = torch.randint(0, 3, shape[:1], generator=generator)
    return torch.tensor(
        {"ones": [1, 1, 1], "mask": [0, 1, 1], "any": [0, 1, 0.5], "negative": [-1, 1, 0]}[kind]
    )[picked].float()


def batch(shapes, kind, poison, dtype, seed):
    """Logprobs, and the columns of the data; where a token has weight 0 they hold ``poison``."""
    generator = torch.Generator().manual_seed(seed)

    def logprobs(shape):
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            return -values.abs() - 0.1
        return torch.log_softmax(2 * values, -1) - 0.1

    rows = []
    for index, shape in enumerate(shapes):
        row = {key: logprobs(shape) for key in (*KEYS[:-1], "now")}
        row["advantages"] = torch.randn(shape, generator=generator).round(decimals=1)
        row["weights"] = weights(kind, shape, generator)
        for key in (*KEYS, "now"):
            row[key][row["weights"] == 0] = poison
        row["group"], row["chosen"] = torch.tensor(GROUPS[index]), torch.tensor(CHOSEN[index])
        rows.append(row)
    return [row.pop("now").to(dtype) for row in rows], rows


def datums(rows):
    return [SimpleNamespace(loss_fn_inputs=row) for row in rows]


def on_the_wire(rows):
    def column(key):
        tensors = [row[key] for row in rows]
        return Column(torch.cat([x.reshape(-1) for x in tensors]), tuple(x.shape for x in tensors))

    return WireData(len(rows), {key: column(key) for key in rows[0]})


def composer(cases, weighting, options, base):
    terms = [
        {
            "fn": CATALOGUE.get(case.name) if hasattr(case, "name") else case,
            "name": f"term {index}",
            "weight": weight,
            "params": {**getattr(case, "params", {}), **({} if case is plain else params)},
            **also,
        }
        for index, (case, weight, (params, also)) in enumerate(
            zip(cases, weighting, options, strict=True)
        )
    ]
    return Composer("nll" if base else None, terms)


def outcomes(composer, data, logprobs):
    """With each term's gradient, with their sum alone, and with none; or the error."""
    return [
        outcome(composer.compute, data, logprobs, term_gradients=True),
        outcome(composer.compute, data, logprobs),
        outcome(composer.compute_loss, data, logprobs),
    ]


def outcome(compute, *arguments, **options):
    try:
        return compute(*arguments, **options)
    except CustomLossError as error:
        return type(error), str(error)


def assert_same(fast, general, digits, path=""):
    """Of records: the keys in the same order, text and truth the same, numbers close."""
    if isinstance(general, dict):
        assert [*fast] == [*general], path
        for key in general:
            if "seconds" not in key:
                assert_same(fast[key], general[key], digits, f"{path}/{key}")
    elif isinstance(general, float):
        assert isinstance(fast, float), path
        close = 10.0**-digits
        assert fast == pytest.approx(general, rel=close, abs=close, nan_ok=True), path
    else:
        assert fast == general, path


def assert_close(fast, general):
    assert (fast.shapes, fast.flat.dtype) == (general.shapes, general.flat.dtype)
    ours, theirs = fast.flat.double(), general.flat.double()
    assert float((ours - theirs).norm()) <= 1e-6 * (1 + float(theirs.norm()))


layouts = st.sampled_from([TOKENS, ALTERNATIVES, PAIRED, MIXED])
options = st.tuples(
    st.fixed_dictionaries({}, optional={"reduction": st.sampled_from(REDUCTIONS)}),
    st.fixed_dictionaries(
        {},
        optional={
            "on_non_finite": st.sampled_from(["raise", "skip", "zero"]),
            "run_in_executor": st.booleans(),
        },
    ),
)


@st.composite
def compositions(draw):
    shapes = draw(layouts)
    fitting = [case for case in CASES if case.shapes in (shapes, MIXED)]
    cases = draw(st.lists(st.sampled_from([*fitting, drift, peak, plain]), min_size=1, max_size=4))
    n = len(cases)
    return composer(
        cases,
        draw(st.lists(st.floats(-2, 2, width=16), min_size=n, max_size=n)),
        draw(st.lists(options, min_size=n, max_size=n)),
        draw(st.booleans()),
    ), shapes


def check(composer, data, logprobs, digits=5):
    """Fast and general give the same, and leave what they are given as it is."""
    flat = (
        logprobs.flat
        if isinstance(logprobs, TensorBatch)
        else torch.cat([x.reshape(-1) for x in logprobs])
    )
    before = flat.clone()
    found = outcomes(composer, data, logprobs)
    with without_fast_paths():
        wanted = outcomes(composer, data, logprobs)
    # Of several terms in threads any may be the first to fail.
    threads = any(term.run_in_executor for term in composer.regularizers)
    for ours, theirs in zip(found, wanted, strict=True):
        if isinstance(theirs, tuple):
            assert isinstance(ours, tuple) if threads else ours == theirs
            continue
        assert not isinstance(ours, tuple), ours
        assert_same(ours.record, theirs.record, digits)
        if isinstance(theirs, Composition):
            assert_close(ours.gradient, theirs.gradient)
            assert [*ours.term_gradients] == [*theirs.term_gradients]
            for name, gradient in theirs.term_gradients.items():
                assert_close(ours.term_gradients[name], gradient)
    torch.testing.assert_close(flat, before, rtol=0, atol=0, equal_nan=True)
    with_each, with_none, _ = found
    if isinstance(with_each, Composition):  # to look at a term changes nothing
        assert torch.equal(with_each.gradient.flat, with_none.gradient.flat)
        assert figures(with_each) == figures(with_none)


def figures(composition):
    return {k: v for k, v in composition.flat_record.items() if "seconds" not in k}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_of_every_term_they_agree(case, kind):
    logprobs, rows = batch(case.shapes, kind, math.nan, torch.float32, seed=1)
    check(composer([case], [1.0], [({}, {})], False), datums(rows), logprobs)


MANY = [
    (case, k)
    for case in CASES
    for k in ((), (1,), (3,))
    if CATALOGUE[case.name].scope == "token" and case.shapes != (TOKENS if k else ALTERNATIVES)
    if (case.name, k) != ("distill", (1,))  # of which the gradient is 0, and what rounding leaves
]


@pytest.fixture
def small_blocks(monkeypatch):
    """Of a thousand positions, of which many fit into a batch that costs little."""
    monkeypatch.setattr("tinker_custom_loss.tensors.blocks._POSITIONS", 1 << 10)
    monkeypatch.setattr("tinker_custom_loss.tensors.blocks._LONG_RUN", 1 << 6)


def many(k, prompts):
    """A batch of several small blocks. A nan, which must count for nothing, is in the last datum's.

    ``prompts``: what is masked is in one piece, not here and there."""
    sizes = [-(-n // math.prod(k)) for n in (6_001, 5, 4_500)]
    logprobs, rows = batch([(n, *k) for n in sizes], "any", -2.0, torch.float32, 2)
    if prompts:
        for row in rows:
            row["weights"] = torch.ones(row["weights"].shape)
            row["weights"][: len(row["weights"]) // 3] = 0
    masked = rows[2]["weights"] == 0
    for tensor in (logprobs[2], *(rows[2][key] for key in KEYS)):
        tensor[masked] = math.nan
    return datums(rows), logprobs


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("prompts", [True, False])
@pytest.mark.parametrize(("case", "k"), MANY, ids=str)
def test_of_every_term_they_agree_over_a_batch_of_many_blocks(case, k, prompts):
    terms = [case, case] if prompts else [case, plain, case]
    composed = composer(terms, [1.0, -0.5, 0.7][: len(terms)], [({}, {})] * len(terms), True)
    check(composed, *many(k, prompts), digits=4)  # of norms and cosines, where products are alike


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("prompts", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"weights": None}, {"weights": "others"}, {"reduction": "sequence_mean_token_mean"}],
)
def test_they_agree_whatever_each_term_looks_at(prompts, options):
    def pull(data, logprobs):  # at what is masked, too
        return sum(torch.nan_to_num(x).sum() for x in logprobs), {}

    data, logprobs = many((3,), prompts)
    for row in data:
        for key in KEYS:
            row.loss_fn_inputs[key].nan_to_num_(-1.0)
        row.loss_fn_inputs["others"] = row.loss_fn_inputs["weights"].flip(0)
    logprobs = [x.nan_to_num(-1.0) for x in logprobs]
    terms = [{"fn": "kl", "weight": 0.1}, {"fn": "l2", "weight": 0.1, "params": options}]
    for more in ([], [{"fn": pull, "weight": -0.3}]):
        check(Composer("nll", [*terms, *more]), data, logprobs, digits=4)


@pytest.mark.usefixtures("small_blocks")
def test_the_terms_own_gradients_are_kept_beside_the_same_numbers():
    """As a report has them, of a step that was computed without."""
    data, logprobs = many((), prompts=False)
    logprobs = [x.nan_to_num(-1.0) for x in logprobs]  # which plain looks at
    terms = [{"fn": "kl", "weight": 0.1}, {"fn": plain, "weight": 0.2}]
    composer = Composer("nll", terms)
    for each in (composer, Composer("nll", [{**terms[0], "params": {"normalizer": 3.0}}])):
        kept, alone = (each.compute(data, logprobs, term_gradients=x) for x in (True, False))
        assert torch.equal(kept.gradient.flat, alone.gradient.flat)
        assert kept.loss_total == alone.loss_total
        assert_same(kept.record, alone.record, digits=300)
        assert [*kept.term_gradients] == ["base_loss", *alone.record["regularizers"]]


def test_a_step_in_which_nothing_points_has_a_gradient_of_zeros():
    composed = Composer(None, [{"fn": fn, "weight": 0.0} for fn in ("l1", "l2")])
    check(composed, [None], [-torch.ones(3)])
    assert not composed.compute([None], [-torch.ones(3)]).gradient.flat.any()


def test_what_a_step_of_many_terms_takes_is_little_more_than_its_gradient():
    code = """
import resource
import torch
from tinker_custom_loss import Composer, TensorBatch
from tinker_custom_loss.port.data import Column, WireData

names = ("weights", "reference_logprobs")
terms = [{"fn": fn, "weight": 0.1} for fn in ("l2", "l1", "entropy", "kl")]

def batch(size):
    data = WireData(1, {name: Column(torch.rand(size), ((size,),)) for name in names})
    return data, TensorBatch(torch.full((size,), -0.5), ((size,),))

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

size = 8_000_000
small, large = batch(1_000), batch(size)
composer = Composer("nll", terms)
composer.compute(*small)
before = peak()
composer.compute(*large)
print((peak() - before) / (4 * size))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout) < (3 if fast() else 100)


@given(
    compositions(),
    st.sampled_from([*KINDS, *KINDS[:3]]),  # what is refused with negative weights is much
    st.sampled_from([math.nan, -math.inf, math.inf, -1.0]),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([False, False, False, True]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_of_whatever_composition_they_agree(
    composed, kind, poison, dtype, impossible, wire, flat, seed
):
    composer, shapes = composed
    logprobs, rows = batch(shapes, kind, poison, dtype, seed)
    if impossible:
        logprobs[0].view(-1)[0] = -math.inf
    data = on_the_wire(rows) if wire else datums(rows)
    check(composer, data, TensorBatch.from_tensors(logprobs) if flat else logprobs)


def test_the_switch_holds_for_the_threads_that_terms_run_on():
    seen = []

    def looks(data, logprobs):
        seen.append(fast())
        return logprobs[0].sum(), {}

    composer = Composer(looks, [{"fn": looks, "weight": 1.0, "name": "b", "run_in_executor": True}])
    with without_fast_paths():
        composer.compute([None], [torch.zeros(2)])
    composer.compute([None], [torch.zeros(2)])
    assert seen == [False, False, fast(), fast()]


def test_the_environment_turns_it_off():
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TINKER_CUSTOM_LOSS_FAST": "0",
    }
    code = "from tinker_custom_loss.fast_paths import fast; print(fast())"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert run.stdout.strip() == "False"


def test_what_is_in_the_gradient_is_nobody_elses_memory():
    """The entropy's derivative is the logprob itself, and that of a term of one's own may be its
    input."""

    @term(scope="token", inputs=("advantages",))
    def pull(logprob, advantage):
        return logprob * advantage

    pull.derivative(lambda logprob, advantage: advantage)
    logprobs = TensorBatch.from_tensors([torch.tensor([-1.0, -2.0])])
    advantages = np.array([3.0, 4.0], np.float32)
    column = Column(torch.from_numpy(advantages), ((2,),))
    data = WireData(1, {"advantages": column})
    for fn in ("entropy", pull):
        composition = Composer(fn).compute(data, logprobs, term_gradients=True)
        composition.gradient.flat.zero_()
        composition.term_gradients["base_loss"].flat.zero_()
    assert logprobs.flat.tolist() == [-1.0, -2.0]
    assert advantages.tolist() == [3.0, 4.0]


def test_the_record_is_the_same_wherever_in_memory_the_logprobs_begin():
    """A dot product's last bits are not, and the entropy's gradient is the logprobs themselves."""
    values = -torch.rand(1000, generator=torch.Generator().manual_seed(0))
    norms = set()
    for start in range(16):
        memory = torch.zeros(1016)
        memory[start : start + 1000] = values
        batch = TensorBatch(memory[start : start + 1000], ((1000,),))
        norms.add(Composer("entropy").compute([None], batch).record["total_grad_norm"])
    assert len(norms) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_record_is_the_same_wherever_in_memory_the_gradient_is_to_be(dtype):
    logprobs = [-torch.rand(1003, generator=torch.Generator().manual_seed(0)).to(dtype)]
    composer = Composer("entropy", [{"fn": "l1", "weight": 0.1}])
    expected = composer.compute([None], logprobs)
    for start in range(16):
        out = torch.zeros(1019, dtype=dtype)[start : start + 1003]
        composition = composer.compute([None], logprobs, out=out)
        assert torch.equal(out, expected.gradient.flat)
        assert_same(composition.record, expected.record, digits=300)


@pytest.mark.parametrize("option", ["skip", "zero", "raise"])
@pytest.mark.parametrize("fns", [["l2"], ["l2", "l1"]])
def test_a_gradient_that_only_its_normalizer_makes_too_large_is_that_terms(fns, option):
    terms = [{"fn": fn, "weight": 0.5} for fn in fns]
    terms[0] |= {"params": {"normalizer": 1e-25}, "on_non_finite": option}
    check(Composer(None, terms), [None], [torch.tensor([-1e15, -1.0])])


def test_no_datum_is_built_to_find_that_none_has_an_optional_array():
    """The kl looks for the sampler's logprobs. Eight datums take longer than the composition."""
    flat = torch.full((4,), -1.0)
    column = Column(flat, ((2,), (2,)))
    data = WireData(2, {"weights": column, "reference_logprobs": column})
    Composer("kl").compute(data, TensorBatch(flat, ((2,), (2,))))
    assert data._built is None


@pytest.mark.parametrize("gap", [1.0, 0.1, 1e-3, 1e-5, 0.0])
def test_cosines_to_a_total_that_all_but_cancels_are_not_taken_from_those_of_pairs(gap):
    """The gradient of l2 is twice that of the entropy."""
    generator = torch.Generator().manual_seed(3)
    logprobs = [-torch.rand(300, generator=generator) - 0.1]
    data = datums([{"advantages": torch.randn(300, generator=generator)}])

    def push(data, logprobs):
        return (logprobs[0] * data[0].loss_fn_inputs["advantages"]).sum(), {}

    terms = [
        {"fn": "l2", "weight": 1.0},
        {"fn": "entropy", "weight": -2.0 + gap},
        {"fn": push, "weight": 1e-3 * gap},
    ]
    composer = Composer(None, terms)
    composition = composer.compute(data, logprobs, term_gradients=True)
    not_kept = composer.compute(data, logprobs)
    total = composition.gradient.flat.double()
    for name, gradient in composition.term_gradients.items():
        record = composition.record["regularizers"][name]
        weighted = record["weight"] * gradient.flat.double()
        expected = float(torch.cosine_similarity(weighted, total, 0)) if total.any() else 0.0
        for each in (composition, not_kept):
            cosine = each.record["regularizers"][name]["cosine_to_total"]
            assert cosine == pytest.approx(expected, abs=2e-6)


@pytest.mark.usefixtures("small_blocks")
def test_nor_where_only_a_later_block_cancels():
    """The total of l2 and kl is twice the reference, which is small beside all but the first."""
    generator = torch.Generator().manual_seed(3)
    reference = -1e-5 * torch.rand(5000, generator=generator)
    logprobs = -torch.rand(5000, generator=generator)
    logprobs[:2000] = reference[:2000]
    terms = [{"fn": "l2", "weight": 1.0}, {"fn": "kl", "weight": -2.0}]
    data = datums([{"reference_logprobs": reference}])
    composition = Composer(None, terms).compute(data, [logprobs])
    total = composition.gradient.flat.double()
    for name, gradient in (("l2", 2 * logprobs), ("kl", -2 * (logprobs - reference))):
        expected = float(torch.cosine_similarity(gradient.double(), total, 0))
        cosine = composition.record["regularizers"][name]["cosine_to_total"]
        assert cosine == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("option", ["skip", "zero", "raise"])
def test_a_loss_that_alone_is_infinite_is_that_terms(option):
    def endless(data, logprobs):
        return logprobs[0].sum() + math.inf, {}

    terms = [{"fn": "l2", "weight": 1.0}, {"fn": endless, "weight": 0.5, "on_non_finite": option}]
    check(Composer(None, terms), [None], [-torch.ones(3)])


@pytest.mark.parametrize(("weight", "logprob"), [(1e39, -1e-12), (1.0, -1e-30)])
def test_what_single_products_do_not_tell_is_told(weight, logprob):
    logprobs = [torch.full((3,), logprob)]
    composer = Composer(None, [{"fn": "l2", "weight": weight}])
    check(composer, [None], logprobs)
    norm = 2 * -logprob * math.sqrt(3)
    assert composer.compute([None], logprobs).record["regularizers"]["l2"]["grad_norm"] == (
        pytest.approx(norm, rel=1e-5)
    )


@pytest.mark.skipif(not fast(), reason="there are none")
@pytest.mark.usefixtures("small_blocks")
def test_a_step_is_cancelled_between_blocks():
    class Cancelled:
        asked = 0

        def is_set(self):
            self.asked += 1
            return self.asked > 3

    composer = Composer("nll", [{"fn": "l2", "weight": 0.1}])
    with pytest.raises(CancelledError):
        composer.compute(*many((), prompts=False), cancelled=Cancelled())


def test_a_head_learns_beside_terms_in_blocks():
    head = torch.ones(3, requires_grad=True)

    def headed(data, logprobs):
        return (head * logprobs[0]).sum(), {}

    Composer("nll", [{"fn": headed, "weight": 0.5}]).compute([None], [-torch.ones(3)])
    assert head.grad.tolist() == [-0.5] * 3
