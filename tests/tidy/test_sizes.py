"""Files, functions and signatures stay small enough to be read in one go (docs/style.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("clusterpool", "tests", "benchmarks", "docs/examples", "compat_tests")
FUNCTION_LINES_MAX = 60
POSITIONAL_MAX = 6


def python_files() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def lines_max(path: Path) -> int:
    """The core is held to the least, since everything else hangs on it; tests are lists and may be longer."""
    relative = path.relative_to(ROOT).as_posix()
    if relative.startswith("clusterpool/core/"):
        return 500
    return 1000 if relative.startswith(("tests/", "compat_tests/")) else 600


Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(source: str) -> list[Function]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def long_functions(parsed: list[Function]) -> list[str]:
    return [
        f"line {node.lineno}: {node.name} has {length} lines, {FUNCTION_LINES_MAX} are allowed"
        for node in parsed
        if (length := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES_MAX
    ]


def wide_functions(parsed: list[Function]) -> list[str]:
    found = []
    for node in parsed:
        # pytest passes its parameters and fixtures by keyword.
        if node.name.startswith("test_"):
            continue
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
        if names[:1] in (["self"], ["cls"]):
            names = names[1:]
        if len(names) > POSITIONAL_MAX:
            found.append(
                f"line {node.lineno}: {node.name} takes {len(names)} positional parameters,"
                f" {POSITIONAL_MAX} are allowed; make the options keyword-only"
            )
    return found


def complaints_about(path: Path) -> list[str]:
    source = path.read_text()
    relative = path.relative_to(ROOT)
    parsed = functions(source)
    found = long_functions(parsed) + wide_functions(parsed)
    length = source.count("\n")
    if length > lines_max(path):
        found.append(f"{length} lines, {lines_max(path)} are allowed")
    return [f"{relative}: {complaint}" for complaint in found]


def test_every_file_is_within_the_limits() -> None:
    complaints = [complaint for path in python_files() for complaint in complaints_about(path)]
    assert not complaints, "\n".join(complaints)


def test_the_package_was_looked_at() -> None:
    assert ROOT / "clusterpool" / "errors.py" in python_files()


@pytest.mark.parametrize(("lines", "complaints"), [(60, 0), (61, 1)])
def test_a_function_of_sixty_one_lines_is_too_long(lines: int, complaints: int) -> None:
    source = "def function():\n" + "    pass\n" * (lines - 1)
    assert len(long_functions(functions(source))) == complaints


@pytest.mark.parametrize(
    ("signature", "complaints"),
    [
        ("a, b, c, d, e, f", 0),
        ("self, a, b, c, d, e, f", 0),
        ("a, b, c, d, e, f, *, g, h", 0),
        ("a, b, c, d, e, f, g", 1),
        ("a, b, /, c, d, e, f, g", 1),
    ],
)
def test_a_seventh_positional_parameter_is_one_too_many(signature: str, complaints: int) -> None:
    assert len(wide_functions(functions(f"def function({signature}): ...\n"))) == complaints


@pytest.mark.parametrize(
    ("path", "limit"),
    [
        ("clusterpool/core/dispatch.py", 500),
        ("clusterpool/node/main.py", 600),
        ("tests/core/test_dispatch.py", 1000),
    ],
)
def test_limits_by_folder(path: str, limit: int) -> None:
    assert lines_max(ROOT / path) == limit
