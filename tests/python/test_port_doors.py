"""docs/security.md: the port has no way to run what it is sent."""

from __future__ import annotations

import ast
from pathlib import Path

import tinker_custom_loss
from tinker_custom_loss.terms import registry

PORT = Path(tinker_custom_loss.__file__).parent / "port"
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "yaml", "tempfile", "multiprocessing", "socket"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "import_module", "getattr_static"}


def names_in(tree: ast.AST) -> tuple[set[str], set[str]]:
    """The top-level modules that are imported, and the functions called by name."""
    modules, calls = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Call):
            function = node.func
            # An attribute, such as service.compute() or re.compile(), is another function.
            if isinstance(function, ast.Name):
                calls.add(function.id)
            elif isinstance(function, ast.Attribute) and function.attr == "import_module":
                calls.add(function.attr)
    return modules, calls


def test_the_port_neither_unpickles_nor_evaluates_nor_imports_what_it_is_sent():
    files = sorted(PORT.glob("*.py"))
    assert files
    for file in files:
        modules, calls = names_in(ast.parse(file.read_text()))
        assert not modules & FORBIDDEN_MODULES, file.name
        assert not calls & FORBIDDEN_CALLS, file.name


def test_modules_are_imported_while_the_registry_is_made_and_never_after():
    tree = ast.parse(Path(registry.__file__).read_text())
    importing = [
        function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and "import_module" in names_in(function)[1]
    ]
    assert importing == ["load_module"]
    calling = [
        function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and "load_module" in names_in(function)[1]
    ]
    assert calling == ["__init__"]
