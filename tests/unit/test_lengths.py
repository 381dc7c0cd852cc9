"""No function of 60 lines, no file of 500: the tail of the lengths is what makes code hard to live in (docs/style)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FUNCTION, FILE = 60, 500
# What is written by machines, or is one table by nature.
EXCEPT = {"kernel/ramet.config"}


def sources(*patterns: str) -> list[Path]:
    found = [path for pattern in patterns for path in ROOT.glob(pattern)]
    return sorted(path for path in found if "__pycache__" not in path.parts and str(path.relative_to(ROOT)) not in EXCEPT)


PYTHON = sources("src/**/*.py", "tests/**/*.py")
C = sources("agent/**/*.c", "agent/**/*.h", "kernel/*.c")


def python_functions(text: str) -> Iterator[tuple[str, int]]:
    """Name and lines of each function, decorators not counted."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def c_functions(text: str) -> Iterator[tuple[str, int]]:
    """A brace alone in the first column begins a function, the next `}` there ends it; its head is the line before."""
    lines = text.splitlines()
    begin = None
    for number, line in enumerate(lines):
        if line == "{":
            begin = number
        elif line == "}" and begin is not None:
            head = re.search(r"(\w+)\s*\(", lines[begin - 1])
            yield head[1] if head else "?", number - begin + 2
            begin = None


@pytest.mark.parametrize("path", [*PYTHON, *C], ids=lambda path: str(path.relative_to(ROOT)))
def test_lengths(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") < FILE, f"{path.name} has {text.count(chr(10))} lines"
    functions = python_functions(text) if path.suffix == ".py" else c_functions(text)
    assert not [f"{name}: {lines} lines" for name, lines in functions if lines >= FUNCTION]


def test_the_check_counts() -> None:
    assert dict(python_functions("@x\ndef f():\n    def g():\n        pass\n    return g\n")) == {"f": 4, "g": 2}
    assert dict(c_functions("static int f(int a)\n{\n\tif (a) {\n\t}\n\treturn a;\n}\n")) == {"f": 6}
    assert len(C) > 10
    assert len(PYTHON) > 40
