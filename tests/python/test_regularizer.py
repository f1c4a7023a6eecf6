"""Every option is refused when it is given, with where, what was expected, and what came."""

from __future__ import annotations

import functools
import math
import threading

import pytest

from term_library import square, square_async, total
from tinker_custom_loss import Composer, Regularizer, RequestError

GOOD = {"fn": square, "weight": 0.1, "name": "square"}


def refuse(**changes):
    spec = {**GOOD, **changes}
    spec = {key: value for key, value in spec.items() if value is not ...}
    with pytest.raises(RequestError) as caught:
        Composer(total, [{"fn": total, "weight": 1, "name": "other"}, spec])
    return caught.value


@pytest.mark.parametrize("name", ["", 3, b"square"])
def test_a_name_is_a_non_empty_string(name):
    error = refuse(name=name)
    assert error.path == "regularizers[1].name"
    assert "expected a non-empty string" in str(error)


@pytest.mark.parametrize("fn", [square, functools.partial(functools.partial(square), scale=2.0)])
def test_a_name_is_by_default_that_of_the_function(fn):
    assert Regularizer(fn, 0.1).name == "square"
    assert Composer(None, [{"fn": fn, "weight": 0.1}]).regularizers[0].name == "square"
    assert Regularizer(fn, 0.1, "mine").name == "mine"


def test_what_has_no_name_must_be_given_one():
    class Judge:
        def __call__(self, data, logprobs):
            return square(data, logprobs)

    for nameless in (Judge(), lambda data, logprobs: square(data, logprobs)):
        error = refuse(fn=nameless, name=...)
        assert error.path == "regularizers[1].name"
        assert "has no name of its own; give the regularizer one with name=" in str(error)


def test_two_of_the_same_function_need_names():
    with pytest.raises(RequestError, match='the name "square" is already taken by'):
        Composer(None, [Regularizer(square, 0.1), Regularizer(square, 0.2)])


@pytest.mark.parametrize("name", ["reward:mean", "kl/ref"])
def test_a_name_has_none_of_the_separators_of_a_record(name):
    assert "separate the keys of a record" in str(refuse(name=name))


def test_names_must_differ():
    error = refuse(name="other")
    assert error.path == "regularizers[1].name"
    assert 'the name "other" is already taken by regularizers[0]' in str(error)


def test_the_name_of_the_base_loss_is_taken():
    assert "reserved for the base loss" in str(refuse(name="base_loss"))


@pytest.mark.parametrize("weight", ["heavy", None, math.nan, math.inf, True, [1.0]])
def test_a_weight_is_a_finite_number_or_a_schedule(weight):
    error = refuse(weight=weight)
    assert error.path == "regularizers[1].weight"
    assert (
        'invalid value for "weight" of regularizer "square": expected a finite number, or a '
        f"function of the step, got {weight!r}" in str(error)
    )


@pytest.mark.parametrize("missing", ["fn", "weight"])
def test_what_is_required_is_named(missing):
    error = refuse(**{missing: ...})
    assert error.path == f"regularizers[1].{missing}"
    assert f'the required option "{missing}" is missing' in str(error)


def test_an_unknown_option_comes_with_the_nearest_known_one():
    error = refuse(wieght=3)
    assert str(error).startswith("regularizers[1]: unknown option 'wieght'; known are: weight, ")


@pytest.mark.parametrize("fn", ["square", 3, None])
def test_fn_is_callable(fn):
    assert "expected a function of (data, logprobs)" in str(refuse(fn=fn))


def test_params_must_fit_the_signature():
    error = refuse(params={"sclae": 2.0})
    assert error.path == "regularizers[1].params"
    assert "unexpected keyword argument 'sclae'; its signature is (data, logprobs, *, sc" in str(
        error
    )


def test_a_function_of_one_argument_is_refused():
    assert "cannot be called as fn(data, logprobs)" in str(refuse(fn=lambda logprobs: None))


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("on_error", "ignore", '"raise" or "skip"'),
        ("on_non_finite", "clip", '"raise" or "skip" or "zero"'),
        ("run_in_executor", "gpu", 'False, True, "process" or a concurrent.futures.Executor'),
        ("enabled", "no", "True or False"),
        ("params", [1], "a dict of keyword arguments"),
    ],
)
def test_a_choice_lists_what_is_allowed(option, value, allowed):
    error = refuse(**{option: value})
    assert error.path == f"regularizers[1].{option}"
    assert f"expected {allowed}, got {value!r}" in str(error)


@pytest.mark.parametrize("timeout", [0, -1, "soon", math.inf])
def test_a_timeout_is_positive(timeout):
    assert "a positive number of seconds" in str(refuse(timeout=timeout, run_in_executor=True))


def test_an_inline_function_cannot_have_a_timeout():
    error = refuse(timeout=1.0)
    assert error.path == "regularizers[1].timeout"
    assert "nothing can interrupt it" in str(error)
    Regularizer(square_async, 1.0, "awaits", timeout=1.0)


def test_what_cannot_be_pickled_cannot_run_in_a_process():
    lock = threading.Lock()
    error = refuse(fn=lambda data, logprobs: lock, run_in_executor="process")
    assert error.path == "regularizers[1].run_in_executor"
    assert "cannot be pickled" in str(error)
    assert "create there what cannot travel, in the function itself" in str(error)


@pytest.mark.parametrize("regularizers", [GOOD, "square", 3, {"square": square}])
def test_regularizers_are_a_list(regularizers):
    with pytest.raises(RequestError, match="regularizers must be a list"):
        Composer(total, regularizers)


@pytest.mark.parametrize(
    ("base", "said"),
    [([GOOD], "base_loss_fn must be a function"), (GOOD, "unknown option 'weight'")],
)
def test_a_base_loss_is_no_regularizer(base, said):
    with pytest.raises(RequestError, match=said):
        Composer(base)


@pytest.mark.parametrize(
    "fn",
    [
        square_async,
        functools.partial(square_async),
        functools.partial(functools.partial(square_async)),
    ],
)
def test_coroutine_functions_are_told_apart(fn):
    assert Regularizer(fn, 1.0, "awaits").is_async
    assert not Regularizer(square, 1.0, "square").is_async


@pytest.mark.parametrize("weight", [10**400, -(10**400)], ids=["huge", "minus huge"])
def test_a_weight_beyond_all_floats_is_refused(weight):
    assert "expected a finite number" in str(refuse(weight=weight))


def test_an_attribute_called_func_makes_no_partial():
    class CallsIt:
        func = staticmethod(square_async)

        def __call__(self, data, logprobs):
            return square(data, logprobs)

    assert not Regularizer(CallsIt(), 1.0, "sync").is_async


def test_a_composer_is_no_term():
    inner = Composer(total, [GOOD])
    assert "a Composer cannot be a term of another" in str(refuse(fn=inner))
    with pytest.raises(RequestError, match="a Composer cannot be a term of another"):
        Composer(inner, [GOOD])
