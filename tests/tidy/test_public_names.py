"""Every module and every public name says in a docstring what it is for."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FACADES = ("clusterpool", "clusterpool.multiprocessing", "clusterpool.futures", "clusterpool.joblib")


def undocumented(source: str) -> list[str]:
    """Public classes and functions at the top of a module, and the module itself, that lack a docstring."""
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) or not tree.body else ["the module"]
    for node in tree.body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if not node.name.startswith("_") and not ast.get_docstring(node) and not is_overload(node):
            found.append(node.name)
    return found


def is_overload(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(decorator).endswith("overload") for decorator in node.decorator_list)


def test_every_public_name_of_the_package_has_a_docstring() -> None:
    complaints = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted((ROOT / "clusterpool").rglob("*.py"))
        for name in undocumented(path.read_text())
    ]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("module_name", FACADES)
def test_every_name_a_user_imports_has_a_docstring_and_so_have_its_methods(module_name: str) -> None:
    module = importlib.import_module(module_name)
    complaints = []
    for name in getattr(module, "__all__", ()):
        value = getattr(module, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        # Names passed through from the standard library are documented, or not, over there.
        if not str(getattr(value, "__module__", "")).startswith("clusterpool"):
            continue
        if not inspect.getdoc(value):
            complaints.append(name)
        complaints += undocumented_methods(name, value)
    assert not complaints, "\n".join(complaints)


def undocumented_methods(name: str, value: object) -> list[str]:
    if not inspect.isclass(value):
        return []
    return [
        f"{name}.{method}"
        for method, function in vars(value).items()
        # getdoc follows inheritance: a method of the standard library's contract need not repeat its own.
        if not method.startswith("_") and inspect.isfunction(function) and not inspect.getdoc(getattr(value, method))
    ]


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ('"""A module."""\n', []),
        ("", []),
        ("import os\n", ["the module"]),
        ('"""A module."""\ndef shown(): ...\ndef _hidden(): ...\n', ["shown"]),
        ('"""A module."""\nclass Shown:\n    """Has one."""\n', []),
    ],
)
def test_what_lacks_a_docstring_is_named(source: str, names: list[str]) -> None:
    assert undocumented(source) == names
