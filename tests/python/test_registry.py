"""What may be named from outside, and what a wrong name is told."""

from __future__ import annotations

import importlib
import sys
import textwrap

import pytest

from tinker_custom_loss import RequestError
from tinker_custom_loss.terms import CATALOGUE
from tinker_custom_loss.terms.registry import LoadError, Registry

LOSSES = """
    import functools
    from math import hypot
    from tinker_custom_loss.terms import l2

    def topology(data, logprobs, scale, *, order: int = 2, keys: "list[str]" = ("a",), mode=len):
        '''How the logprobs hang together.

        More about it.
        '''

    async def remote(data, logprobs, **options): ...

    class Scaled:
        '''A callable object.'''
        def __call__(self, data, logprobs): ...

    scaled = Scaled()
    _hidden = Scaled()
    halved = functools.partial(topology, scale=0.5)
    constant = 3

    def _private(data, logprobs): ...
    def one_argument(data): ...
    def any_arguments(*args): ...
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a module; what it adds to the interpreter is undone."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)

    def write(name: str, source: str = LOSSES) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(textwrap.dedent(source))
        return str(path)

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def names(registry: Registry) -> list[str]:
    return [term["name"] for term in registry.describe()]


class TestLoading:
    def test_built_in_terms_are_always_there(self):
        registry = Registry()
        assert names(registry) == list(CATALOGUE)
        assert registry.resolve("l2") is CATALOGUE["l2"]

    def test_a_file_offers_the_public_functions_and_objects_that_it_defines(self, write):
        registry = Registry([write("my_losses.py")])
        assert names(registry)[len(CATALOGUE) :] == [
            "my_losses:topology",
            "my_losses:remote",
            "my_losses:scaled",
            "my_losses:any_arguments",
        ]
        assert registry.resolve("my_losses:topology").__name__ == "topology"

    def test_dunder_all_says_otherwise(self, write):
        source = textwrap.dedent(LOSSES) + '\n__all__ = ["halved", "l2", "constant", "Scaled"]\n'
        registry = Registry([write("chosen_losses.py", source)])
        assert names(registry)[len(CATALOGUE) :] == ["chosen_losses:halved", "chosen_losses:l2"]

    def test_a_module_is_loaded_by_its_name(self, write, tmp_path, monkeypatch):
        write("a_package/__init__.py", "")
        write("a_package/losses.py")
        monkeypatch.syspath_prepend(str(tmp_path))
        assert "a_package.losses:topology" in names(Registry(["a_package.losses"]))

    def test_a_file_can_be_imported_by_its_name_as_a_child_process_must(self, write):
        Registry([write("importable_losses.py")])
        del sys.modules["importable_losses"]
        assert importlib.import_module("importable_losses").topology

    def test_a_file_given_twice_is_loaded_once(self, write):
        path = write("twice_losses.py")
        assert len(names(Registry([path, path]))) == len(CATALOGUE) + 4

    @pytest.mark.parametrize(
        ("source", "error_type", "message"),
        [
            ("import missing_module_x", "ModuleNotFoundError", "missing_module_x"),
            ("def f(:\n  pass", "SyntaxError", "invalid syntax"),
            ("import sys\nsys.exit(4)", "SystemExit", "4"),
            ("raise KeyError('x')", "KeyError", "'x'"),
        ],
    )
    def test_a_file_that_fails(self, write, source, error_type, message):
        path = write("broken_losses.py", source)
        before = [*sys.path]
        with pytest.raises(LoadError) as caught:
            Registry([path])
        error = caught.value
        assert path in str(error)
        assert message in str(error)
        assert error.error_type == error_type
        assert f'File "{path}", line' in error.traceback
        assert "importlib" not in error.traceback
        assert "registry.py" not in error.traceback
        assert "broken_losses" not in sys.modules
        assert sys.path == before

    def test_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(LoadError, match="there is no such file"):
            Registry([str(tmp_path / "no.py")])

    def test_a_module_that_is_not_there(self):
        with pytest.raises(LoadError, match='"no_such_module" cannot be loaded: ModuleNotFound'):
            Registry(["no_such_module"])

    @pytest.mark.parametrize("name", ["json.py", "torch.py", "tinker.py", "sys.py"])
    def test_a_file_whose_name_is_taken(self, write, name):
        with pytest.raises(LoadError, match=r"belongs to another module .*; rename the file"):
            Registry([write(name)])

    def test_two_files_of_one_name(self, write):
        first, second = write("one/same_losses.py"), write("two/same_losses.py")
        with pytest.raises(LoadError, match=f'"same_losses" belongs to another module .{first}'):
            Registry([first, second])

    def test_a_file_whose_name_is_no_module_name(self, write):
        with pytest.raises(LoadError, match='"my-losses" cannot be the name of a module'):
            Registry([write("my-losses.py")])

    def test_a_file_that_offers_nothing(self, write):
        with pytest.raises(LoadError, match="offers no term"):
            Registry([write("empty_losses.py", "x = 1")])

    def test_a_name_in_dunder_all_that_is_not_defined(self, write):
        with pytest.raises(LoadError, match='lists "nothing" in __all__'):
            Registry([write("listing_losses.py", '__all__ = ["nothing"]')])


class TestResolving:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("L3", 'there is no term "L3"; of 32, the nearest are: kl, l1, l2'),
            (
                "wrong_losses:topolgy",
                '"wrong_losses" has no "topolgy"; of 32, the nearest are: wrong_losses:top',
            ),
            ("wrong_losses:_private", "private, imported or not in __all__"),
            ("wrong_losses:hypot", "private, imported or not in __all__"),
            ("wrong_losses:constant", "private, imported or not in __all__"),
            ("wrong_losses:Scaled", "it is a class"),
            ("wrong_losses:one_argument", r"cannot be called as fn\(data, logprobs\).*\(data\)"),
            ("os:system", '"os" was not loaded at start-up'),
            ("", "the nearest are: "),
            (":", "was not loaded"),
        ],
    )
    def test_a_wrong_name_is_told_why_and_what_there_is(self, write, name, message):
        registry = Registry([write("wrong_losses.py")])
        with pytest.raises(RequestError, match=message):
            registry.resolve(name)

    def test_a_name_imports_nothing(self):
        sys.modules.pop("this", None)
        with pytest.raises(RequestError):
            Registry().resolve("this:d")
        assert "this" not in sys.modules


class TestDescribing:
    def test_a_loaded_term(self, write):
        registry = Registry([write("described_losses.py")])
        terms = {term["name"]: term for term in registry.describe()}
        assert terms["described_losses:topology"] == {
            "name": "described_losses:topology",
            "kind": "loaded",
            "async": False,
            "doc": "How the logprobs hang together.\n\nMore about it.",
            "scope": "batch",
            "inputs": [],
            "params": [
                {"name": "scale", "required": True, "default": None, "type": "", "choices": []},
                {"name": "order", "required": False, "default": 2, "type": "int", "choices": []},
                {
                    "name": "keys",
                    "required": False,
                    "default": ["a"],
                    "type": "list[str]",
                    "choices": [],
                },
                {
                    "name": "mode",
                    "required": False,
                    "default": repr(len),
                    "type": "",
                    "choices": [],
                },
            ],
        }
        assert terms["described_losses:remote"]["async"] is True
        assert terms["described_losses:remote"]["params"] == []
        assert terms["described_losses:scaled"]["doc"] == "A callable object."

    def test_a_built_in_term(self):
        (kl,) = (term for term in Registry().describe() if term["name"] == "kl")
        assert kl["kind"] == "builtin"
        assert kl["doc"].startswith("``KL(model ‖ reference)``")
        assert kl["scope"] == "token"
        assert kl["inputs"] == ["reference_logprobs"]
        params = {param["name"]: param for param in kl["params"]}
        assert params["weights"] == {
            "name": "weights",
            "required": False,
            "default": "auto",
            "type": "str | None",
            "choices": [],
        }
        assert params["estimator"]["choices"] == ["k1", "k2", "k3", "k3_weighted", "exact"]
        assert params["estimator"]["type"].startswith('Literal["k1", "k2"')
